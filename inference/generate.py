"""Generate text from one prompt (streamed) or from a file of prompts.

python -m inference.generate --prompt "def add(a, b):"
python -m inference.generate --prefix "def add(a, b):\\n    " --suffix "\\n    return c"
python -m inference.generate --prompts FILE.jsonl --output OUT.jsonl --batch_size 4
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from configs import cli


def generate(
    *,
    prompt: str | None = None,
    prefix: str | None = None,
    suffix: str | None = None,
    prompts: str | None = None,
    chat: bool = False,
    base: str | None = None,
    head: str | None = None,
    adapter: str | None = None,
    engine: str = "eagle",
    tree: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 0.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | None = None,
    batch_size: int = 1,
    output: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> None:
    """Generate losslessly with a draft head. Text goes to stdout, statistics to stderr.

    --prompt TEXT (with --chat through the chat template), or --prefix with --suffix to fill in the middle,
    or --prompts FILE (JSONL; one completion a line goes to --output or stdout). "-" reads the prompt from
    stdin. Without --base and --head the embedded model is used. --engine vanilla turns drafting off.
    """
    from eagle.errors import EagleError

    given = [
        name
        for name, value in (("prompt", prompt), ("prefix", prefix), ("prompts", prompts))
        if value is not None
    ]
    if len(given) != 1:
        raise EagleError(
            "give exactly one of --prompt TEXT, --prefix TEXT --suffix TEXT, or --prompts FILE"
        )
    if suffix is not None and prefix is None:
        raise EagleError("--suffix goes with --prefix TEXT")
    if engine not in ("eagle", "vanilla"):
        raise EagleError(f"unknown engine {engine!r}; use eagle or vanilla")
    if batch_size < 1:
        raise EagleError(f"batch_size must be at least 1, not {batch_size}")
    if output is not None and prompts is None:
        raise EagleError("--output goes with --prompts FILE; a single prompt is printed")
    if output is not None:
        require_writable(Path(output))

    from inference.prompts import Prompt, chat_prompt, fim_prompt, load_prompts, text_prompt

    model = load_model(base, head, adapter, tree, dtype, device)
    if engine == "eagle" and model.drafter is None:
        raise EagleError("no draft head: give --head PATH, or --engine vanilla")
    tokenizer = model.tokenizer
    options = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
        stop_strings=stop, draft=engine == "eagle",
    )  # fmt: skip
    if prompts is not None:
        loaded = load_prompts(prompts, tokenizer)
        complete_file(model, loaded, options, batch_size, output)
        return
    if prompt is not None:
        text = sys.stdin.read() if prompt == "-" else prompt
        ids = (
            chat_prompt(tokenizer, [{"role": "user", "content": text}])
            if chat
            else text_prompt(tokenizer, text)
        )
    else:
        ids = fim_prompt(tokenizer, prefix or "", suffix or "")
    from transformers import TextStreamer

    started = time.perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = model.generate([Prompt(ids, "text", {}).ids], streamer=streamer, **options)
    report(result, time.perf_counter() - started)


def load_model(base, head, adapter, tree, dtype, device):
    """The EaModel that the command line asks for."""
    from transformers.utils import logging

    from eagle import EaModel, TreeShape

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    shape = TreeShape.parse(tree) if tree else None
    return EaModel.from_pretrained(
        base, head, adapter_path=adapter, dtype=dtype, device=device,
        total_token=shape and shape.total_token, depth=shape and shape.depth, top_k=shape and shape.top_k,
    )  # fmt: skip


def complete_file(model, prompts, options: dict, batch_size: int, output: str | None) -> None:
    """Batches of similar length; completions are written in the order of the file, all or nothing."""
    from rich.console import Console
    from rich.progress import track

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    lines: dict[int, str] = {}
    seed = options.pop("seed")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    console = Console(stderr=True)
    started, tokens = time.perf_counter(), 0
    for batch in track(batches, "generating", console=console):
        seeds = None if seed is None else [seed + i for i in batch]
        result = model.generate([prompts[i].ids for i in batch], seed=seeds, **options)
        tokens += result.new_tokens
        for i, row in zip(batch, result.rows, strict=True):
            completion = model.tokenizer.decode(row.tokens, skip_special_tokens=True)
            lines[i] = json.dumps(
                {"prompt": prompts[i].record, "completion": completion, "new_tokens": len(row.tokens),
                 "finish_reason": row.finish_reason, "tau": round(row.tau, 3)},
                ensure_ascii=False,
            )  # fmt: skip
    text = "".join(lines[i] + "\n" for i in range(len(prompts)))
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(Path(output), text)
    seconds = time.perf_counter() - started
    print(
        f"{len(prompts)} completions, {tokens} tokens, {tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work is done."""
    from eagle.errors import EagleError

    folder = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EagleError(
            f"{path} cannot be written; give the name of a file in a folder that is yours"
        )


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def report(result, seconds: float) -> None:
    row = result.rows[0]
    print(
        f"[{len(row.tokens)} tokens in {seconds:.2f} s, {len(row.tokens) / seconds:.1f} tokens/s, "
        f"tau {row.tau:.2f}, ended by {row.finish_reason}]", file=sys.stderr,
    )  # fmt: skip


if __name__ == "__main__":
    cli.main(generate, name="python -m inference.generate")
