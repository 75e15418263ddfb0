"""Run every hostile program at one level and look, from the host, for what it left.

    python hostile_runs.py LEVEL      one line of JSON: {"isolation", "runs": {name: …}, …}

A script, so that it can be started as another user; it needs nothing but the package and the
standard library. The interpreter that runs the programs is started through a link of a unique name,
which every process that it forks shows in its command line: so stray ones are found, whoever their
parent is by then.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from inference.evaluation.judge import Suite, make_job
from inference.evaluation.sandbox import Job, Limits, Program, Sandbox

NOBODY = 65534
SOURCE = Path(__file__).with_name("hostile_programs.py").read_text()
NAMES = [line[4:-3] for line in SOURCE.splitlines() if line.startswith("def ")]
LIARS = ("patches_runner", "forges_result")
LIMITS = Limits(0.5, 1.5, memory_bytes=96 << 20, output_bytes=1 << 20, file_bytes=4 << 20)


@functools.cache
def starter(user, level):
    """An interpreter, and what makes `subprocess` start it as "the caller" or as "another user"; or
    the reason why there is none. Root's programs at "rlimits" run as uid 65534, and see all files.
    """
    nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    identity = {} if user == "the caller" else nobody
    if os.geteuid():
        return "only root can start a process as another user" if identity else (sys.executable, {})
    if not identity and level == "namespaces":
        return sys.executable, {}
    if identity and os.stat(ROOT).st_mode & 0o005 != 0o005:
        return "the checkout cannot be read by another user"
    check = "import sys, colorsys; sys.exit(sys.version_info < (3, 10))"
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(PermissionError, FileNotFoundError):
            command = [path, "-I", "-c", check]
            if not subprocess.run(
                command, cwd="/", env={}, capture_output=True, **nobody
            ).returncode:
                return path, identity
    return "no interpreter here that uid 65534 can read"


def tagged(tag):
    """Processes whose command line has `tag`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended
            if tag.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def traces(folders):
    """Files, shared memory and IPC objects of theirs."""
    places = [Path(place) for place in ("/tmp", "/var/tmp", "/dev/shm", "/", "/usr")]
    found = [str(path) for place in places for path in place.glob("hostile-left*")]
    found += [str(path) for folder in folders for path in Path(folder).glob("*")]
    for kind in ("shm", "sem", "msg"):
        lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        found += [f"{kind} {line}" for line in lines if line.split()[:1] == [str(0x48535431)]]
    return found


def run_one(sandbox, name, given, server):
    code = f"{SOURCE}\n{name}()\n"
    started = time.monotonic()
    [outcome] = sandbox.run(Program(code), [given])
    seconds = time.monotonic() - started
    connected = True
    try:
        server.accept()
    except BlockingIOError:
        connected = False
    suites = (Suite([given], ["42"]), Suite([[1]], [["wanted"]], "answer"))
    jobs = [make_job(code, suite) for suite in suites if name in LIARS]
    return {
        "status": outcome.status,
        "detail": outcome.detail,
        "seconds": seconds,
        "stdout": outcome.stdout.decode("utf-8", "replace")[:200],
        "verdicts": [job.observe.verdict().status for job, _ in sandbox.map(jobs)],
        "connected": connected,
    }


def main(level):
    tag = f"py-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o755)
        server.setblocking(False)
        link, victim = Path(folder, tag), Path(folder, "victim")
        link.symlink_to(os.path.realpath(sys.executable))
        victim.mkdir()
        if os.geteuid() == 0:  # the user that programs run as has every right to it
            os.chown(victim, NOBODY, NOBODY)
        precious = victim / "precious"
        precious.write_text("precious")
        precious.chmod(0o666)
        inputs = {"socket_out": str(server.getsockname()[1]), "deletes_above": str(victim)}
        mounts = Path("/proc/self/mountinfo").read_text()
        sandbox = Sandbox(LIMITS, 2, level, allow_code_execution=True, python=str(link))
        scratch = [worker.scratch for worker in sandbox.workers if worker.scratch]
        report = {"isolation": sandbox.isolation, "runs": {}}
        calm = tagged(tag)
        for name in NAMES:
            run = run_one(sandbox, name, inputs.get(name, ""), server)
            after = tagged(tag)
            left = {"strays": [p for p in after if p not in calm], "traces": traces(scratch)}
            report["runs"][name] = {**run, **left, "zygotes": after == calm}
        # and a good program still runs as if nothing had happened, on every worker
        jobs = [Job(Program("print(input())"), ["fine"] * 3) for _ in range(4)]
        report["fine"] = all(o.stdout == b"fine\n" for _, os_ in sandbox.map(jobs) for o in os_)
        sandbox.close()
        report["precious"] = precious.exists() and precious.read_text() == "precious"
        report["left"] = [*tagged(tag), *traces([]), *filter(os.path.exists, scratch)]
        report["mounts"] = Path("/proc/self/mountinfo").read_text() == mounts
        for pid in tagged(tag):  # where a test fails, it fails without consequences
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in filter(os.path.isfile, traces([])):
            os.remove(path)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
