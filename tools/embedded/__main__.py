"""Rebuild the embedded model: tokenizer, target, data sets, head.

    python -m tools.embedded pretrain --out runs/embedded --minutes 60
    python -m tools.embedded datasets --out runs/embedded/data
    python -m tools.embedded heads --out runs/embedded --minutes 20
    python -m tools.embedded all --out runs/embedded

The result is a folder like `eagle/embedded/`; it is used with `--base DIR --head DIR/heads/eagle3`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from configs import cli
from configs.errors import ConfigError


def pretrain(
    *,
    out: str,
    minutes: float = 60.0,
    root: str | None = None,
    layers: int = 16,
    hidden: int = 256,
    batch_size: int = 12,
    seed: int = 0,
) -> None:
    """Train tokenizer and target from scratch on the standard library; prints the held-out
    report.
    """
    from .pretrain import PretrainConfig
    from .pretrain import pretrain as run

    if hidden % 64 or hidden < 64 or layers < 4 or minutes <= 0:
        raise ConfigError("hidden must be a multiple of 64, layers at least 4 and minutes above 0")
    heads = hidden // 64
    config = PretrainConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads // 2 if heads % 2 == 0 else heads,
        intermediate=3 * hidden,
        batch_size=batch_size,
        minutes=minutes,
        seed=seed,
    )
    print(json.dumps(run(out, config, root)["heldout"]))


def datasets(*, out: str, root: str | None = None, count: int = 2500, seed: int = 0) -> None:
    """Write the chat, fim and instruction data sets, their held-out twins, and the benchmark
    prompts.
    """
    from .datasets import write_datasets

    print(json.dumps(write_datasets(out, root, count, seed=seed)))


def heads(
    *, out: str, minutes: float = 20.0, rows: int = 4416, root: str | None = None, seed: int = 0
) -> None:
    """Let the target in `out` answer prompts, train an EAGLE-3 head on the answers, put it in
    out/heads.
    """
    from .heads import train_head, write_corpus_rows, write_own_answers

    folder = Path(out)
    if not (folder / "model.safetensors").exists():
        raise ConfigError(
            f"no model in {folder}; run `python -m tools.embedded pretrain --out {folder}` first"
        )
    data = [folder / "work" / "own_answers.jsonl", folder / "work" / "corpus_rows.jsonl"]
    write_own_answers(folder, data[0], count=rows, root=root, seed=seed)
    write_corpus_rows(folder, data[1], count=rows * 2 // 3, root=root, seed=seed)
    head = train_head(
        folder, data, folder / "work" / "head", minutes, (f"train.seed={seed}", "loss.tokens=all")
    )
    final = folder / "heads" / "eagle3"
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(head, final)
    print(f"head: {final}")


def everything(
    *, out: str, minutes: float = 60.0, head_minutes: float = 20.0, root: str | None = None
) -> None:
    """pretrain, datasets and heads, one after the other."""
    pretrain(out=out, minutes=minutes, root=root)
    datasets(out=str(Path(out) / "data"), root=root)
    heads(out=out, minutes=head_minutes, root=root)


COMMANDS = {"pretrain": pretrain, "datasets": datasets, "heads": heads, "all": everything}

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        help_wanted = arguments[:1] in (["-h"], ["--help"])
        print(
            __doc__ if help_wanted else f"error: name a command: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(0 if help_wanted else 2)
    name = arguments[0]
    cli.main(COMMANDS[name], arguments[1:], name=f"python -m tools.embedded {name}")
