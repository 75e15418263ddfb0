"""`interpreter/` holds tests of the Triton kernels on a CPU. They run in the process that
`test_interpreter.py` starts, which has TRITON_INTERPRET=1 before anything imports triton."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # kernel_helpers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore = ["interpreter"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Less work for the interpreter, and several blocks a row."""
    if INTERPRETED:
        monkeypatch.setattr("kernels.triton_choose.BLOCK", 256)
        monkeypatch.setattr("kernels.triton_choose.SETTLE_BLOCK", 512)
        monkeypatch.setattr("kernels.triton_draft_loss.BLOCK", 64)
