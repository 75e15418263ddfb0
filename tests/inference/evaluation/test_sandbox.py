"""The sandbox as its users see it: outcomes, limits, order, parallel runs, failures of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import pytest
import yaml

from eagle.errors import EagleError
from inference.evaluation import sandbox as sandbox_module
from inference.evaluation.sandbox import STATUSES, Job, Limits, Program, Sandbox, Worker

ROOT = Path(__file__).parents[3]
sys.path.append(str(Path(__file__).parent))
from hostile_runs import starter, tagged

TABLES = yaml.safe_load((ROOT / "tests/data/sandbox.yaml").read_text("utf-8"))
QUICK = Limits(0.5, 1.5, memory_bytes=256 << 20, output_bytes=1 << 20)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(QUICK, workers=2, allow_code_execution=True) as sandbox:
        yield sandbox


def run(sandbox, code, test="", **kwargs):
    [outcome] = sandbox.run(Program(code, **kwargs), [test])
    assert outcome.status in STATUSES
    return outcome


def interpreter(user, level):
    found = starter(user, level)
    return pytest.skip(found) if isinstance(found, str) else found


def run_all(sandbox, rows, fn_name=None):
    """rows of (code, input) -> an outcome each."""
    jobs = [Job(Program(code, fn_name), [given], key=i) for i, (code, given) in enumerate(rows)]
    found = {job.key: outcome for job, [outcome] in sandbox.map(jobs)}
    return [found[i] for i in range(len(rows))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"allow_code_execution": False}, "allow_code_execution"),
        ({"level": "docker"}, "unknown isolation level 'docker'"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"python": "/bin/false"}, "no sandbox can be started here"),
        ({"python": "/nonexistent/python"}, "no sandbox can be started here"),
        ({"platform": "darwin"}, "needs Linux.*darwin"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "platform", arguments.pop("platform", sys.platform))
    with pytest.raises(EagleError, match=message):
        Sandbox(**{"allow_code_execution": True, **arguments})
    assert os.listdir(tmp_path) == []


def test_auto_refuses_where_files_are_open(monkeypatch):
    start = Sandbox._start_at

    def only_rlimits(self, level):
        if level == "namespaces":
            raise OSError("not today")
        start(self, "namespaces")
        self.isolation = {**self.isolation, "level": "rlimits", "files": "open"}

    monkeypatch.setattr(Sandbox, "_start_at", only_rlimits)
    with pytest.raises(EagleError, match="changing your files.*not today"):
        Sandbox(allow_code_execution=True, workers=1)
    with Sandbox(allow_code_execution=True, workers=1, level="rlimits") as sandbox:
        assert sandbox.level == "rlimits"


def test_as_a_fresh_interpreter(sandbox):
    codes = [code for code, _ in TABLES["fresh"]]
    found = run_all(sandbox, [(code, "äöü €\n") for code in codes])
    said = [[c, o.stdout.decode() or o.detail] for c, o in zip(codes, found, strict=True)]
    assert said == TABLES["fresh"]
    assert {o.status for o in found} == {"ok"}
    assert all(0 < o.cpu_seconds < 0.5 and o.seconds > 0 < o.memory_bytes for o in found)


def test_how_programs_end(sandbox):
    ends = [*TABLES["ends"], ("(" * 500 + ")" * 500, "compile_error", "")]
    found = run_all(sandbox, [(code.replace("HERE", repr(__file__)), "") for code, *_ in ends])
    for (code, status, detail), outcome in zip(ends, found, strict=True):
        assert outcome.status == status and detail in outcome.detail, (code, outcome)
        assert outcome.stdout == b"" and outcome.value is None


def test_calls(sandbox):
    calls = [*TABLES["calls"], ("def f():\n    print('noise')\n    return 10**5000", [], 10**5000)]
    found = run_all(sandbox, [(code, arguments) for code, arguments, _ in calls], "f")
    assert [o.value for o in found] == [value for *_, value in calls]
    assert {(o.status, o.stdout) for o in found} == {("ok", b"")}
    found = run_all(sandbox, [(code, []) for code, _ in TABLES["failed_calls"]], "f")
    for (code, detail), outcome in zip(TABLES["failed_calls"], found, strict=True):
        assert outcome.status == "runtime_error" and detail in outcome.detail, (code, outcome)
    program = Program("def f(x: List[int]) -> int: return sum(x)", "f", "from typing import *")
    assert sandbox.run(program, [[[1, 2]]])[0].value == 3


def test_environment_is_not_inherited(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Sandbox(QUICK, workers=1, allow_code_execution=True) as fresh:
        names = set(eval(run(fresh, "import os; print(sorted(os.environ))").stdout))
    threads = {"MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert names <= {"HOME", "LANG", "PATH", "TMPDIR", "LC_CTYPE"} | threads


@pytest.mark.parametrize("flag", [0x10000000, 0x20000, 0x40000000], ids=["user", "mount", "net"])
def test_no_namespaces_of_its_own(sandbox, flag):
    """In one it would have every capability, and could mount memory without a limit."""
    code = f"""
import ctypes, os, platform
libc = ctypes.CDLL(None)
clone = {{"x86_64": 56, "aarch64": 220}}[platform.machine()]
pid = libc.syscall(clone, {flag} | 17, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
print(libc.unshare({flag}), pid)
"""
    assert run(sandbox, code).stdout == b"-1 -1\n"


def test_programs_and_tests_do_not_meet(sandbox):
    code = "import os\nprint(os.listdir('.'), os.getpid() < 10)\nopen('x', 'w')"
    outcomes = sandbox.run(Program(code), ["a", "b"])
    assert outcomes[0].stdout == outcomes[1].stdout and outcomes[0].stdout.startswith(b"[] ")


def test_what_the_caller_does_wrong(sandbox):
    with pytest.raises(ZeroDivisionError):
        list(sandbox.map(1 / 0 for _ in range(9)))
    first = sandbox.map([Job(Program("print(1)"), ["", ""]) for _ in range(3)])
    next(first)
    with pytest.raises(EagleError, match="one map or run at a time"):
        sandbox.run(Program("print(1)"), [""])
    first.close()
    assert run(sandbox, "print(1)").status == "ok", "and the sandbox is of use afterwards"
    own = Sandbox(QUICK, workers=1, allow_code_execution=True)
    process = own.workers[0].process
    own.close()
    own.close()
    assert process.returncode is not None
    with pytest.raises(EagleError, match="closed"):
        own.run(Program(""), [""])


def test_outcomes_keep_the_order_of_tests(sandbox):
    tests = [str(i) for i in range(5)]
    jobs = [Job(Program(f"print(int(input()) + {j})"), tests, key=j) for j in range(7)]
    jobs.append(Job(Program("print(1)"), [], key=7))
    found = {job.key: [int(o.stdout) for o in outcomes] for job, outcomes in sandbox.map(jobs)}
    assert found == {7: [], **{j: [i + j for i in range(5)] for j in range(7)}}


def test_observe_sees_output_and_may_stop(sandbox):
    seen = []

    def observe(index, outcome):
        seen.append((index, outcome.stdout))
        return index == 1

    job = Job(Program("print(input())"), list("abcd"), observe=observe)
    [(same, outcomes)] = sandbox.map([job])
    assert same is job and seen == [(0, b"a\n"), (1, b"b\n")]
    assert [(o.status, o.stdout) for o in outcomes] == [("ok", b"")] * 2
    # and a job's own limits come first
    assert sandbox.run(Program("print(1234)"), [""], Limits(output_bytes=3))[0].stdout == b""


def test_load_is_no_timeout():
    """Four times as many workers as cores: CPU time decides, and the wall clock stretches."""
    cores = len(os.sched_getaffinity(0))
    code = "import time\nwhile time.process_time() < 0.4: pass"
    with Sandbox(Limits(1.0, 1.0), 4 * cores, allow_code_execution=True) as sandbox:
        found = run_all(sandbox, [(code, "")] * 4 * cores)
    assert {o.status for o in found} == {"ok"}


def test_a_near_miss_is_repeated_alone(sandbox, monkeypatch):
    real, running, alone = Worker.run, [], []

    def near_miss(worker, program, *test):
        running.append(program["code"])
        if again := program["code"] == "print(0)" and len(alone) % 2:
            alone.append(list(running))
        found, body = real(worker, program, *test)
        if program["code"] == "print(0)" and not again:
            found.update(near=True, status="timeout")
            alone.append(None)
        running.remove(program["code"])
        return found, body

    monkeypatch.setattr(Worker, "run", near_miss)
    jobs = [Job(Program(f"print({key})"), [""] * 3, key=key) for key in range(5)]
    found = {job.key: outcomes for job, outcomes in sandbox.map(jobs)}
    assert alone == [None, ["print(0)"]] * 3
    assert {o.status for outcomes in found.values() for o in outcomes} == {"ok"}
    assert [all(o.retried for o in found[k]) for k in range(5)] == [True] + [False] * 4


def test_misses(sandbox):
    """Just above the limit in CPU time, alone as two processes, and asleep."""
    near = f"import time\nwhile time.process_time() < {1.2 * QUICK.cpu_seconds}: pass"
    outcome = run(sandbox, near)
    assert outcome.status == "timeout" and outcome.retried
    assert QUICK.cpu_seconds < outcome.cpu_seconds
    half = (
        f"import os, time\nos.fork()\nwhile time.process_time() < {0.7 * QUICK.cpu_seconds}: pass"
    )
    assert run(sandbox, f"{half}\nos.wait()").status == "timeout"
    outcome = run(sandbox, "import time; time.sleep(60)")
    assert outcome.status == "timeout" and "wall" in outcome.detail and not outcome.retried


def test_a_worker_that_dies(sandbox, monkeypatch):
    """Idle, in a test, and in the repetition too."""
    for worker in sandbox.workers:
        worker.process.kill()
        worker.process.wait()
    assert run(sandbox, "print(1)").stdout == b"1\n"
    real, kills = sandbox_module.send, 0

    def dies(*message):
        nonlocal kills
        real(*message)
        if kills:
            kills -= 1
            own.workers[0].process.kill()

    monkeypatch.setattr(sandbox_module, "send", dies)
    with Sandbox(QUICK, workers=1, allow_code_execution=True) as own:
        for times, status in ((1, "ok"), (2, "harness_error"), (0, "ok")):
            kills = times
            outcome = run(own, "import time; time.sleep(0.3)")
            assert (outcome.status, outcome.retried) == (status, times > 0)


def test_what_the_runner_cannot_do_is_a_harness_error(sandbox):
    limits = Limits(file_bytes=1 << 70)  # no kernel knows such a number
    [outcome] = sandbox.run(Program("print(1)"), [""], limits)
    assert outcome.status == "harness_error" and outcome.retried and "Error" in outcome.detail
    assert run(sandbox, "print(1)").stdout == b"1\n"


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
from inference.evaluation.sandbox import *
with Sandbox(None, 2, sys.argv[1], allow_code_execution=True, python=sys.argv[2]) as s:
    print("ready", flush=True)
    input()
    code = "import os; os.fork(); print(1, flush=True)\\nwhile True: pass"
    list(s.map([Job(Program(code), [""])] * 2))
"""


@pytest.mark.parametrize("level", ["namespaces", "rlimits"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_everything_goes_with_the_parent(number, level):
    """Killed in the middle of a test, the parent leaves no process and no scratch folder."""
    python, _ = interpreter("the caller", level)

    def wait_for(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (link := Path(folder, "python-of-this-test")).symlink_to(os.path.realpath(python))
        command, env = [sys.executable, "-c", PARENT, level, link], {**os.environ, "TMPDIR": folder}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as parent:
            assert parent.stdout.readline() == b"ready\n"
            parents = len(tagged(str(link)))
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            wait_for(lambda: len(tagged(str(link))) >= parents + 6)  # 2 × (init, program, fork)
            parent.send_signal(number)
            parent.wait(10)
        wait_for(lambda: not tagged(str(link)) and os.listdir(folder) == [link.name])


WITHOUT_NAMESPACES = """
import json, sys
from eagle.errors import EagleError
from inference.evaluation.sandbox import Program, Sandbox, isolation
isolation.prctl(isolation.PR_SET_NO_NEW_PRIVS, 1)
isolation.deny_system_calls(in_the_open=False)  # as many containers do
try:
    with Sandbox(workers=1, level=sys.argv[1], allow_code_execution=True) as sandbox:
        [outcome] = sandbox.run(Program("print(input())"), ["fine"])
        print(json.dumps([sandbox.level, sandbox.isolation, outcome.stdout.decode()]))
except EagleError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("user", ["the caller", "another user"])
def test_where_the_kernel_grants_no_namespaces(user):
    python, identity = interpreter(user, "rlimits")

    def start(level):
        command, env = [python, "-B", "-c", WITHOUT_NAMESPACES, level], {"PATH": "/usr/bin:/bin"}
        said = subprocess.check_output(command, cwd=ROOT, env=env, **identity)
        return json.loads(said)

    refused = start("namespaces")
    assert "no sandbox can be started here" in refused
    assert "unshare: Operation not permitted" in refused
    level, isolation, stdout = start("auto")
    assert (level, stdout) == ("rlimits", "fine\n")
    assert "unshare: Operation not permitted" in isolation["not_reached"][0]


def test_an_interpreter_below_tmp(sandbox):
    """The private root keeps /tmp for the interpreter, and the scratch folder lies elsewhere."""
    if sandbox.level != "namespaces":
        pytest.skip("no private root here")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, with_pip=False)
        python = f"{folder}/bin/python"
        with Sandbox(QUICK, workers=1, python=python, allow_code_execution=True) as below:
            code = "import os, sys, tempfile as t\n"
            code += "print(sys.prefix, input(), t.gettempdir(), os.getcwd())"
            out = run(below, code, "in").stdout.decode().split()
    assert below.level == "namespaces"
    assert out == [folder, "in", "/scratch/work", "/scratch/work"]
