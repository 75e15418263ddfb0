"""`python -m train.inspect`: see what a data set teaches before training on it."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from configs import ConfigError, HeadTrainConfig, load_config
from configs.cli import main
from configs.finetune_schema import DpoConfig
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

    data_format: fim (default), chat, instruction, plain, tokenized, mixed or preference.
    data:        your file(s), comma separated; without it, the shipped data set of that format.
    base:        model whose tokenizer is used; without it, the embedded model.
    config:      YAML file or preset name; section.key=value overrides come after it.
    num:         samples to show.     split: train or eval.     color: auto, always or never.
    """
    console = make_console(color)
    if split not in ("train", "eval") or num < 0:
        raise ConfigError(f"--split={split} --num={num}: must be train or eval, and 0 or more")
    flags = {"data.format": data_format, "data.path": data, "model.base": base}
    if data_format == "preference":
        del flags["data.format"]
        cfg = load_config(DpoConfig, config, overrides, flags)
        return inspect_pairs(cfg, num, split, console)
    cfg = load_config(HeadTrainConfig, config, overrides, flags)

    from records import load_dataset_for, load_tokenizer

    tokenizer = load_tokenizer(cfg.model.base)
    lenient = cfg.data.model_copy(update={"max_bad_fraction": 1.0})
    loaded = load_dataset_for(lenient, tokenizer, split=split)
    stats = loaded.stats
    shown, more = loaded.paths[:20], len(loaded.paths[20:])  # source code has thousands
    names = ", ".join(map(str, shown)) + (f" and {more} more" if more else "")
    console.print(f"{cfg.data.format} from {names}", markup=False)
    console.print(
        f"{stats['rows']} rows, {stats['tokens']} tokens, {stats['supervised_tokens']} supervised "
        f"({stats['supervised_tokens'] / stats['tokens']:.1%}), {stats['truncated']} truncated to "
        f"{cfg.data.max_length} tokens, {stats['bad']} of {stats['records']} records bad"
    )
    console.print(f"[{SUPERVISED}]supervised tokens[/], [{CONTEXT}]context[/]")
    print_samples(loaded, num, tokenizer, console)
    return report_bad(loaded.bad_rows, stats["records"], cfg.data.max_bad_fraction, console)


def inspect_pairs(cfg: DpoConfig, num: int, split: str, console: Console) -> int:
    """Each of a pair's answers after their prompt: first the one that is preferred."""
    from records import load_tokenizer
    from records.quarantine import read_rows
    from records.sources import resolve
    from train.finetune.preference import render_pair

    paths = cfg.data.paths if split == "train" else cfg.data.eval_paths
    if not paths:
        raise EagleError("no preferences are shipped: give --data FILE (or data.eval_path)")
    tokenizer = load_tokenizer(cfg.model.base)
    pairs, bad, records = read_rows(
        resolve(paths), lambda record: [render_pair(record, tokenizer, cfg.data)], cfg.data
    )
    console.print(f"preference from {', '.join(paths)}", markup=False)
    console.print(f"{len(pairs)} pairs, {len(bad)} of {records} records bad")
    for pair in pairs[:: max(1, len(pairs) // max(1, num))][:num]:
        sides, asked = [], pair.prompt_ids
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            mask = [0] * len(asked) + [1] * len(ids)
            sides.append({"format": side, "input_ids": asked + ids, "loss_mask": mask})
        print_samples(sides, 2, tokenizer, console)
    return report_bad(bad, records, cfg.data.max_bad_fraction, console)


def report_bad(bad: list, records: int, max_bad_fraction: float, console: Console) -> int:
    if bad:
        console.rule(f"{len(bad)} bad rows")
    for reason, count in Counter(row.reason for row in bad).most_common():
        first = next(row for row in bad if row.reason == reason)
        console.print(f"{count} x {reason}", style="bold red", markup=False)
        console.print(f"  first: {first.where}: {first.message}", markup=False)
        console.print(f"  to do: {first.remedy}", markup=False)
    if len(bad) > max_bad_fraction * records:
        raise EagleError(
            f"{len(bad)} of {records} rows are unusable: training would stop, because that is more "
            f"than data.max_bad_fraction={max_bad_fraction:g}; repair them or raise the limit"
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


def print_samples(
    loaded: TokenizedData | list[dict], num: int, tokenizer: Any, console: Console
) -> None:
    """Rows from all over the data; without colour, supervised runs stand between ⟦ and ⟧."""
    from rich.text import Text

    step = max(1, len(loaded) // num) if num else 1
    for index in range(0, min(len(loaded), num * step), step):
        row, text = loaded[index], Text()
        mask = row["loss_mask"]
        console.rule(f"row {index}: {row['format']}, {len(mask)} tokens, {sum(mask)} supervised")
        for supervised, run in groupby(zip(mask, row["input_ids"], strict=True), itemgetter(0)):
            piece = tokenizer.decode([token for _, token in run], skip_special_tokens=False)
            if not supervised:
                text.append(piece, CONTEXT)
            elif console.color_system is None or console.no_color:
                text.append(f"⟦{piece}⟧")
            else:
                text.append(piece, SUPERVISED)
        console.print(text)


if __name__ == "__main__":
    main(inspect, name="python -m train.inspect")
