"""`make pipeline`: fine-tune a base, adapt a draft head to what came of it, and measure what that
is worth.

    base -> QLoRA SFT -> answers of the tuned model -> head for the tuned, quantized target ->
    eagenerate
         -> benchmarks -> report.md, report.json

Each stage is a command that can be typed by hand; it is shown first. The same command goes on after
an interruption, and does again only what has other inputs than before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import configs
from configs import cli
from configs.load import load_config
from configs.schema import HeadTrainConfig
from examples.stages import Runner, Stage

FORMATS = ("chat", "instruction", "fim")
SFT_PRESET, HEAD_PRESET = "pipeline", "pipeline_head"  # for the embedded model


@dataclass(frozen=True)
class Plan:
    """What is tuned, on what, and where things lie. `head` None: one is trained from scratch."""

    base: str | None
    head: Path | None
    data: Path
    heldout: Path
    data_format: str
    output: Path
    quantization: str
    sft: tuple[str, ...]
    head_training: tuple[str, ...]
    num_answers: int
    num_prompts: int
    max_new_tokens: int
    tree: str
    repeats: int

    @property
    def adapter(self) -> Path:
        return self.output / "sft" / "adapter"

    @property
    def answers(self) -> Path:
        return self.output / "answers" / "answers.jsonl"

    @property
    def adapted_head(self) -> Path:
        return self.output / "head" / "head"

    @property
    def prompts(self) -> Path:
        return self.output / "prompts.jsonl"

    @property
    def on_base(self) -> tuple[str, ...]:
        return () if self.base is None else ("--base", self.base)

    @property
    def tuned(self) -> tuple[str, ...]:
        return ("--adapter", str(self.adapter), "--quantization", self.quantization)


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
    --data and --heldout: JSONL files of one --data_format, chat, instruction or fim; --heldout is
    used to measure only. --sft_config and --head_config: YAML files or presets of `train.finetune
    sft` and of `train.main`; sft.KEY=VALUE and head.KEY=VALUE override their settings:
    sft.train.max_steps=100. --num_answers: rows of the data whose answers the tuned model writes
    for the head to learn from; --num_prompts: held-out rows that are generated and measured.

    Everything goes to --output; run again with the same --output, it goes on where it stopped. The
    last line is one JSON object, the content of report.json. Exit status 1 where an output is not
    the tuned target's own.
    """
    from eagle.errors import EagleError
    from examples.pipeline_report import markdown, summarise

    for name, value in (
        ("num_answers", num_answers),
        ("num_prompts", num_prompts),
        ("max_new_tokens", max_new_tokens),
        ("repeats", repeats),
    ):
        if value < 1:
            raise EagleError(f"{name} must be at least 1, not {value}")
    if data_format not in FORMATS:
        raise EagleError(f"data_format={data_format!r} has no prompts; use {', '.join(FORMATS)}")
    folder = Path(output).expanduser()
    given = {"sft": [], "head": []}
    for override in overrides:
        part, _, rest = override.partition(".")
        if part not in given or "=" not in rest:
            raise EagleError(
                f"{override!r} is for neither stage: write sft.KEY=VALUE or head.KEY=VALUE"
            )
        given[part].append(rest)
    plan = Plan(
        base=base,
        head=find_head(base, head),
        data=Path(data).expanduser() if data else folder / "data" / "cards.jsonl",
        heldout=Path(heldout).expanduser() if heldout else folder / "data" / "heldout_cards.jsonl",
        data_format=data_format,
        output=folder,
        quantization=quantization,
        sft=(*config_of(sft_config, base, SFT_PRESET), *given["sft"]),
        head_training=(*config_of(head_config, base, HEAD_PRESET), *given["head"]),
        num_answers=num_answers,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
        tree=tree or ("16,4,4" if base is None else "60,7,10"),
        repeats=repeats,
    )
    require_usable(plan, shipped=data is None and heldout is None)
    stages = all_stages(plan, shipped=data is None)
    runner = Runner(folder, len(stages))
    for stage in stages:
        if stage.name == "sft":
            write_prompts(plan)
        code = runner.run(stage)
        if code:
            return code
    report = summarise(plan, runner.spent)
    from inference.generate import write_text

    page = markdown(report)
    write_text(folder / "report.md", page)
    write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    runner.console.rule("report")
    print(page)
    print(json.dumps(report, ensure_ascii=False))
    return 0 if report["identical"] else 1


def find_head(base: str | None, head: str | None) -> Path | None:
    """The head to start from: the one given, or the one that ships with the embedded model."""
    from eagle.checkpoint import find_folder
    from eagle.model import EMBEDDED_HEAD

    if head is None:
        return EMBEDDED_HEAD if base is None else None
    return find_folder(head, "head")


def config_of(config: str | None, base: str | None, embedded: str) -> tuple[str, ...]:
    config = config or (embedded if base is None else None)
    return () if config is None else ("--config", config)


def require_usable(plan: Plan, shipped: bool) -> None:
    """Refuse before the work what would fail after it."""
    from eagle.errors import EagleError
    from eagle.loading import QUANTIZATIONS, load_tokenizer
    from eagle.tree import TreeShape
    from records.prompts import load_prompts

    TreeShape.parse(plan.tree)
    words = plan.head_training
    named = words[:1] == ("--config",)
    load_config(HeadTrainConfig, words[1] if named else None, words[2 if named else 0 :])
    if plan.quantization not in QUANTIZATIONS:
        raise EagleError(
            f"unknown quantization {plan.quantization!r}; use {', '.join(QUANTIZATIONS)}"
        )
    if shipped:
        if plan.data_format != "chat":
            raise EagleError(f"--data_format {plan.data_format} needs --data FILE --heldout FILE")
        return
    for flag, path in (("data", plan.data), ("heldout", plan.heldout)):
        if not path.is_file():
            raise EagleError(
                f"--{flag} {path}: no such file; give --data FILE and --heldout FILE, rows of one kind and "
                "none of them in both"
            )
    seen = {line.strip() for line in read_lines(plan.data)}
    shared = sum(line.strip() in seen for line in read_lines(plan.heldout))
    if shared:
        raise EagleError(
            f"{shared} rows of --heldout {plan.heldout} stand in --data too; take them out of one of the two"
        )
    load_prompts(plan.heldout, load_tokenizer(plan.base or "embedded"))


def read_lines(path: Path) -> list[str]:
    from eagle.errors import EagleError

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EagleError(f"cannot read {path}: {error}; a data file is UTF-8 JSONL") from error
    return [line for line in text.split("\n") if line.strip()]


def write_prompts(plan: Plan) -> None:
    """Held-out rows at even distances: what is generated and measured."""
    from inference.generate import write_text

    lines = read_lines(plan.heldout)
    count = min(plan.num_prompts, len(lines))
    chosen = [lines[n * len(lines) // count] for n in range(count)]
    write_text(plan.prompts, "".join(line + "\n" for line in chosen))


def all_stages(plan: Plan, shipped: bool) -> list[Stage]:
    made = [make_data(plan)] if shipped else []
    made += [tune(plan), answer(plan), adapt(plan), generate(plan)]
    if plan.head is not None:
        base = ("--quantization", plan.quantization)
        made.append(bench(plan, "bench_base", "given head, base", base, plan.head))
        made.append(bench(plan, "bench_given", "given head, tuned target", plan.tuned, plan.head))
    made.append(
        bench(plan, "bench_adapted", "adapted head, tuned target", plan.tuned, plan.adapted_head)
    )
    for name, head in (("given", plan.head), ("adapted", plan.adapted_head)):
        if head is not None:
            made.append(bench(plan, f"exact_{name}", f"{name} head in fp32", plan.tuned, head))
    return made


def make_data(plan: Plan) -> Stage:
    folder = plan.output / "data"
    return Stage(
        "data",
        "data: functions of the standard library, and a card of each as JSON",
        ("-m", "train.finetune", "data", "--output", str(folder)),
        (plan.data, plan.heldout),
    )


def tune(plan: Plan) -> Stage:
    command = (
        "-m",
        "train.finetune",
        "sft",
        *plan.on_base,
        "--data_format",
        plan.data_format,
        "--data",
        str(plan.data),
        "--output",
        str(plan.output / "sft"),
        f"data.eval_path={plan.heldout}",
        f"model.quantization={plan.quantization}",
        *plan.sft,
    )
    return Stage(
        "sft",
        "QLoRA fine-tuning",
        command,
        (plan.output / "sft", plan.adapter),
        (plan.data, plan.heldout, *config_files(plan.sft), *base_files(plan)),
        resume=("--resume",),
    )


def answer(plan: Plan) -> Stage:
    command = (
        "-m",
        "train.prepare",
        "regenerate",
        "--data_format",
        plan.data_format,
        "--data",
        str(plan.data),
        *plan.on_base,
        *plan.tuned,
        "--output",
        str(plan.answers),
        "--temperature",
        "0,0.8",
        "--limit",
        str(plan.num_answers),
        "--slots",
        "16",
        "--max_new_tokens",
        str(plan.max_new_tokens),
    )
    return Stage(
        "answers",
        "answers of the tuned model, for the head to learn from",
        command,
        (plan.answers.parent, plan.answers),
        (plan.data, plan.adapter, *base_files(plan)),
        resume=(),
    )


def adapt(plan: Plan) -> Stage:
    start = () if plan.head is None else ("--init_head", str(plan.head))
    command = (
        "-m",
        "train.main",
        *plan.on_base,
        "--data_format",
        plan.data_format,
        "--data",
        str(plan.answers),
        *plan.tuned,
        *start,
        "--output",
        str(plan.output / "head"),
        f"data.eval_path={plan.heldout}",
        *plan.head_training,
    )
    inputs = (
        plan.answers,
        plan.adapter,
        *config_files(plan.head_training),
        *base_files(plan),
        *((plan.head,) if plan.head else ()),
    )
    what = "draft head from scratch for" if plan.head is None else "draft head, adapted to"
    return Stage(
        "head",
        f"{what} the tuned target",
        command,
        (plan.output / "head", plan.adapted_head),
        inputs,
        resume=("--resume",),
    )


def generate(plan: Plan) -> Stage:
    out = plan.output / "generations.jsonl"
    command = (
        "-m",
        "inference.generate",
        *plan.on_base,
        *plan.tuned,
        "--head",
        str(plan.adapted_head),
        "--prompts",
        str(plan.prompts),
        "--output",
        str(out),
        "--tree",
        plan.tree,
        "--batch_size",
        "4",
        "--max_new_tokens",
        str(plan.max_new_tokens),
    )
    inputs = (plan.prompts, plan.adapter, plan.adapted_head, *base_files(plan))
    return Stage("generate", "eagenerate on held-out prompts", command, (out,), inputs)


def bench(plan: Plan, name: str, title: str, served: tuple[str, ...], head: Path) -> Stage:
    """`exact_…` asks in fp32 whether stock `generate` says the same, token for token; the others
    how fast it is.
    """
    out = plan.output / f"{name}.json"
    if name.startswith("exact"):
        how = ("--engines", "hf,eagle", "--dtype", "float32", "--repeats", "1")
    else:
        how = ("--engines", "hf,vanilla,eagle", "--repeats", str(plan.repeats))
    command = (
        "-m",
        "inference.bench",
        *plan.on_base,
        *served,
        "--head",
        str(head),
        "--prompts",
        str(plan.prompts),
        "--num_prompts",
        str(plan.num_prompts),
        *how,
        "--tree",
        plan.tree,
        "--max_new_tokens",
        str(plan.max_new_tokens),
        "--json",
        str(out),
    )
    tuned = (plan.adapter,) if "--adapter" in served else ()
    return Stage(
        name,
        f"benchmark: {title}",
        command,
        (out,),
        (plan.prompts, head, *tuned, *base_files(plan)),
    )


def base_files(plan: Plan) -> tuple[Path, ...]:
    """A base that lies on this disk; a hub id is told by its name, which stands in the command."""
    from eagle.loading import EMBEDDED

    if plan.base is None:
        return (EMBEDDED / "model.safetensors", EMBEDDED / "tokenizer.json")
    return (Path(plan.base),) if Path(plan.base).is_dir() else ()


def config_files(words: tuple[str, ...]) -> tuple[Path, ...]:
    """The file behind `--config NAME`: the settings of a stage decide what it writes."""
    if "--config" not in words:
        return ()
    name = words[words.index("--config") + 1]
    presets = Path(configs.__file__).parent / "presets"
    found = (Path(name), presets / f"{name}.yaml", presets / "finetune" / f"{name}.yaml")
    return tuple(path for path in found if path.is_file())


if __name__ == "__main__":
    cli.main(pipeline, name="python -m examples.pipeline")
