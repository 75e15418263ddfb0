"""Measure stock `generate`, our plain engine and the speculative engine, interleaved in one process.

    python -m inference.bench --batch_sizes 1,4 --tree 16,4,4 --json OUT.json

Prints a table and, as the last line, one JSON object. Each batch of prompts is run by every engine in
turn, `repeats` times; a batch's time is the median of its repeats, prompt processing included.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from configs import cli

ENGINES = ("hf", "vanilla", "eagle")


@dataclass
class Run:
    """One engine at one batch size, summed over batches of prompts."""

    engine: str
    batch_size: int
    new_tokens: int = 0
    seconds: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)
    rows: list = field(default_factory=list)  # decode.Row of one repeat
    cycles: int = 0  # passes over a batch
    timings: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("draft", "verify", "commit"), 0.0)
    )

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    def to_json(self) -> dict:
        from eagle.model import acceptance_by_depth

        row = {
            "engine": self.engine, "batch_size": self.batch_size, "new_tokens": self.new_tokens,
            "seconds": round(self.seconds, 4), "tokens_per_second": round(self.tokens_per_second, 2),
            "tau": None, "acceptance_by_depth": None, "cycle_ms": None, "draft_ms": None,
            "verify_ms": None, "commit_ms": None, "looping": round(looping_share(self.outputs), 3),
        }  # fmt: skip
        if self.rows:
            cycles = sum(r.cycles for r in self.rows)
            row["tau"] = round((self.new_tokens - len(self.rows)) / cycles, 3) if cycles else 0.0
            rates = acceptance_by_depth([r.accepted for r in self.rows])
            row["acceptance_by_depth"] = [round(a, 3) for a in rates]
            per_cycle = {k: 1e3 * v / max(self.cycles, 1) for k, v in self.timings.items()}
            row["cycle_ms"] = round(sum(per_cycle.values()), 3)
            row.update({f"{k}_ms": round(v, 3) for k, v in per_cycle.items()})
        return row


def looping_share(outputs: list[list[int]]) -> float:
    """Share of generations that end in a loop: the last 24 or more tokens repeat with a period <= 24,
    three times at least."""

    def loops(tokens: list[int]) -> bool:
        for period in range(1, 25):
            span = max(24, 3 * period)
            tail = tokens[-span:]
            if len(tail) == span and tail[period:] == tail[:-period]:
                return True
        return False

    return sum(map(loops, outputs)) / len(outputs) if outputs else 0.0


def bench(
    *,
    base: str | None = None,
    head: str | None = None,
    adapter: str | None = None,
    prompts: str | None = None,
    batch_sizes: str = "1",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    tree: str | None = None,
    num_prompts: int = 20,
    repeats: int = 3,
    engines: str = "hf,vanilla,eagle",
    dtype: str = "auto",
    device: str | None = None,
    json: str | None = None,
    quiet: bool = False,
) -> None:
    """Throughput of hf, vanilla and eagle on the same prompts, acceptance, and whether outputs are equal.

    Without --base the embedded model and its held-out prompts are used. --prompts takes a JSONL file of
    prompts, FIM pairs, chats, or MT-Bench/Spec-Bench questions. --temperature above 0 samples: stock
    generate draws other random numbers then, so equality is judged between vanilla and eagle alone.
    """
    from eagle.errors import EagleError

    sizes = parse_sizes(batch_sizes)
    chosen = [e for e in ENGINES if e in engines.split(",")]
    unknown = sorted(set(engines.split(",")) - set(ENGINES))
    if unknown or not chosen:
        raise EagleError(
            f"unknown engine {', '.join(unknown) or engines!r}; use {', '.join(ENGINES)}"
        )
    for name, value in (
        ("num_prompts", num_prompts),
        ("repeats", repeats),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1:
            raise EagleError(f"{name} must be at least 1, not {value}")

    from inference.generate import load_model, require_writable
    from inference.prompts import load_prompts

    if json is not None:
        require_writable(Path(json))
    model = load_model(base, head, adapter, tree, dtype, device)
    if "eagle" in chosen and model.drafter is None:
        raise EagleError("no draft head to measure: give --head PATH, or --engines hf,vanilla")
    loaded = load_prompts(prompts, model.tokenizer, num_prompts)
    ids = [p.ids for p in loaded]
    options = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    result = measure(model, ids, sizes, chosen, options, repeats, quiet)
    if not quiet:
        print(table(result))
    line = to_line(result)
    if json is not None:
        from inference.generate import write_text

        write_text(Path(json), line + "\n")
    print(line)


def to_line(result: dict) -> str:
    return json.dumps(result)


def parse_sizes(text: str) -> list[int]:
    from eagle.errors import EagleError

    try:
        sizes = [int(part) for part in str(text).strip("()[]").split(",") if part.strip()]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise EagleError(
            f"batch_sizes {text!r} is no list of sizes; write for instance --batch_sizes 1,4"
        )
    return sizes


def measure(
    model, ids: list[list[int]], sizes, engines, options: dict, repeats: int, quiet: bool
) -> dict:
    """The bench's JSON object."""
    import torch
    import transformers

    greedy = options["temperature"] == 0.0
    runs: list[Run] = []
    identical: dict[str, bool] = {}
    divergences: dict[str, dict] = {}
    say = (lambda *a: None) if quiet else lambda text: print(text, file=sys.stderr, flush=True)
    with torch.inference_mode():
        for size in sizes:
            batches = [ids[i : i + size] for i in range(0, len(ids), size)]
            found = {engine: Run(engine, size) for engine in engines}
            warm = {**options, "max_new_tokens": min(16, options["max_new_tokens"])}
            for engine in engines:
                run_engine(engine, model, batches[0], warm)
            started = time.perf_counter()
            for number, batch in enumerate(batches, 1):
                measure_batch(model, batch, found, options, repeats)
                spent = time.perf_counter() - started
                left = spent / number * (len(batches) - number)
                say(f"batch size {size}: {number}/{len(batches)} batches, about {left:.0f} s left")
            runs += found.values()
            if "eagle" in found:
                others = [e for e in ("hf", "vanilla") if e in found and (greedy or e == "vanilla")]
                report = compare(model, ids, found["eagle"], [found[e] for e in others], options)
                identical[str(size)] = report.pop("identical")
                divergences[str(size)] = report
    by_key = {(r.engine, r.batch_size): r for r in runs}

    def ratio(engine: str) -> dict[str, float]:
        return {
            str(s): round(by_key["eagle", s].tokens_per_second / by_key[engine, s].tokens_per_second, 3)
            for s in sizes if ("eagle", s) in by_key and (engine, s) in by_key
        }  # fmt: skip

    speedup = {"vs_hf": ratio("hf"), "vs_vanilla": ratio("vanilla")}
    rows = [r.to_json() for r in runs]
    tau = {str(r["batch_size"]): r["tau"] for r in rows if r["engine"] == "eagle"}
    device = model.target.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.target.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "model": model.target.name,
        "tree": str(model.drafter.shape) if model.drafter else None,
        "num_prompts": len(ids), "repeats": repeats,
        "max_new_tokens": options["max_new_tokens"], "temperature": options["temperature"],
        "runs": rows,
        "speedup": speedup,
        "efficiency": {s: round(v / tau[s], 3) for s, v in speedup["vs_vanilla"].items() if tau.get(s)},
        "identical": identical,
        "divergences": divergences,
    }  # fmt: skip


def measure_batch(model, batch, found: dict[str, Run], options: dict, repeats: int) -> None:
    """Every engine in turn, `repeats` times; the median of each goes to its run."""
    seconds: dict[str, list[float]] = {e: [] for e in found}
    laps: dict[str, list[dict]] = {e: [] for e in found}
    last = {}
    for repeat in range(repeats):
        order = list(found) if repeat % 2 == 0 else list(found)[::-1]
        for engine in order:
            spent, last[engine] = run_engine(engine, model, batch, options)
            seconds[engine].append(spent)
            laps[engine].append(last[engine][2])
    for engine, run in found.items():
        outputs, rows, _ = last[engine]
        run.seconds += statistics.median(seconds[engine])
        run.outputs += outputs
        run.new_tokens += sum(map(len, outputs))
        if rows:
            run.rows += rows
            run.cycles += max(r.cycles for r in rows)
            for name in run.timings:
                run.timings[name] += statistics.median(lap[name] for lap in laps[engine])


def run_engine(engine: str, model, batch: list[list[int]], options: dict):
    """(seconds, (new tokens a row, decode rows or [], laps)) of one engine on one batch."""
    from eagle.decode import Timings

    if engine == "hf":
        return run_stock(model, batch, options)
    timings = Timings()
    synchronise(model)
    started = time.perf_counter()
    result = model.generate(
        batch, draft=engine == "eagle", timings=timings, synchronise=True, **options
    )
    synchronise(model)
    spent = time.perf_counter() - started
    laps = {"draft": timings.draft, "verify": timings.verify, "commit": timings.commit}
    return spent, ([row.tokens for row in result.rows], result.rows, laps)


def run_stock(model, batch, options: dict):
    """transformers' own `generate` on the same weights: left padding, its own cache and attention."""
    import torch

    target = model.target
    eos = sorted(model._eos(None))
    pad = eos[0] if eos else 0
    width = max(map(len, batch))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=target.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=target.device
    )
    sampling = {}
    if options["temperature"] > 0.0:
        torch.manual_seed(options["seed"])
        sampling = {
            "temperature": options["temperature"],
            "top_p": options["top_p"] or 1.0,
            "top_k": options["top_k"],
        }
    with target.stock() as stock:
        synchronise(model)
        started = time.perf_counter()
        out = stock.generate(
            ids, attention_mask=mask, max_new_tokens=options["max_new_tokens"], do_sample=bool(sampling),
            eos_token_id=eos or None, pad_token_id=pad, **sampling,
        )  # fmt: skip
        synchronise(model)
        spent = time.perf_counter() - started
    outputs = []
    for row in out[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos]
        outputs.append(row[: ends[0] + 1] if ends else row)
    return spent, (outputs, [], dict.fromkeys(("draft", "verify", "commit"), 0.0))


def synchronise(model) -> None:
    if model.target.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.target.device)


def compare(model, prompts, eagle: Run, others: list[Run], options: dict) -> dict:
    """Are the tokens equal? In bf16/fp16 a first divergence may be a near tie, judged by replay."""
    import torch

    exact = model.target.dtype == torch.float32
    counts = {"rows": 0, "near_ties": 0, "real": 0}
    for other in others:
        triples = zip(prompts, eagle.outputs, other.outputs, strict=True)
        for number, (prompt, ours, theirs) in enumerate(triples):
            if ours == theirs:
                continue
            counts["rows"] += 1
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None
            )
            seed = options["seed"] + number % eagle.batch_size
            near = not exact and place is not None and near_tie(
                model, prompt, ours[:place], ours[place], theirs[place], options, seed, eagle.batch_size
            )  # fmt: skip
            counts["near_ties" if near else "real"] += 1
    return {"identical": counts["real"] == 0, **counts}


def near_tie(
    model,
    prompt: list[int],
    common: list[int],
    ours: int,
    theirs: int,
    options: dict,
    seed: int,
    rows: int = 1,
) -> bool:
    """Replay prompt + common tokens without speculation: is the gap between the two next tokens rounding?

    The prefix is run whole; and its new tokens one by one, in chunks of as many as the tree has nodes, and
    in chunks of half as many, in batches of `rows` equal rows, so that the cache holds what each way of
    decoding would have written. The noise is the largest difference of any score among these, at least one
    unit in the last place of the dtype at the top score. A near tie: the two tokens' gap is inside the
    noise, and no other token is better than both by more than it. Scores are logits, or when sampling what
    the choice is made from: processed logits plus the position's noise.
    """
    import torch

    from kernels.choose import gumbel_noise, process_logits

    target, temperature = model.target, options["temperature"]
    prefix = prompt + common
    nodes = model.drafter.shape.num_nodes if model.drafter else 2
    start = len(prompt) if common else len(prompt) - 1
    ways = [(len(prefix), 1)]
    if start > 0:
        ways += [(start, chunk) for chunk in sorted({1, (nodes + 1) // 2, nodes})]
    replays = [replay(target, prefix, first, chunk, rows) for first, chunk in ways]
    scores = torch.stack(replays)  # [replays, V]
    ulp = scores.abs().max().item() * torch.finfo(target.dtype).eps
    noise = max((scores.amax(0) - scores.amin(0)).max().item(), ulp)
    if temperature > 0.0:
        noise /= temperature
        position = torch.tensor([[len(prefix)]], device=target.device)
        seeds = torch.tensor([seed], device=target.device)
        cuts = {k: options[k] for k in ("top_k", "top_p")}
        scores = (
            process_logits(scores, temperature, **cuts)
            + gumbel_noise(seeds, position, scores.shape[1])[0]
        )
    picks = set(scores.argmax(-1).tolist())
    if {ours, theirs} <= picks:
        return True
    scores = scores.clamp_min(
        -1e9
    )  # what top-k and top-p cut off in one replay may stay in another
    base = scores[0]
    gap = abs(base[ours] - base[theirs]).item()
    behind = (base.max() - torch.maximum(base[ours], base[theirs])).item()
    return gap <= noise and behind <= noise


def replay(target, prefix: list[int], start: int, chunk: int, rows: int):
    """Logits [V] float32 after `prefix`: its first `start` tokens in one pass, the rest `chunk` at a time."""
    import torch

    device = target.device
    ids = torch.tensor([prefix] * rows, device=device)
    cache = target.new_cache(rows, len(prefix))
    lengths = torch.full((rows,), start, device=device)
    out, _ = target.prefill(ids[:, :start], lengths, [start] * rows, cache, features=False)
    for place in range(start, len(prefix), chunk):
        piece = ids[:, place : place + chunk]
        n = piece.shape[1]
        depth = torch.arange(n, device=device).expand(rows, n)
        mask = torch.ones(n, n, dtype=torch.bool, device=device).tril().expand(rows, n, n)
        out, _ = target.verify_tree(piece, depth, mask, cache, features=False)
        cache.advance(torch.full((rows,), n, device=device), [n] * rows)
    return out[0, -1].float()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.machine()


def table(result: dict) -> str:
    """The result for people."""
    lines = [
        f"{result['model']} on {result['device']} ({result['threads']} threads, {result['dtype']}), "
        f"tree {result['tree']}, temperature {result['temperature']}, {result['num_prompts']} prompts",
        f"{'batch':>5} {'engine':<10} {'tokens/s':>9} {'tau':>6} {'vs hf':>7} {'vs vanilla':>10} "
        f"{'cycle ms':>9} {'identical':>9} {'looping':>8}",
    ]
    names = {"hf": "HF generate", "vanilla": "plain", "eagle": "eagenerate"}
    for run in result["runs"]:
        size, is_eagle = str(run["batch_size"]), run["engine"] == "eagle"

        def show(value, form: str) -> str:
            return format(value, form) if value is not None else ""

        hf = result["speedup"]["vs_hf"].get(size) if is_eagle else None
        vanilla = result["speedup"]["vs_vanilla"].get(size) if is_eagle else None
        same = {True: "yes", False: "NO"}.get(result["identical"].get(size), "") if is_eagle else ""
        lines.append(
            f"{size:>5} {names[run['engine']]:<11}{run['tokens_per_second']:>9.1f} "
            f"{show(run['tau'] if is_eagle else None, '6.2f'):>6} {show(hf, '.2f'):>7} {show(vanilla, '.2f'):>10} "
            f"{show(run['cycle_ms'], '.2f'):>9} {same:>9} {run['looping']:>8.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.main(bench, name="python -m inference.bench")
