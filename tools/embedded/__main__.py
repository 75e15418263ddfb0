"""Rebuild the embedded model: tokenizer, target, data sets, head.

    python -m tools.embedded pretrain --out runs/embedded --minutes 60
    python -m tools.embedded datasets --out runs/embedded/data
    python -m tools.embedded heads --out runs/embedded --minutes 20
    python -m tools.embedded all --out runs/embedded

The result is a folder like `eagle/embedded/`; it is used with `--base DIR --head DIR/heads/eagle3`.
"""

from pathlib import Path

from configs import cli

from .build import datasets, heads
from .pretrain import pretrain


def everything(
    *, out: str, minutes: float = 60.0, head_minutes: float = 20.0, root: str | None = None
) -> None:
    """pretrain, datasets and heads, one after the other."""
    pretrain(out=out, minutes=minutes, root=root)
    datasets(out=str(Path(out) / "data"), root=root)
    heads(out=out, minutes=head_minutes, root=root)


COMMANDS = {"pretrain": pretrain, "datasets": datasets, "heads": heads, "all": everything}

if __name__ == "__main__":
    cli.choose(COMMANDS, __doc__, "python -m tools.embedded")
