"""Where a cycle of generation spends its time, and that no Python loop runs over the nodes of a
tree.

    python -m inference.bench.profile --batch_size 4 --tree 16,4,4 --output PROFILE.txt

Text only: milliseconds by phase, torch operators, host reads, and the work that Python does in a
cycle at two sizes of tree and two numbers of rows. End tokens are ignored, so that rows stay in
flight.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from configs import cli

# two sizes of one depth, and two numbers of rows: what grows between them runs over nodes, or over
# rows
TREES = ("16,4,4", "60,4,10")
ROWS = (2, 8)
CYCLES = 8
TOP = 25


def profile(
    *,
    base: str | None = None,
    head: str | None = None,
    adapter: str | None = None,
    quantization: str = "none",
    batch_size: int = 1,
    tree: str | None = None,
    compile: str = "auto",
    max_new_tokens: int = 64,
    dtype: str = "auto",
    device: str | None = None,
    output: str | None = None,
) -> None:
    """Profile the cycles of greedy generation on held-out prompts. Without --base, the embedded
    model.

    --tree total_token,depth,top_k, or auto. --compile off, auto or max. --output FILE keeps the
    report, which else goes to stdout. Host reads and operator counts are of our own loop; the
    profiler's times are larger than those of the phases, as it watches each operator.
    """
    # the profiler's library says on stderr when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from eagle.errors import EagleError

    if batch_size < 1:
        raise EagleError(f"batch_size must be at least 1, not {batch_size}")
    if max_new_tokens < 8:
        raise EagleError(
            f"max_new_tokens {max_new_tokens} leaves no cycle to look at; give at least 8"
        )
    from inference.generate import load_model, require_writable, write_text

    if output is not None:
        require_writable(Path(output))
    from eagle.model import MODES

    if compile not in MODES:
        raise EagleError(f"unknown compile {compile!r}; use {', '.join(MODES)}")
    from records.prompts import load_prompts

    model = load_model(base, head, adapter, tree, dtype, device, compile, quantization=quantization)
    if model.drafter is None:
        raise EagleError("no draft head to profile: give --head PATH")
    ids = [p.ids for p in load_prompts(None, model.tokenizer)]
    text = report(model, ids, batch_size, max_new_tokens)
    if output is None:
        print(text, end="")
    else:
        write_text(Path(output), text)
        print(f"wrote {output}", file=sys.stderr)


def report(model, ids: list[list[int]], rows: int, new: int) -> str:
    """model: with the tree and mode to profile. ids: prompts, used round and round."""
    from eagle.errors import EagleError
    from inference.bench.cycle import alike, count

    say("preparing")
    tree = str(model.tree)
    device = model.target.device

    prompts = some_prompts(ids, rows, model.target.max_positions, new)

    def generate(on_cache=None, **more):
        return model.generate(
            prompts, max_new_tokens=new, eos_token_id=-1, on_cache=on_cache, **more
        )

    model.prepare()
    generate()  # warm-up; with tree "auto" it also measures what passes cost
    say("phases")
    phases, result = time_phases(generate, rows, device)
    if not len(phases):
        raise EagleError(
            f"a row is done within a cycle or two of {new} tokens; raise max_new_tokens"
        )
    say("operators and Python")
    counted = count(generate, rows, tree, device)
    settings = {}
    for size in TREES:
        for number in ROWS:
            say(f"counting: tree {size}, {number} rows")
            steady = alike(model, ids, number, size, CYCLES)
            settings[size, number] = count(steady, number, size, device)
    explained = model.explain()
    parts = [
        heading(model, rows, tree, new, len(phases), result.tau),
        phase_table(phases),
        operator_table(counted, device.type == "cuda"),
        read_table(counted),
        scaling(settings),
    ]
    if tree == "auto":
        parts.append('tree="auto", when the call ended\n' + indent(explained.splitlines()))
    return "\n\n".join(parts) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def some_prompts(ids: list[list[int]], rows: int, limit: int, new: int) -> list[list[int]]:
    """`rows` prompts of differing lengths, as requests have, that leave room for `new` tokens."""
    from eagle.errors import EagleError

    room = limit - new - rows
    if room < 1:
        raise EagleError(
            f"{rows} rows of {new} new tokens do not fit the model's {limit} positions; lower max_new_tokens"
        )
    return [ids[i % len(ids)][-(room + i) :] for i in range(rows)]


def time_phases(generate, rows: int, device):
    from eagle.decode import Timings
    from inference.bench.cycle import Phases

    timings = Timings()
    watch = Phases(rows, timings, device)
    with watch.watching():
        result = generate(watch.on_cache, timings=timings, synchronise=True)
    return watch.cycles(), result


def heading(model, rows: int, tree: str, new: int, cycles: int, tau: float) -> str:
    from inference.bench.engines import portable
    from inference.bench.environment import describe

    found = describe(model.target.device)
    where = found["accelerator"] or f"{found['cpu']}, {found['usable_cores']} cores"
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers"))
    dtype = str(model.target.dtype).removeprefix("torch.")
    return (
        f"Cycle profile of {portable(model.target.name)}: batch size {rows}, tree {tree}, "
        f"compile {model.compile}, {new} new tokens a row\n"
        f"Environment: {where}, {found['threads']} threads, {dtype}, {versions}, Python "
        f"{found['versions']['python']}, load {found['load_start']}, commit {found['git_commit']}, {found['date']}\n"
        f"{cycles} cycles with all rows in flight, tau {tau:.2f}"
    )


def phase_table(phases) -> str:
    """A pass of the target is in the verify phase, those of the head are in the draft phase."""
    ms = {name: 1e3 * phases.mean(name) for name in ("commit", "draft", "verify", "target", "head")}
    whole = ms["commit"] + ms["draft"] + ms["verify"]
    rows = []
    for phase, target, head in (
        ("commit", 0.0, 0.0),
        ("draft", 0.0, ms["head"]),
        ("verify", ms["target"], 0.0),
    ):
        rows.append((phase, ms[phase], target, head))
    rows.append(("cycle", whole, ms["target"], ms["head"]))
    lines = [
        f"{'':<8}{'ms':>9}{'share':>8}{'target passes':>16}{'head passes':>14}{'all else':>11}"
    ]
    for name, spent, target, head in rows:
        lines.append(
            f"{name:<8}{spent:>9.3f}{spent / whole:>8.1%}{target:>16.3f}{head:>14.3f}"
            f"{spent - target - head:>11.3f}"
        )
    share = [ms["target"] / whole, ms["head"] / whole, 1 - (ms["target"] + ms["head"]) / whole]
    lines.append(f"{'share':<8}{'':>9}{'':>8}{share[0]:>16.1%}{share[1]:>14.1%}{share[2]:>11.1%}")
    lines.append(
        f"{'passes':<8}{'':>17}{phases.mean('target passes'):>16.2f}{phases.mean('head passes'):>14.2f}"
    )
    return "Milliseconds per cycle, mean\n" + indent(lines)


def operator_table(counted, cuda: bool) -> str:
    recorded, spent = counted.recorded, counted.spent
    top = sorted(spent, key=lambda name: -spent[name][1 if cuda else 0])[:TOP]
    whole = sum(host for host, _ in spent.values())
    wide = max(map(len, top))
    columns = f"{'host ms':>10}{'share':>8}" + (f"{'device ms':>11}" if cuda else "")
    lines = [f"{'':<{wide}}{columns}{'calls':>9}"]
    for name in top:
        host, device = spent[name]
        lines.append(
            f"{name:<{wide}}{host / 1e3:>10.3f}{host / whole:>8.1%}"
            + (f"{device / 1e3:>11.3f}" if cuda else "")
            + f"{recorded.mean(name):>9.1f}"
        )
    lines.append(
        f"{'all':<{wide}}{whole / 1e3:>10.3f}{'':>8}{'':>{11 * cuda}}"
        f"{sum(map(recorded.mean, recorded.names)):>9.1f}"
    )
    return (
        f"Per cycle under torch.profiler, self time, the {len(top)} largest; calls within calls count, what\n"
        "runs inside a compiled pass is not seen\n" + indent(lines)
    )


def read_table(counted) -> str:
    reads = counted.reads
    names = [n for n in reads.names if reads.mean(n)]
    lines = [f"{reads.mean(name):>6.2f}  {name}" for name in names]
    waits = [name for name in counted.recorded.names if "Synchronize" in name]  # on a GPU
    lines += [f"{counted.recorded.mean(name):>6.2f}  {name}, in all" for name in waits]
    return f"Host reads per cycle: {sum(map(reads.mean, names)):.2f}\n" + indent(lines)


def scaling(settings: dict) -> str:
    """Four numbers at four settings, and by name what is larger at the larger one."""
    from inference.bench.cycle import Counts

    (small, large), (few, many) = TREES, ROWS
    keys = [(tree, rows) for rows in ROWS for tree in TREES]
    lines = [f"{'':<24}" + "".join(f"{f'{tree} x {rows} rows':>20}" for tree, rows in keys)]
    for kind, title in Counts.KINDS.items():
        values = [getattr(settings[key], kind).total() for key in keys]
        lines.append(f"{title:<24}" + "".join(f"{value:>20g}" for value in values))
    with_nodes = growth([(settings[small, n], settings[large, n]) for n in ROWS])
    with_rows = growth([(settings[t, few], settings[t, many]) for t in TREES])
    lines += ["", f"grows with nodes ({small} to {large}):", *listed(with_nodes)]
    lines += ["", f"grows with rows ({few} to {many}):", *listed(with_rows)]
    return (
        "Work per cycle at two sizes of tree and two numbers of rows, medians; every second row keeps one\n"
        "draft token, the others none, so that all cycles are alike\n" + indent(lines)
    )


def growth(pairs: list[tuple]) -> dict[tuple[str, str], tuple[float, float]]:
    """(kind, name) -> (small, large), of what grows in any of the pairs of `Counts`."""
    from inference.bench.cycle import Counts, grown

    found = {}
    for small, large in pairs:
        for kind in Counts.KINDS:
            for name, pair in grown(small, large, kind).items():
                found.setdefault((kind, name), pair)
    return found


def listed(found: dict) -> list[str]:
    from inference.bench.cycle import Counts

    lines = [
        f"  {Counts.KINDS[kind]}: {name} {small:g} -> {large:g}"
        for (kind, name), (small, large) in found.items()
    ]
    return lines or ["  nothing"]


def indent(lines: list[str]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in lines)


if __name__ == "__main__":
    cli.main(profile, name="python -m inference.bench.profile")
