"""Run every hostile program at one level and look, from the host, for what it left. Run as a
script.

    python hostile_runs.py LEVEL      one JSON line: {"isolation", "runs": {name: …},
    "left_at_the_end"}

A script, so that it can be started as another user; it needs nothing but the package and the
  standard library.
The interpreter that runs the programs is started through a link of a unique name, which every
  process that it
forks shows in its command line: that is how stray ones are found, whoever their parent is by then.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from inference.evaluation.judge import Suite, make_job
from inference.evaluation.sandbox import Job, Limits, Program, Sandbox

NOBODY = 65534
LIMITS = Limits(
    cpu_seconds=0.5,
    wall_seconds=1.5,
    memory_bytes=96 << 20,
    output_bytes=1 << 20,
    file_bytes=4 << 20,
    processes=16,
)
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/", "/usr")


@functools.cache
def readable_python():
    """An interpreter that an ordinary user may run, with a real standard library; or None."""
    candidates = [
        sys.executable,
        *map(shutil.which, ("/usr/bin/python3", "/usr/local/bin/python3")),
    ]
    check = "import sys, colorsys; sys.exit(sys.version_info < (3, 10))"
    for path in filter(None, candidates):
        try:
            done = subprocess.run(
                [path, "-I", "-c", check],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                cwd="/",
                env={},
                capture_output=True,
            )
        except PermissionError:
            continue
        if done.returncode == 0:
            return path
    return None


def tagged(tag: str) -> list[int]:
    """Processes started through our link."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if tag.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
        except OSError:  # it ended
            continue
    return sorted(found)


def traces(scratch: list[str]) -> list[str]:
    """Files, shared memory and IPC objects of theirs."""
    found = [
        f"{place}/{name}"
        for place in PLACES
        if os.path.isdir(place)
        for name in os.listdir(place)
        if name.startswith("hostile-left")
    ]
    found += [str(path) for folder in scratch for path in Path(folder).glob("*")]
    key = str(0x48535431)
    for kind in ("shm", "sem", "msg"):
        lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        found += [f"{kind} {line}" for line in lines if line.split()[:1] == [key]]
    return found


def main(level: str) -> None:
    tag = f"py-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o755)
        link = Path(folder, tag)
        link.symlink_to(os.path.realpath(sys.executable))
        victim = Path(folder, "victim")
        victim.mkdir()
        if os.geteuid() == 0:  # the user that programs run as has every right to it
            os.chown(victim, NOBODY, NOBODY)
        precious = victim / "precious"
        precious.write_text("precious")
        precious.chmod(0o666)
        server.setblocking(False)
        inputs = {"socket_out": str(server.getsockname()[1]), "deletes_above": str(victim)}
        mounts = Path("/proc/self/mountinfo").read_text()
        report = {"runs": {}}
        sandbox = Sandbox(LIMITS, 2, level, allow_code_execution=True, python=str(link))
        scratch = [worker.scratch for worker in sandbox.workers if worker.scratch]
        report["isolation"] = sandbox.isolation
        calm = tagged(tag)
        for path in sorted(Path(__file__).with_name("hostile").glob("*.py")):
            name, code = path.stem, path.read_text()
            started = time.monotonic()
            [outcome] = sandbox.run(Program(code), [inputs.get(name, "")])
            seconds = time.monotonic() - started
            after = tagged(tag)
            try:
                server.accept()
                connected = True
            except BlockingIOError:
                connected = False
            printed = Suite([inputs.get(name, "")], ["42"])
            called = Suite([[1]], [["wanted"]], "answer")
            verdicts = []
            if name in ("exits_early", "patches_runner", "forges_result"):
                for suite in (printed, called):
                    job = make_job(code, suite)
                    list(sandbox.map([job]))
                    verdicts.append(job.observe.result().status)
            report["runs"][name] = {
                "status": outcome.status,
                "detail": outcome.detail,
                "seconds": seconds,
                "stdout": outcome.stdout.decode("utf-8", "replace")[:200],
                "verdicts": verdicts,
                "processes": [pid for pid in after if pid not in calm],
                "traces": traces(scratch),
                "zygotes": after == calm,
                "connected": connected,
            }
        # and a good program still runs as if nothing had happened, on every worker
        jobs = [Job(Program("print(input())"), ["fine"] * 3) for _ in range(4)]
        report["fine"] = all(o.stdout == b"fine\n" for _, os_ in sandbox.map(jobs) for o in os_)
        sandbox.close()
        report["precious"] = precious.exists() and precious.read_text() == "precious"
        report["left_at_the_end"] = [*map(str, tagged(tag)), *traces([])]
        report["left_at_the_end"] += filter(os.path.exists, scratch)
        for pid in tagged(tag):  # where a test fails, it fails without consequences
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in filter(os.path.isfile, report["left_at_the_end"]):
            os.remove(path)
        report["mounts"] = Path("/proc/self/mountinfo").read_text() == mounts
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
