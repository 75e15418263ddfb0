"""Tests of the Triton kernels on a CPU. They run in the process that `test_interpreter.py` starts,
which has TRITON_INTERPRET=1 before anything imports triton; elsewhere this folder is not
collected."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
