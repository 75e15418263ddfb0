"""`python -m train.report RUN`: the page of a training run, finished or not."""

from __future__ import annotations

from pathlib import Path

from configs.cli import main
from eagle.errors import EagleError


def report(*run: str, out: str | None = None) -> int:
    """Write RUN/report.html anew, from the files that the run left.

    RUN: the folder that --output named.   out: another file to write.
    """
    from train.tracking.report import write_report

    if len(run) != 1:
        raise EagleError("give one run folder: python -m train.report runs/head-fim")
    try:
        print(write_report(Path(run[0]).expanduser(), Path(out).expanduser() if out else None))
    except OSError as error:
        raise EagleError(f"cannot write {out or run[0]}: {error}; choose another --out") from error
    return 0


if __name__ == "__main__":
    main(report, name="python -m train.report")
