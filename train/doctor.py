"""`python -m train.doctor`: are this machine, this target and this data fit for training?"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.cli import main
from configs.load import load_config
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError

if TYPE_CHECKING:
    from rich.console import Console

    from train.checks.data import Sample
    from train.checks.findings import Finding
    from train.checks.model import Subject

COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def doctor(
    *overrides: str,
    base: str | None = None,
    data: str | None = None,
    data_format: str | None = None,
    head: str | None = None,
    config: str | None = None,
    num: int = 2,
    json: str | None = None,
    color: str = "auto",
) -> int:
    """Look at the installation and devices and, where given, at a target, data and a head, in less
    than a minute; exit with 1 on a problem.

    --base, --data, --data_format, --config and section.key=value overrides are as in train.main; a
      part
    that none of them names is left out. --head: a trained head, to be checked against the target.
    --num: samples to show, with the supervised tokens coloured.     --json FILE: the findings as
      JSON.
    color: auto, always or never.
    """
    from train.inspect import make_console

    if num < 0:
        raise EagleError(f"--num={num}: must be 0 or more")
    flags = {"data.format": data_format, "data.path": data, "model.base": base}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    sections = {text.partition(".")[0] for text in overrides}
    with_data = bool(data or data_format or config or "data" in sections)
    with_model = bool(with_data or base or head or sections)
    console = make_console(color)
    began = time.monotonic()
    findings: list[Finding] = []
    for title, found, show in examine(cfg, head, with_model, with_data, num):
        console.rule(title, align="left")
        for finding in found:
            print_finding(console, finding)
        if show is not None:
            show(console)
        findings += found
    seconds = time.monotonic() - began
    print_verdict(console, findings, seconds, with_model)
    if json is not None:
        write_json(Path(json).expanduser(), findings, seconds)
    return int(any(finding.level == "problem" for finding in findings))


def examine(
    cfg: HeadTrainConfig, head: str | None, with_model: bool, with_data: bool, num: int
) -> Iterator[tuple[str, list[Finding], object]]:
    """(title, findings, what to show below them or None) of each part, as soon as it is done."""
    logger = logging.getLogger("records")
    before = logger.level
    logger.setLevel(logging.ERROR)  # its warnings are findings here
    try:
        yield from examine_machine(cfg)
        if with_model:
            yield from examine_target(cfg, head, with_data, num)
    finally:
        logger.setLevel(before)


def examine_machine(cfg: HeadTrainConfig) -> Iterator[tuple[str, list[Finding], object]]:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils.logging import disable_progress_bar

    from train.checks import devices, installation, space
    from train.checks.findings import guarded

    disable_progress_bar()
    found = guarded("versions", installation.versions)
    found += guarded("name clash", installation.clashes)
    found += guarded("deepspeed", partial(installation.deepspeed, cfg.train.zero))
    yield "Installation", found, None
    found = guarded("accelerator", devices.accelerators)
    found += guarded("attention", devices.attention)
    found += guarded("triton", devices.triton)
    found += guarded("c++", devices.compiler)
    yield "Devices", found, None
    yield "Disk", guarded("disk", partial(space.disk, cfg)), None


def examine_target(
    cfg: HeadTrainConfig, head: str | None, with_data: bool, num: int
) -> Iterator[tuple[str, list[Finding], object]]:
    import torch

    from train.checks import data, model, space
    from train.checks.findings import guarded
    from train.head.setup import settle

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = settle(cfg, device)
    subject = model.Subject(cfg.model.base or "embedded")
    formats = data.formats(cfg.data) if with_data else set()
    found = guarded("target", partial(model.target, subject, cfg))
    found += guarded("tokenizer", partial(model.tokens, subject, cfg, formats))
    if head is not None:
        found += guarded("head", partial(model.head, subject, head))
    yield "Target", found, None
    tokens = 0
    if with_data and subject.tokenizer is not None:
        with data.samples(cfg.data, subject.tokenizer) as (sampled, found):
            found += guarded("data", partial(data.held_out_files, cfg.data))
            for sample in sampled:
                found += guarded("data", partial(data.check, sample, subject, cfg))
                tokens += round(sample.rows.stats["tokens"] / max(sample.share, 1e-9))
            if sampled and subject.model is not None:
                found += guarded(
                    "draft vocabulary", partial(data.vocabulary, sampled, subject, cfg)
                )
            show = partial(print_samples, sampled, subject, num) if sampled and num else None
            yield "Data", found, show
    if subject.model is not None:
        yield "Needs", guarded("memory", partial(needs, subject, cfg, tokens, device, space)), None


def needs(subject: Subject, cfg: HeadTrainConfig, tokens: int, device, space) -> Iterator[Finding]:
    import torch

    from eagle.heads.head import make_head, mlp_width

    config = subject.head_config(cfg)
    with torch.device("meta"):
        weights = sum(p.numel() for p in make_head(config).parameters())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    width = mlp_width(subject.text)
    logits = space.LOGITS if device.type == "cpu" else 16 * space.LOGITS
    need = space.MemoryNeed.of(cfg, config, weights, subject.weight_bytes, width, world, logits)
    yield from space.memory(need, device)
    disk = space.DiskNeed.of(cfg, weights, tokens, subject.text.hidden_size)
    yield from space.disk_need(disk, cfg)


def print_finding(console: Console, finding: Finding) -> None:
    from rich.text import Text

    line = Text(f"{finding.level:<8}", COLOURS[finding.level]) + Text(
        f" {finding.check}: {finding.text}"
    )
    if finding.remedy:
        line += Text(f"; {finding.remedy}", "" if finding.level == "note" else "bold")
    console.print(line)


def print_samples(sampled: list[Sample], subject: Subject, num: int, console: Console) -> None:
    """`num` rows in all, spread over the sources."""
    from train.inspect import print_sample

    for n in range(num):
        rows = sampled[n % len(sampled)].rows
        index = (n // len(sampled)) * max(1, len(rows) // max(num, 1)) % len(rows)
        print_sample(console, rows[index], index, subject.tokenizer)


def print_verdict(console: Console, findings: list[Finding], seconds: float, whole: bool) -> None:
    counts = Counter(finding.level for finding in findings)
    parts = [
        f"{counts[level]} {level}{'s' if counts[level] != 1 and level != 'ok' else ''}"
        for level in ("problem", "warning", "note", "ok")
    ]
    console.rule(align="left")
    console.print(f"{', '.join(parts)} in {seconds:.0f} s")
    if not whole:
        console.print("--base MODEL and --data FILE --data_format FORMAT have them checked too")


def write_json(path: Path, findings: list[Finding], seconds: float) -> None:
    from eagle.checkpoint import atomic_write_text

    text = {
        "findings": [vars(finding) for finding in findings],
        "seconds": round(seconds, 1),
        "counts": Counter(finding.level for finding in findings),
    }
    try:
        atomic_write_text(path, json.dumps(text, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise EagleError(f"cannot write {path}: {error.strerror}; choose another --json") from error


if __name__ == "__main__":
    main(doctor, name="python -m train.doctor")
