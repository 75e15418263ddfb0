"""The `chat`, `fim` and `instruction` data sets and the held-out prompts, written from the corpus.

Knows records and files; knows nothing of tokens or models. Deterministic for one standard library.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from .corpus import (
    SourceFile,
    chat_record,
    code_windows,
    fim_record,
    functions,
    instruction_record,
    split,
    stdlib_files,
)

WINDOW = 1000  # characters of code around a middle


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    os.replace(part, path)


def records(files: list[SourceFile], kind: str, count: int, rng: random.Random) -> list[dict]:
    """Up to `count` records of a kind. Tests of the interpreter are a third as likely as its
    library.
    """
    files = [f for f in files if not f.path.startswith("test/") or rng.random() < 0.3]
    if kind == "fim":
        pool = [(f, w) for f in files for w in code_windows(f, rng, WINDOW)]
        rng.shuffle(pool)
        found = (fim_record(f, w, rng) for f, w in pool)
        return [
            r for r, _ in zip((r for r in found if r["middle"].strip()), range(count), strict=False)
        ]
    pool = [fn for f in files for fn in functions(f) if len(fn.source) <= 1000]
    rng.shuffle(pool)
    make = chat_record if kind == "chat" else instruction_record
    return [make(fn, rng) for fn in pool[:count]]


def code_prompts(files: list[SourceFile], count: int, rng: random.Random) -> list[dict]:
    """Beginnings of code: some whole lines of a file, then the def line of a function to be
    continued.
    """
    found = []
    for file in files:
        if file.path.startswith("test/"):
            continue
        lines = file.text.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.lstrip().startswith("def ") and line.rstrip().endswith(":") and number > 5:
                start = max(0, number - rng.randint(5, 14))
                found.append({"prompt": "".join(lines[start : number + 1]), "source": file.path})
    rng.shuffle(found)
    return [r for r in found if 100 < len(r["prompt"]) < 900][:count]


def write_datasets(
    out: str | Path,
    root: str | None = None,
    count: int = 2500,
    heldout: int = 200,
    prompts: int = 20,
    seed: int = 0,
) -> dict[str, int]:
    """Write {chat,fim,instruction}.jsonl, heldout_*.jsonl and prompts.jsonl to `out`; returns the
    counts.
    """
    out = Path(out)
    train_files, heldout_files = split(stdlib_files(root))
    counts = {}
    by_kind = {}
    for kind in ("chat", "fim", "instruction"):
        rows = records(train_files, kind, count, random.Random(f"{seed}-{kind}"))
        by_kind[kind] = records(
            heldout_files, kind, heldout, random.Random(f"{seed}-heldout-{kind}")
        )
        write_jsonl(out / f"{kind}.jsonl", rows)
        write_jsonl(out / f"heldout_{kind}.jsonl", by_kind[kind])
        counts[kind], counts[f"heldout_{kind}"] = len(rows), len(by_kind[kind])
    rng = random.Random(f"{seed}-prompts")
    fim = [
        {"prefix": r["prefix"], "suffix": r["suffix"], "source": r["source"]}
        for r in by_kind["fim"]
        if len(r["middle"]) > 60
    ]
    chat = [
        {
            "messages": r["messages"][: 2 * rng.randint(0, (len(r["messages"]) - 1) // 2) + 1],
            "source": r["source"],
        }
        for r in by_kind["chat"]
    ]
    instruction = [
        {"instruction": r["instruction"], "source": r["source"]} for r in by_kind["instruction"]
    ]
    columns = [code_prompts(heldout_files, prompts, rng), fim, instruction, chat]
    rows = [column[i] for i in range(prompts) for column in columns if i < len(column)]
    write_jsonl(out / "prompts.jsonl", rows)
    counts["prompts"] = len(rows)
    return counts
