"""`python -m train.inspect`: see what a data set teaches before training on it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from configs import ConfigError, HeadTrainConfig, load_config
from configs.cli import main
from eagle.errors import EagleError

if TYPE_CHECKING:
    from rich.console import Console

    from records import TokenizedData

SUPERVISED = "bold green"
CONTEXT = "dim"


def inspect(
    *overrides: str,
    data_format: str | None = None,
    data: str | None = None,
    base: str | None = None,
    config: str | None = None,
    num: int = 3,
    split: str = "train",
    color: str = "auto",
) -> int:
    """Show samples of a data set with the supervised tokens coloured, and what is wrong with it.

    data_format: fim (default), chat, instruction, plain, tokenized or mixed.
    data:        your file(s), comma separated; without it, the shipped data set of that format.
    base:        model whose tokenizer is used; without it, the embedded model.
    config:      YAML file or preset name; section.key=value overrides come after it.
    num:         samples to show.     split: train or eval.     color: auto, always or never.
    """
    console = make_console(color)
    if split not in ("train", "eval"):
        raise ConfigError(f"--split={split}: must be train or eval")
    if num < 0:
        raise ConfigError(f"--num={num}: must be 0 or more")
    flags = {"data.format": data_format, "data.path": data, "model.base": base}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)

    from records import load_dataset_for, load_tokenizer

    tokenizer = load_tokenizer(cfg.model.base)
    lenient = cfg.data.model_copy(update={"max_bad_fraction": 1.0})
    loaded = load_dataset_for(lenient, tokenizer, split=split)
    print_header(console, loaded, cfg)
    step = max(1, len(loaded) // num) if num else 1
    for index in range(0, min(len(loaded), num * step), step):
        print_sample(console, loaded[index], index, tokenizer)
    print_bad(console, loaded)
    records, bad = loaded.stats["records"], loaded.stats["bad"]
    if bad > cfg.data.max_bad_fraction * records:
        raise EagleError(
            f"{bad} of {records} rows are unusable: training would stop, because that is more than "
            f"data.max_bad_fraction={cfg.data.max_bad_fraction:g}; repair them or raise the limit"
        )
    return 0


def make_console(color: str) -> Console:
    """color: auto, always or never."""
    if color not in ("auto", "always", "never"):
        raise ConfigError(f"--color={color}: must be auto, always or never")
    from rich.console import Console

    return Console(
        force_terminal={"always": True, "never": False}.get(color),
        no_color=True if color == "never" else None,
        highlight=False,
        soft_wrap=True,
    )


def print_header(console: Console, loaded: TokenizedData, cfg: HeadTrainConfig) -> None:
    stats = loaded.stats
    share = stats["supervised_tokens"] / stats["tokens"]
    console.print(f"[bold]{cfg.data.format}[/bold] from {', '.join(map(str, loaded.paths))}")
    console.print(
        f"{stats['rows']} rows, {stats['tokens']} tokens, {stats['supervised_tokens']} supervised "
        f"({share:.1%}), {stats['truncated']} truncated to {cfg.data.max_length} tokens, "
        f"{stats['bad']} of {stats['records']} records bad"
        + (" (from the cache)" if loaded.cache_hit else "")
    )
    console.print(f"[{SUPERVISED}]supervised tokens[/], [{CONTEXT}]context[/]")


def print_sample(console: Console, row: dict[str, Any], index: int, tokenizer: Any) -> None:
    """One row; without colour, supervised runs stand between ⟦ and ⟧."""
    from rich.text import Text

    mask = row["loss_mask"]
    console.rule(f"row {index}: {row['format']}, {len(mask)} tokens, {sum(mask)} supervised")
    text = Text()
    for supervised, ids in _runs(row["input_ids"], mask):
        piece = tokenizer.decode(ids, skip_special_tokens=False)
        if not supervised:
            text.append(piece, CONTEXT)
        elif console.color_system is None or console.no_color:
            text.append(f"⟦{piece}⟧")
        else:
            text.append(piece, SUPERVISED)
    console.print(text)


def print_bad(console: Console, loaded: TokenizedData) -> None:
    """Reasons with counts, the first rows of each, and what to do."""
    from rich.markup import escape

    bad = loaded.bad_rows
    if not bad:
        return
    console.rule(f"{len(bad)} bad rows")
    for reason, count in Counter(row.reason for row in bad).most_common():
        rows = [row for row in bad if row.reason == reason]
        console.print(f"[bold red]{count} x {escape(reason)}[/]  to do: {escape(rows[0].remedy)}")
        for row in rows[:3]:
            console.print(escape(f"  {row.where}: {row.message}"))
        if count > 3:
            console.print(f"  and {count - 3} more")


def _runs(ids: list[int], mask: list[int]) -> list[tuple[int, list[int]]]:
    """Neighbouring tokens of one kind, together."""
    runs: list[tuple[int, list[int]]] = []
    for token, supervised in zip(ids, mask, strict=True):
        if not runs or runs[-1][0] != supervised:
            runs.append((supervised, []))
        runs[-1][1].append(token)
    return runs


if __name__ == "__main__":
    main(inspect, name="python -m train.inspect")
