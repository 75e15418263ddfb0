"""`interpreter/` holds tests of the Triton kernels on a CPU. They run in the process that
`test_interpreter.py` starts, which has TRITON_INTERPRET=1 before anything imports triton."""

import inspect
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
    """Less work for the interpreter, and several blocks a row. It patches triton.language anew in
    every call of a device function, as long as that takes: once a kernel is enough."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch, none = (getattr(interpreter, x, None) for x in ("_patch_lang", "_LangPatchScope"))
    if patch and none:  # names of triton's own

        def patch_once(fn):
            language = interpreter.tl, interpreter.tl.core
            used = [m for m in filter(inspect.ismodule, fn.__globals__.values()) if m in language]
            as_it_was = any(interpreter.tl.core.is_builtin(m.load) for m in used)
            return patch(fn) if as_it_was else none()

        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr("kernels.triton_choose.BLOCK", 256)
    monkeypatch.setattr("kernels.triton_choose.SETTLE_BLOCK", 512)
    monkeypatch.setattr("kernels.triton_draft_loss.BLOCK", 64)
