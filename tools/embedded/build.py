"""The embedded model's data sets, and the head trained on what the model itself says."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from eagle.errors import EagleError
from eagle.files import atomic_write_text
from records import load_tokenizer
from records.prompts import render

from .corpus import KINDS, SourceFile, prompt_of, records, split, stdlib_files
from .pretrain import FORMATS

SHARES = {"code": 0.45, "fim": 0.25, "instruction": 0.16, "chat": 0.14}  # of rows that people wrote


def write_jsonl(path: Path, rows: list[dict]) -> int:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def some(files: list[SourceFile], kind: str, count: int, seed: str) -> list[dict]:
    return list(itertools.islice(records(files, kind, random.Random(f"{seed}-{kind}")), count))


def prompts_in_turn(files: list[SourceFile], count: int, seed: str) -> list[dict]:
    """`count` prompts of each kind, kinds in turn."""
    rng = random.Random(seed)
    columns = [[prompt_of(row, rng) for row in some(files, kind, count, seed)] for kind in KINDS]
    return [row for turn in itertools.zip_longest(*columns) for row in turn if row]


def datasets(
    *,
    out: str,
    root: str | None = None,
    count: int = 2500,
    heldout: int = 200,
    prompts: int = 20,
    seed: int = 0,
) -> None:
    """Write {chat,fim,instruction}.jsonl, heldout_*.jsonl and prompts.jsonl to --out; prints the
    counts. Deterministic for one standard library."""
    train, held = split(stdlib_files(root))
    counts = {}
    for kind in ("chat", "fim", "instruction"):
        for name, files, many in ((kind, train, count), (f"heldout_{kind}", held, heldout)):
            rows = some(files, kind, many, f"{seed}-{name}")
            counts[name] = write_jsonl(Path(out) / f"{name}.jsonl", rows)
    rows = prompts_in_turn(held, prompts, f"{seed}-prompts")
    counts["prompts"] = write_jsonl(Path(out) / "prompts.jsonl", rows)
    print(json.dumps(counts))


def heads(
    *, out: str, minutes: float = 20.0, rows: int = 4416, root: str | None = None, seed: int = 0
) -> None:
    """Let the target in --out answer prompts, train an EAGLE-3 head on the answers, put it in
    OUT/heads.

    A head drafts what the target would say, so the target says it: prompts of all kinds from the
    training files, continued half greedily and half at temperature 0.8. Two thirds as many rows
    are taken from the files as they are, so that the head also knows text that the target did not
    write.
    """
    folder = Path(out)
    if not (folder / "model.safetensors").exists():
        raise EagleError(f"no model in {out}; run `python -m tools.embedded pretrain --out {out}`")
    files, _ = split(stdlib_files(root))
    work, tokenizer = folder / "work", load_tokenizer(out)
    asked = prompts_in_turn(files, -(-rows // len(KINDS)), f"heads-{seed}")
    random.Random(seed).shuffle(asked)  # kinds come in turn, as temperatures will
    ids = [{"input_ids": render(tokenizer, record).ids[:224]} for record in asked]
    write_jsonl(work / "prompts.jsonl", ids)
    own = work / "own_answers.jsonl"
    run(
        f"train.prepare regenerate --base {folder} --data_format tokenized --slots 64 "
        f"--data {work / 'prompts.jsonl'} --output {own} --temperature 0,0.8 "
        f"--max_new_tokens 160 --seed {seed}"
    )
    sources = [f"{{format: tokenized, path: {own}, weight: 1.5}}"]
    for kind, share in SHARES.items():
        path = work / f"{kind}.jsonl"
        write_jsonl(path, some(files, kind, round(rows * 2 / 3 * share), f"corpus-{seed}"))
        sources.append(f"{{format: {FORMATS[kind]}, path: {path}, weight: {share}}}")
    run(
        f"train.main --base {folder} --config embedded_head --output {work / 'head'} "
        f"train.time_budget_minutes={minutes} train.seed={seed} loss.tokens=all",
        f"data.mixture=[{', '.join(sources)}]",
    )
    final = folder / "heads" / "eagle3"
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(work / "head" / "head", final)
    print(f"head: {final}")


def run(command: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", *command.split(), *overrides], check=True)
