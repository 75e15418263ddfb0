"""`interpreter/` holds tests of the Triton kernels on a CPU. They run in the process that
`test_interpreter.py` starts, which has TRITON_INTERPRET=1 before anything imports triton."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # kernel_helpers

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = ["interpreter"]
