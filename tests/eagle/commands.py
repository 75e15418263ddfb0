"""Commands as processes of their own, forked from one that has imported torch, transformers and what
most of ours import: a second instead of ten. `warnings` and variables that those read at import need
a real start; so does what tests imports."""

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"]
HEAVY += ["peft", "datasets", "eagle.model", "records.dataset"]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(HEAVY)


class Command:
    """`python -m WORDS` in `cwd`; `environment` is added to this process's, less what makes a rank
    of it."""

    def __init__(self, *words, cwd=ROOT, stdin="", **environment):
        outside = {
            k: v
            for k, v in os.environ.items()
            if not re.fullmatch(r".*RANK|WORLD_SIZE|MASTER_.*", k)
        }
        self.words, self.streams = (
            [*map(str, words)],
            [tempfile.NamedTemporaryFile("w+") for _ in range(3)],
        )
        self.streams[0].write(stdin)
        self.streams[0].flush()
        files = [stream.name for stream in self.streams]
        values = {**outside, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
        self.process = _server.Process(target=_become, args=(self.words, files, values, str(cwd)))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self.words} ran longer than {timeout} s")
        return self.process.exitcode

    def output(self):
        """The finished process."""
        code = self.wait()
        said = [Path(stream.name).read_text() for stream in self.streams[1:]]
        return subprocess.CompletedProcess(self.words, code, *said)


def run(*words, **more):
    return Command(*words, **more).output()


def here(monkeypatch, capsys, module, *words):
    """The same in this process -> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
    code = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code
    out, err = capsys.readouterr()
    return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)


def _become(words, files, values, cwd):
    for number, (name, mode) in enumerate(zip(files, "rww", strict=True)):
        with open(name, mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, m, closefd=False) for n, m in enumerate("rww"))
    os.environ.clear()
    os.environ.update(values)
    os.chdir(cwd)
    sys.path[:0] = [cwd, str(ROOT)]
    sys.argv = ["-m", *words[1:]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
