"""Rebuild the embedded model: tokenizer, target, data sets, head.

    python -m tools.embedded pretrain --out runs/embedded --minutes 60
    python -m tools.embedded datasets --out runs/embedded/data
    python -m tools.embedded heads --out runs/embedded --minutes 20
    python -m tools.embedded all --out runs/embedded

The result is a folder like `eagle/embedded/`; it is used with `--base DIR --head DIR/heads/eagle3`.
"""

from __future__ import annotations

import json
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
    config = PretrainConfig(
        layers=layers, hidden=hidden, batch_size=batch_size, minutes=minutes, seed=seed
    )
    print(json.dumps(run(out, config, root)["heldout"]))


def datasets(*, out: str, root: str | None = None, count: int = 2500, seed: int = 0) -> None:
    """Write the chat, fim and instruction data sets, their held-out twins, and the benchmark
    prompts.
    """
    from .build import write_datasets

    print(json.dumps(write_datasets(out, root, count, seed=seed)))


def heads(
    *, out: str, minutes: float = 20.0, rows: int = 4416, root: str | None = None, seed: int = 0
) -> None:
    """Let the target in `out` answer prompts, train an EAGLE-3 head on the answers, put it in
    out/heads.
    """
    from .build import train_head

    if not (Path(out) / "model.safetensors").exists():
        raise ConfigError(
            f"no model in {out}; run `python -m tools.embedded pretrain --out {out}` first"
        )
    print(f"head: {train_head(Path(out), minutes, rows, root, seed)}")


def everything(
    *, out: str, minutes: float = 60.0, head_minutes: float = 20.0, root: str | None = None
) -> None:
    """pretrain, datasets and heads, one after the other."""
    pretrain(out=out, minutes=minutes, root=root)
    datasets(out=str(Path(out) / "data"), root=root)
    heads(out=out, minutes=head_minutes, root=root)


COMMANDS = {"pretrain": pretrain, "datasets": datasets, "heads": heads, "all": everything}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:] or [""]
    if name not in COMMANDS:
        wanted = name in ("-h", "--help")
        error = f"error: name a command: {', '.join(COMMANDS)}"
        print(__doc__ if wanted else error, file=sys.stderr)
        sys.exit(0 if wanted else 2)
    cli.main(COMMANDS[name], arguments, name=f"python -m tools.embedded {name}")
