"""`python -m train.doctor`: are this machine, this target and this data fit for training?"""

from __future__ import annotations

import json as json_format
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from configs.cli import main
from configs.load import load_config
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from train import doctor_machine as machine
from train.doctor_machine import COLOURS, Finding, guarded


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
    """Look at the installation and, where given, at a target, data and a head; exit with 1 on a
    problem. The data is tokenised into the cache that training reads.

    --base, --data, --data_format, --config and section.key=value overrides are as in train.main; a
      part that none of them names is left out. --head: a trained head, checked against the target.
    --num: samples to show, with the supervised tokens coloured. --json FILE: the findings as JSON.
    --color: auto, always or never.
    """
    from train.inspect import make_console

    if num < 0:
        raise EagleError(f"--num={num}: must be 0 or more")
    flags = {"data.format": data_format, "data.path": data, "model.base": base}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    sections = {text.partition(".")[0] for text in overrides}
    with_data = bool(data or data_format or config or "data" in sections)
    with_target = bool(with_data or base or head or sections)
    console, began, findings = make_console(color), time.monotonic(), []
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logger = logging.getLogger("records")
    before = logger.level
    logger.setLevel(logging.ERROR)  # its warnings are findings here
    try:
        for title, found, show in parts(cfg, head, with_target, with_data, num):
            console.rule(title, align="left")
            for finding in found:
                line = f"{finding.level:<8} {finding.check}: {finding.text}"
                console.print(line, style=COLOURS[finding.level], markup=False)
                if finding.remedy:
                    console.print(f"         {finding.remedy}", markup=False)
            if show is not None:
                show(console)
            findings += found
    finally:
        logger.setLevel(before)
    counts = Counter(finding.level for finding in findings)
    seconds = round(time.monotonic() - began, 1)
    console.rule(align="left")
    told = ", ".join(f"{counts[level]} {level}" for level in reversed(COLOURS))
    console.print(f"{told} in {seconds:.0f} s")
    if not with_target:
        console.print("--base MODEL and --data FILE --data_format FORMAT have them checked too")
    if json is not None:
        report = {"findings": [vars(f) for f in findings], "seconds": seconds, "counts": counts}
        try:
            Path(json).expanduser().write_text(json_format.dumps(report, indent=2) + "\n")
        except OSError as error:
            text = f"cannot write {json}: {error.strerror}; choose another --json"
            raise EagleError(text) from error
    return int(counts["problem"] > 0)


def parts(
    cfg: HeadTrainConfig, head: str | None, with_target: bool, with_data: bool, num: int
) -> Iterator[tuple[str, list[Finding], Callable | None]]:
    """(title, findings, what to show below them) of each part, as soon as it is done."""
    found = guarded("versions", machine.versions) + guarded("names", machine.clashes)
    found += guarded("deepspeed", partial(machine.deepspeed, cfg.train.zero))
    found += guarded("device", machine.devices) + guarded("c++", machine.compiler)
    yield "Installation", found, None
    if with_target:
        from train.doctor_target import examine

        yield from examine(cfg, head, with_data, num)


if __name__ == "__main__":
    main(doctor, name="python -m train.doctor")
