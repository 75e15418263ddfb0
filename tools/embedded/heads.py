"""Data for the shipped head, written by the target itself, and the training run over it.

    python -m tools.embedded heads --out DIR --minutes 25

A head drafts what the target would say, so the target says it: prompts of all four kinds from the
training files are continued by the plain engine, half greedily and half at temperature 0.8. About
as many rows are taken from the files as they are, so that the head also knows text that the target
did not write.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from .corpus import (
    chat_record,
    code_windows,
    fim_record,
    functions,
    instruction_record,
    split,
    stdlib_files,
)
from .datasets import write_jsonl
from .pretrain import messages_of, render_fim


def training_prompts(
    tokenizer, root: str | None, count: int, seed: int, longest: int
) -> list[list[int]]:
    """Token ids of `count` prompts of at most `longest` tokens from the training files, kinds in
    turn.
    """
    rng = random.Random(f"heads-{seed}")
    files = [
        f
        for f in split(stdlib_files(root))[0]
        if not f.path.startswith("test/") or rng.random() < 0.3
    ]
    fns = [fn for f in files for fn in functions(f)]
    windows = [(f, w) for f in files for w in code_windows(f, rng, 1000)]
    rng.shuffle(fns)
    rng.shuffle(windows)

    def chat(messages: list[dict]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, verbose=False).input_ids

    def code(i: int) -> list[int]:
        ids = tokenizer(windows[i % len(windows)][1], verbose=False).input_ids
        return ids[: rng.randint(24, longest)]

    def fim(i: int) -> list[int]:
        file, window = windows[(i + len(windows) // 2) % len(windows)]
        record = fim_record(file, window, rng)
        text = f"<|fim_prefix|>{record['prefix']}<|fim_suffix|>{record['suffix']}<|fim_middle|>"
        return tokenizer(text, verbose=False).input_ids

    def instruction(i: int) -> list[int]:
        record = instruction_record(fns[i % len(fns)], rng)
        return chat([{"role": "user", "content": record["instruction"]}])

    def question(i: int) -> list[int]:
        messages = chat_record(fns[(i + len(fns) // 2) % len(fns)], rng)["messages"]
        return chat(messages[: 2 * rng.randint(0, (len(messages) - 1) // 2) + 1])

    makers = (code, fim, instruction, question)
    prompts, i = [], 0
    while len(prompts) < count:
        ids = makers[i % 4](i // 4)
        i += 1
        if len(ids) <= longest:
            prompts.append(ids)
    return prompts


def write_own_answers(
    target_dir: str | Path,
    out: Path,
    *,
    count: int,
    new_tokens: int = 160,
    longest: int = 224,
    slots: int = 64,
    root: str | None = None,
    seed: int = 0,
) -> int:
    """Prompts of all four kinds, continued by the target in `out`: tokenised rows whose answers are
    supervised, with their data card. A killed run goes on. Returns the number of rows."""
    from configs.schema import DataConfig
    from eagle.loading import load_tokenizer
    from train.prepare.answering import Sampling
    from train.prepare.regenerate import open_local, regenerate

    prompts = training_prompts(load_tokenizer(str(target_dir)), root, count, seed, longest)
    random.Random(seed).shuffle(prompts)  # kinds came in turn, as temperatures will
    path = out.with_name("prompts.jsonl")
    write_jsonl(path, [{"input_ids": ids} for ids in prompts])
    cfg = DataConfig(format="tokenized", path=str(path))
    sampling = Sampling((0.0, 0.8), max_new_tokens=new_tokens)
    parts = open_local(cfg, sampling, str(target_dir), slots=slots)
    return regenerate([path], out, *parts, sampling, seed)["counts"]["written"]


def write_corpus_rows(
    target_dir: str | Path, out: Path, *, count: int, root: str | None = None, seed: int = 0
) -> int:
    """Tokenised rows of the training files as people wrote them: code, FIM, instructions and
    chats.
    """
    from eagle.loading import load_tokenizer

    tokenizer = load_tokenizer(str(target_dir))
    rng = random.Random(f"corpus-{seed}")
    files, _ = split(stdlib_files(root))
    files = [f for f in files if not f.path.startswith("test/") or rng.random() < 0.3]
    windows = [(f, w) for f in files for w in code_windows(f, rng, 1000)]
    fns = [fn for f in files for fn in functions(f)]
    rng.shuffle(windows)
    rng.shuffle(fns)

    def chat(messages: list[dict]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False)

    plain, fim = round(count * 0.45), round(count * 0.25)
    half = len(fns) // 2
    texts = [w for _, w in windows[:plain]]
    texts += [render_fim(fim_record(f, w, rng), spm=False) for f, w in windows[plain : plain + fim]]
    instructions, chats = round(count * 0.16), round(count * 0.14)
    texts += [chat(messages_of(instruction_record(fn, rng))) for fn in fns[:half][:instructions]]
    texts += [chat(chat_record(fn, rng)["messages"]) for fn in fns[half:][:chats]]
    rng.shuffle(texts)
    rows = [tokenizer(text, verbose=False).input_ids[:384] for text in texts]
    write_jsonl(
        out, [{"input_ids": r, "loss_mask": [0] + [1] * (len(r) - 1)} for r in rows if len(r) > 8]
    )
    return len(rows)


def train_head(
    target_dir: str | Path,
    data: list[Path],
    output: Path,
    minutes: float,
    overrides: tuple[str, ...] = (),
) -> Path:
    """Run `python -m train.main` over the rows; returns the folder of the finished head."""
    command = [
        sys.executable,
        "-m",
        "train.main",
        "--base",
        str(target_dir),
        "--data_format",
        "tokenized",
        "--data",
        ",".join(map(str, data)),
        "--output",
        str(output),
        "--config",
        "embedded_head",
        f"train.time_budget_minutes={minutes}",
        *overrides,
    ]
    subprocess.run(command, check=True, env=os.environ.copy())
    return output / "head"
