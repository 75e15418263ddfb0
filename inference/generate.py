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
    quantization: str = "none",
    engine: str = "eagle",
    tree: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 0.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: str | None = None,
    batch_size: int = 1,
    output: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    compile: str = "auto",
) -> int:
    """Generate losslessly with a draft head. Text goes to stdout, statistics to stderr.

    --prompt TEXT (with --chat through the chat template), or --prefix with --suffix to fill in the
    middle, or --prompts FILE (JSONL; one completion a line goes to --output or stdout). "-" reads
    the prompt from stdin. Without --base and --head the embedded model is used. --engine vanilla
    turns drafting off.

    With --prompts, --batch_size rows run at a time and the next prompt takes the place of one that
    is done; line i uses seed + i. A prompt that cannot be served gets a record with its line and
    "error", the others go on, and the exit status is 1.

    --tree total_token,depth,top_k, or auto: in each cycle the tree that was seen to make most
    tokens a second. --compile off, auto (off on a CPU) or max (compiled once, and kept on disk).
    --adapter a LoRA folder on the base, --quantization none, nf4, int8 or int8_cpu.
    """
    from transformers import TextStreamer

    from eagle.errors import EagleError
    from eagle.model import MODES
    from records.prompts import chat_prompt, fim_prompt, load_prompts, text_prompt

    if sum(given is not None for given in (prompt, prefix, prompts)) != 1:
        raise EagleError(
            "give exactly one of --prompt TEXT, --prefix TEXT --suffix TEXT, or --prompts FILE"
        )
    if suffix is not None and prefix is None:
        raise EagleError("--suffix goes with --prefix TEXT")
    for name, value, known in (
        ("engine", engine, ("eagle", "vanilla")),
        ("compile", compile, MODES),
    ):
        if value not in known:
            raise EagleError(f"unknown {name} {value!r}; use {', '.join(known)}")
    if batch_size < 1:
        raise EagleError(f"batch_size must be at least 1, not {batch_size}")
    if output is not None:
        if prompts is None:
            raise EagleError("--output goes with --prompts FILE; a single prompt is printed")
        require_writable(Path(output))
    model = load_model(base, head, adapter, tree, dtype, device, compile, quantization=quantization)
    if engine == "eagle" and model.drafter is None:
        raise EagleError("no draft head: give --head PATH, or --engine vanilla")
    tokenizer = model.tokenizer
    options = dict(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop_strings=stop,
        draft=engine == "eagle",
    )
    if prompts is not None:
        loaded = load_prompts(prompts, tokenizer)
        prepare(model, engine)
        return complete_file(model, loaded, options, batch_size, output)
    text = sys.stdin.read() if prompt == "-" else prompt
    if text is None:
        ids = fim_prompt(tokenizer, prefix, suffix or "")
    elif chat:
        ids = chat_prompt(tokenizer, [{"role": "user", "content": text}])
    else:
        ids = text_prompt(tokenizer, text)
    prepare(model, engine)
    started = time.perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (row,) = model.generate([ids], streamer=streamer, **options).rows
    seconds, tokens = time.perf_counter() - started, len(row.tokens)
    print(
        f"[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s, "
        f"tau {row.tau:.2f}, ended by {row.finish_reason}]",
        file=sys.stderr,
    )
    return 0


def load_model(base, head, adapter, tree, dtype, device, compile="auto", quantization="none"):
    """The EaModel that the command line asks for. tree: "total_token,depth,top_k" or "auto"."""
    from transformers.utils import logging

    from eagle import EaModel, TreeShape

    shape = TreeShape.parse(tree) if tree and tree != "auto" else tree or None
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    loading = {"dtype": dtype, "device": device, "quantization": quantization}
    return EaModel.from_pretrained(
        base, head, adapter_path=adapter, compile=compile, tree=shape, **loading
    )


def prepare(model, engine: str) -> None:
    """Compile before the clock starts, and say how long it took."""
    seconds = model.prepare(draft=engine == "eagle")
    if seconds:
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"[compiled or loaded: {parts}]", file=sys.stderr)


def complete_file(model, prompts, options: dict, batch_size: int, output: str | None) -> int:
    """Completions are written in the order of the file, all or nothing. Returns the exit status."""
    from eagle.files import atomic_write_text
    from eagle.meter import Meter

    # the longest first: rows in flight are of similar length, and what runs alone at the end is
    # short
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    records: list[dict] = [{}] * len(prompts)
    seed = options.pop("seed")
    seeds = None if seed is None else [seed + i for i in order]
    started, tokens, failed = time.perf_counter(), 0, []
    done = model.generate_many(
        [prompts[i].ids for i in order], slots=batch_size, as_completed=True, seed=seeds, **options
    )
    with Meter("generated", len(prompts)) as meter:
        for place, row in done:
            i = order[place]
            records[i] = {
                "prompt": prompts[i].record,
                "completion": model.tokenizer.decode(row.tokens, skip_special_tokens=True),
                "new_tokens": len(row.tokens),
                "finish_reason": row.finish_reason,
                "tau": round(row.tau, 3),
            }
            if row.error is not None:
                line = int(prompts[i].where.rpartition(":")[2])
                records[i] |= {"error": str(row.error), "line": line}
                failed.append(i)
            tokens += len(row.tokens)
            meter.add(1, len(row.tokens))
    rate = tokens / (time.perf_counter() - started)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if output is None:
        sys.stdout.write(text)
    else:
        atomic_write_text(output, text)
    good = len(prompts) - len(failed)
    print(f"{good} completions, {tokens} tokens, {rate:.1f} tokens/s", file=sys.stderr)
    for i in sorted(failed):
        print(f"{prompts[i].where} failed: {records[i]['error']}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {len(prompts)} requests failed", file=sys.stderr)
    return 1 if failed else 0


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work is done."""
    from eagle.errors import EagleError

    folder = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EagleError(f"{path} cannot be written; give a file name in a folder that is yours")


if __name__ == "__main__":
    cli.main(generate, name="python -m inference.generate")
