"""`make pipeline`: fine-tune a base, adapt a draft head to what came of it, and measure what that
is worth.

    base -> QLoRA SFT -> answers of the tuned model -> head for the tuned, quantized target ->
    eagenerate -> benchmarks -> report.md, report.json

Each step is a command that can be typed by hand; it is shown first. The same command goes on after
an interruption, and does again only what has other inputs than before.
"""

from __future__ import annotations

import json
from pathlib import Path

from configs import cli
from configs.load import load_config
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from eagle.files import atomic_write_text, read_json
from eagle.loading import find_folder, load_tokenizer
from eagle.model import EMBEDDED_HEAD
from eagle.tree import TreeShape
from examples.steps import Steps, words, write_once
from inference.bench.record import require
from inference.bench.report import grid, tabulate
from records.prompts import load_prompts
from records.sources import read_records, resolve

FORMATS = ("chat", "instruction", "fim")
# benchmark -> case, head, target; no case: does stock `generate` say the same, token for token?
CASES = {
    "bench_base": ("a", "given", "base"),
    "bench_given": ("b", "given", "tuned"),
    "bench_adapted": ("c", "adapted", "tuned"),
    "exact_given": (None, "given", "tuned"),
    "exact_adapted": (None, "adapted", "tuned"),
}
COPIED = ("tau", "tokens_per_second", "vs_hf", "new_tokens", "looping")


def pipeline(
    *overrides: str,
    base: str | None = None,
    head: str | None = None,
    data: str | None = None,
    heldout: str | None = None,
    data_format: str = "chat",
    quantization: str = "nf4",
    sft_config: str | None = None,
    head_config: str | None = None,
    num_answers: int = 256,
    num_prompts: int = 8,
    max_new_tokens: int = 96,
    tree: str | None = None,
    repeats: int = 1,
    output: str = "runs/pipeline",
) -> int:
    """Fine-tune, adapt a draft head, generate, measure; without arguments, on the embedded model
    and cards of functions as JSON, in some minutes on two CPU cores.

    --base and --head: your model and a head for it (without --head one is trained from scratch).
    --data and --heldout: files of one --data_format, chat, instruction or fim; --heldout is
    used to measure only. --sft_config and --head_config: YAML files or presets of `train.finetune
    sft` and of `train.main`; sft.KEY=VALUE and head.KEY=VALUE override their settings:
    sft.train.max_steps=100. --num_answers: rows of the data whose answers the tuned model writes
    for the head to learn from; --num_prompts: held-out rows that are generated and measured.

    Everything goes to --output; run again with the same --output, it goes on where it stopped. The
    last line is one JSON object, the content of report.json. Exit status 1 where an output is not
    the tuned target's own."""
    require(locals(), "num_answers", "num_prompts", "max_new_tokens", "repeats")
    if data_format not in FORMATS:
        raise EagleError(f"data_format={data_format!r} has no prompts; use {', '.join(FORMATS)}")
    if embedded := base is None:
        sft_config, head_config = sft_config or "pipeline", head_config or "pipeline_head"
    tree = str(TreeShape.parse(tree or ("16,4,4" if embedded else "60,7,10")))
    given = find_folder(head, "head") if head else EMBEDDED_HEAD if embedded else None
    settings = split_overrides(overrides)
    # refuses what is wrong
    load_config(
        HeadTrainConfig, head_config, settings["head"], {"model.quantization": quantization}
    )
    folder = Path(output).expanduser()
    steps, cards = Steps(folder), folder / "data"
    if data is None and heldout is None and data_format == "chat":
        rows, held = cards / "cards.jsonl", cards / "heldout_cards.jsonl"
        steps.run("data", words("train.finetune data", output=cards), rows, held)
    else:
        rows, held = Path(data or "").expanduser(), Path(heldout or "").expanduser()
        require_rows(rows, held, base)
    lines = read_lines(held)  # at even distances, what is generated and measured
    count = min(num_prompts, len(lines))
    text = "".join(lines[n * len(lines) // count] + "\n" for n in range(count))
    prompts = write_once(folder / "prompts.jsonl", text)

    sft, adapter = folder / "sft", folder / "sft" / "adapter"
    more = [f"data.eval_path={held}", f"model.quantization={quantization}", *settings["sft"]]
    same = {"base": base, "data_format": data_format}
    command = words("train.finetune sft", *more, **same, data=rows, output=sft, config=sft_config)
    steps.run("sft", command, sft, adapter, resume=["--resume"])

    # answers of the tuned model, for the head to learn from
    tuned = {"base": base, "adapter": adapter, "quantization": quantization}
    answers = folder / "answers" / "answers.jsonl"
    more = {"limit": num_answers, "max_new_tokens": max_new_tokens, "output": answers}
    more |= {"data_format": data_format, "data": rows}
    command = words("train.prepare regenerate --temperature 0,0.8 --slots 16", **tuned, **more)
    steps.run("answers", command, answers.parent, answers, resume=[])

    adapted = folder / "head" / "head"
    more = {"data": answers, "init_head": given, "output": adapted.parent, "config": head_config}
    more["data_format"] = data_format
    command = words("train.main", f"data.eval_path={held}", *settings["head"], **tuned, **more)
    steps.run("head", command, adapted.parent, adapted, resume=["--resume"])

    same = {"tree": tree, "max_new_tokens": max_new_tokens, "prompts": prompts}
    out = folder / "generations.jsonl"
    command = words("inference.generate --batch_size 4", **tuned, head=adapted, output=out, **same)
    steps.run("generate", command, out)
    heads = {"given": given, "adapted": adapted}
    targets = {"base": {"base": base, "quantization": quantization}, "tuned": tuned}
    speed = f"inference.bench --engines hf,vanilla,eagle --repeats {repeats}"
    exact = "inference.bench --engines hf,eagle --dtype float32 --repeats 1"
    found = {}
    for name, (case, drafter, target) in CASES.items():
        if heads[drafter] is not None:
            out = folder / f"{name}.json"
            more = {"head": heads[drafter], "num_prompts": num_prompts, "json": out}
            command = words(speed if case else exact, **targets[target], **more, **same)
            steps.run(name, command, out)
            found[name] = read_json(out)

    plan = {"base": "embedded" if embedded else Path(base).name, "given_head": given and given.name}
    plan |= {"quantization": quantization, "data_format": data_format, "num_prompts": count}
    plan |= {"max_new_tokens": max_new_tokens, "tree": tree}
    report = summarise(folder, found, steps.spent, plan)
    page, text = markdown(report), json.dumps(report, ensure_ascii=False)
    atomic_write_text(folder / "report.md", page)
    atomic_write_text(folder / "report.json", text + "\n")
    print(page, text, sep="\n")
    return 0 if report["identical"] else 1


def split_overrides(overrides: tuple[str, ...]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {"sft": [], "head": []}
    for override in overrides:
        part, _, rest = override.partition(".")
        if part not in given or "=" not in rest:
            raise EagleError(f"{override!r}: write sft.KEY=VALUE or head.KEY=VALUE")
        given[part].append(rest)
    return given


def require_rows(data: Path, heldout: Path, base: str | None) -> None:
    """Refuse before the work what would fail after it."""
    for flag, path in (("data", data), ("heldout", heldout)):
        if path == Path():
            raise EagleError(f"--{flag} {path}: no such file; give --data FILE and --heldout FILE")
    load_prompts(heldout, load_tokenizer(base))
    if shared := set(read_lines(data)) & set(read_lines(heldout)):
        raise EagleError(
            f"{len(shared)} rows of --heldout {heldout} stand in --data too; take them out of one"
        )


def read_lines(path: Path) -> list[str]:
    """Records as they stand in the file."""
    return [record.raw for file in resolve([path]) for record in read_records(file)]


def summarise(folder: Path, found: dict[str, dict], spent: dict[str, float], plan: dict) -> dict:
    """report.json. rows[]: one for each benchmark; exact{}: in fp32, by head."""
    rows, exact = [], {}
    for name, bench in found.items():
        row = dict(zip(("case", "head", "target"), CASES[name], strict=True))
        if row["case"] is None:
            exact[row["head"]] = equality(bench)
            continue
        runs = {run["engine"]: run for run in bench["runs"]}
        eagle, plain = runs["eagle"], runs["vanilla"]["tokens_per_second"]
        row |= {key: eagle[key] for key in COPIED}
        row |= {"plain": plain, "vs_vanilla": eagle["tokens_per_second"] / plain}
        rows.append(row | equality(bench))
    answers = read_json(folder / "answers" / "answers.card.json")["counts"]["answers"]
    return {
        "kind": "pipeline",
        **plan,
        "sft": read_json(folder / "sft" / "summary.json"),
        "head": {**read_json(folder / "head" / "summary.json"), "answers": answers},
        "rows": rows,
        "exact": exact,
        "identical": all(each["identical"] for each in (*rows, *exact.values())),
        **{name: found["bench_adapted"][name] for name in ("dtype", "environment")},
        "stages": {name: round(seconds, 1) for name, seconds in spent.items()},
        "minutes": round(sum(spent.values()) / 60, 2),
        "sample": json.loads(read_lines(folder / "generations.jsonl")[0]),
    }


def equality(found: dict) -> dict:
    """Is what came with drafting what came without, from our plain engine and stock `generate`?"""
    counts = [other for run in found["runs"] for other in (run["divergences"] or {}).values()]
    return {
        "identical": all(run["identical"] in (True, None) for run in found["runs"]),
        "dtype": found["dtype"],
        "compared": len(counts) * found["num_prompts"],
        **{name: sum(c[name] for c in counts) for name in ("rows", "near_ties", "real")},
    }


def markdown(report: dict) -> str:
    sft, head = report["sft"], report["head"]
    before, after = sft["heldout_before"], sft["heldout_after"]
    learned = "; ".join(f"{k} {before[k]:.3f} → {after[k]:.3f}" for k in ("loss", "token_accuracy"))
    columns = {name: name for name in ("case", "head", "target")}
    columns |= {"τ": "tau:.2f", "tokens/s": "tokens_per_second:.0f", "plain": "plain:.0f"}
    columns |= {"vs plain": "vs_vanilla:.2f", "vs stock": "vs_hf:.2f", "looping": "looping:.0%"}
    columns |= {"identical": "identical", "near ties": "near_ties", "of": "compared"}
    parts = [
        "# Fine-tune, then accelerate",
        f"Base {report['base']}, {report['quantization']}: {sft['steps']} steps of SFT on "
        f"{sft['data']['rows']} rows (held-out {learned}), then {head['steps']} steps of the head "
        f"({report['given_head'] or 'from scratch'}) on {head['answers']} answers of the tuned "
        "model.",
        grid(tabulate(report["rows"], **columns)),
        f"{report['num_prompts']} held-out prompts, {report['max_new_tokens']} new tokens at most, "
        f"greedy, batch 1, {report['dtype']}, tree {report['tree']}; {report['minutes']} minutes.",
    ]
    for name, found in report["exact"].items():
        differ = f"{found['rows']} of {found['compared']} outputs differ"
        parts.append(f"{name} head in fp32: {differ} from the tuned target's own.")
    parts.append(f"An answer of the tuned model:\n\n````\n{report['sample']['completion']}\n````")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    cli.main(pipeline, name="python -m examples.pipeline")
