"""Hostile programs end inside their limits with the right status, and nothing of them is left.

As root and as an ordinary user, with and without namespaces. `hostile_runs.py` runs and looks.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER))
from hostile_runs import LIARS, NAMES, starter

LIMIT_SECONDS = 1.5 * 10 * 2 + 5  # wall clock, at most ten times stretched, at most one repetition

STATUS = {
    "catches_signals": {"timeout"},
    "closes_descriptors": {"runtime_error"},
    # stopped by the clock where the kernel counts its processes apart, else for their number
    "fork_bomb": {"timeout", "runtime_error"},
    "infinite_output": {"output_limit"},
    "memory_bomb": {"memory"},
    "memory_bomb_family": {"memory"},
    "sleep": {"timeout"},
    "socket_out": {"runtime_error"},
    "writes_gigabytes": {"output_limit"},
    "writes_many_files": {"output_limit"},
}
WAYS = [
    (user, level) for level in ("namespaces", "rlimits") for user in ("the caller", "another user")
]


@functools.cache
def hostile(user, level):
    """The report of hostile_runs.py, or the reason why it cannot be made here."""
    found = starter(user, level)
    if isinstance(found, str):
        return found
    python, identity = found
    command = [python, "-B", str(FOLDER / "hostile_runs.py"), level]
    env, pipes = {"PATH": "/usr/bin:/bin"}, {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd="/", env=env, timeout=600, **pipes, **identity)
    if done.returncode:
        if "no sandbox can be started" in done.stderr and level == "namespaces":
            return done.stderr.splitlines()[-1]
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0].replace(' ', '-')}-{way[1]}")
def report(request):
    found = hostile(*request.param)
    if isinstance(found, str):
        pytest.skip(found)
    root = os.geteuid() == 0 and request.param[0] == "the caller"
    assert found["isolation"]["level"] == request.param[1]
    assert found["isolation"]["user"] == ("nobody" if root else "the caller, without capabilities")
    return found


def test_verdicts_of_the_sandbox(report):
    statuses = {name: run["status"] for name, run in report["runs"].items()}
    assert list(statuses) == NAMES
    assert not {n: s for n, s in statuses.items() if s not in STATUS.get(n, {"ok"})}
    assert all(run["seconds"] < LIMIT_SECONDS for run in report["runs"].values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left(report, name):
    run = report["runs"][name]
    assert run["strays"] == run["traces"] == []
    assert run["zygotes"], "the runner itself did not survive"


def test_no_lie_is_accepted(report):
    """Neither what a liar prints nor what its function returns."""
    assert {name: report["runs"][name]["verdicts"] for name in LIARS} == {
        name: ["wrong", "wrong"] for name in LIARS
    }


def test_nobody_was_reached(report):
    runs = report["runs"]
    assert not runs["socket_out"]["connected"] and runs["socket_out"]["stdout"] == ""
    assert runs["kills_its_parent"]["stdout"] == "still here\n"
    assert runs["leaves_shared_memory"]["stdout"].strip() == "nothing left"
    assert report["precious"], "a file of the caller's was changed"
    assert report["mounts"] and report["left"] == []


def test_the_next_program_runs_as_if_nothing_had_happened(report):
    assert report["fine"]
