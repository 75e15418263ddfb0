"""The Triton kernels on a CPU, in a process of their own: Triton decides at its import whether its own
helpers are interpreted, and by now something may have imported it. What holds of the references is
asked of the kernels there too."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SHARED = ["interpreter", *(f"test_{name}.py" for name in ("choose", "commit_kv", "draft_loss"))]
SHARED += ["test_tree_attention.py"]
# of the references alone; the last is one more number in the code of another case
OTHERS = "no_work or definition or differences or packed or folded or larger or products or focal0.5 or rows-"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_kernels_in_the_interpreter():
    files = [str(FOLDER / name) for name in SHARED]
    options = ["-p", "no:cacheprovider", "-x", "--durations=5", "-k", f"not ({OTHERS})"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options],
        cwd=FOLDER.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "EAGLE_TRITON": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
