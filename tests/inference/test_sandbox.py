"""The sandbox as its users see it: outcomes, limits, order, parallel runs, failures of its own."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path

import pytest

from eagle.errors import EagleError
from inference.evaluation.sandbox import STATUSES, Job, Limits, Program, Sandbox

ROOT = Path(__file__).parents[2]
sys.path.append(str(Path(__file__).parent))
from hostile_runs import NOBODY, readable_python

QUICK = Limits(cpu_seconds=0.5, wall_seconds=1.5, memory_bytes=256 << 20, output_bytes=1 << 20)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(QUICK, workers=2, allow_code_execution=True) as sandbox:
        yield sandbox


def run(sandbox, code, test="", **kwargs):
    [outcome] = sandbox.run(Program(code, **kwargs), [test])
    assert outcome.status in STATUSES
    return outcome


# -- refusals --


def test_running_code_must_be_allowed():
    with pytest.raises(EagleError, match="allow_code_execution"):
        Sandbox()


def test_only_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EagleError, match="needs Linux.*darwin"):
        Sandbox(allow_code_execution=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"level": "docker"}, "unknown isolation level 'docker'"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"python": "/bin/false"}, "no sandbox can be started here"),
        ({"python": "/nonexistent/python"}, "no sandbox can be started here"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(EagleError, match=message):
        Sandbox(allow_code_execution=True, **arguments)


@pytest.mark.parametrize(
    "values",
    [
        {"cpu_seconds": 0},
        {"wall_seconds": -1},
        {"memory_bytes": 10},
        {"processes": 0},
        {"open_files": 3},
        {"cpu_seconds": float("nan")},
        {"cpu_seconds": 5, "wall_seconds": 4},
    ],
)
def test_bad_limits(values):
    with pytest.raises(EagleError):
        Limits(**values)


def test_auto_refuses_where_files_are_open(monkeypatch):
    start = Sandbox._start_at

    def only_rlimits(self, level, count):
        if level == "namespaces":
            raise OSError("not today")
        start(self, "namespaces", count)
        self.isolation = {**self.isolation, "level": "rlimits", "files": "open"}

    monkeypatch.setattr(Sandbox, "_start_at", only_rlimits)
    with pytest.raises(EagleError, match="change your files|changing your files.*not today"):
        Sandbox(allow_code_execution=True, workers=1)
    with Sandbox(allow_code_execution=True, workers=1, level="rlimits") as sandbox:
        assert sandbox.level == "rlimits"


# -- a program as a fresh interpreter would run it --


def test_standard_input_and_output(sandbox):
    outcome = run(
        sandbox, "import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "ab\ncd\n"
    )
    assert (outcome.status, outcome.stdout, outcome.value) == ("ok", b"ba\ndc\n", None)
    assert 0 < outcome.cpu_seconds < 0.5 and outcome.seconds > 0 and outcome.memory_bytes > 1 << 20


@pytest.mark.parametrize(
    "code, stdout",
    [
        ("print(open(0).read(), end='')", "äöü €\n"),
        ("import sys; sys.stdout.write(sys.stdin.buffer.read().decode())", "äöü €\n"),
        ("print(open('/dev/stdin').read(), end='')", "äöü €\n"),
        ("import os; os.write(1, os.read(0, 100))", "äöü €\n"),
        ("print(input())", "äöü €\n"),
        ("print(__name__, end='')", "__main__"),
        (
            "import sys; print(sys.modules['__main__'].x, end='') if 0 else None\nx = 1\nprint(x, end='')",
            "1",
        ),
        ("import sys; sys.stdout.write('a'); sys.exit()", "a"),
        ("import sys; sys.stdout.write('a'); sys.exit(0)", "a"),
        ("import atexit; atexit.register(print, 'b'); print('a')", "a\nb\n"),
        ("import threading\nthreading.Thread(target=lambda: print('late')).start()", "late\n"),
        ("f = open(1, 'w', closefd=False); f.write('left open')", "left open"),
        (
            "import sys, io\nsys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, 'w')))\nprint('own')",
            "own\n",
        ),
        (
            "import sys; sys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(20000))",
            "20000\n",
        ),
        ("print(len(str(10**5000)))", "5001\n"),
        (
            "import multiprocessing, os\nr, w = os.pipe()\nif os.fork() == 0:\n    os.write(w, b'x'); os._exit(0)\n"
            "os.wait(); print(os.read(r, 1))",
            "b'x'\n",
        ),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", "3\n"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nimport pickle\n"
            "print(pickle.loads(pickle.dumps(A(3))))",
            "A(x=3)\n",
        ),
    ],
    ids=range(18),
)
def test_as_a_fresh_interpreter(sandbox, code, stdout):
    outcome = run(sandbox, code, "äöü €\n")
    assert (outcome.status, outcome.stdout.decode()) == ("ok", stdout), outcome.detail


@pytest.mark.parametrize(
    "code, status, detail",
    [
        ("def f(:", "compile_error", "SyntaxError"),
        ("x = '\0'", "compile_error", ""),
        ("x = '\ud800'", "compile_error", "surrogates not allowed"),
        ("(" * 500 + ")" * 500, "compile_error", ""),
        ("int('x')", "runtime_error", "ValueError: invalid literal"),
        ("exec('1 +')", "runtime_error", "SyntaxError"),
        ("import sys; print(1); sys.exit(3)", "runtime_error", "exit status 3"),
        ("import sys; sys.exit('reason')", "runtime_error", "reason"),
        ("import os; os.abort()", "runtime_error", "SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "runtime_error", "SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "runtime_error", "signal 40"),
        ("while True: pass", "timeout", "CPU"),
        (
            "import os\nfor _ in range(3):\n    if os.fork() == 0:\n        while True: pass\nos.wait()",
            "timeout",
            "CPU",
        ),
        ("import time; time.sleep(60)", "timeout", "wall"),
        ("bytearray(1 << 40)", "memory", ""),
        ("print('x' * (1 << 21))", "output_limit", ""),
        ("import sys\nwhile True: print('x' * 999, file=sys.stderr)", "output_limit", ""),
        ("import eagle", "runtime_error", "ModuleNotFoundError"),
        ("import os; os.setuid(0)", "runtime_error", "PermissionError"),
        ("open('/usr/x', 'w')", "runtime_error", "Error"),
        (f"open({__file__!r})", "runtime_error", "Error"),
    ],
    ids=range(21),
)
def test_statuses(sandbox, code, status, detail):
    outcome = run(sandbox, code)
    assert outcome.status == status, outcome
    assert detail in outcome.detail
    assert outcome.stdout == b"" and outcome.value is None


def test_environment_is_not_inherited(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Sandbox(QUICK, workers=1, allow_code_execution=True) as fresh:
        outcome = run(fresh, "import os; print(sorted(os.environ))")
    names = set(eval(outcome.stdout))
    assert names <= {
        "HOME",
        "LANG",
        "MKL_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "TMPDIR",
        "LC_CTYPE",
    }


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


def test_tests_do_not_see_each_other(sandbox):
    code = "import os\nprint(os.listdir('.'), os.getpid() < 10)\nopen('x', 'w')"
    outcomes = sandbox.run(Program(code), ["a", "b"])
    assert outcomes[0].stdout == outcomes[1].stdout
    assert outcomes[0].stdout.startswith(b"[] ")


# -- calls --


@pytest.mark.parametrize(
    "code, arguments, value",
    [
        ("def f(a, b): return a + b", [1, 2], 3),
        ("class Solution:\n    def f(self, a): return a[::-1]", [[1, 2]], [2, 1]),
        ("f = lambda: (1, (2,), {3, 1}, None, True, 1.5)", [], [1, [2], [1, 3], None, True, 1.5]),
        ("def f(d): return d", [{1: "a"}], {"1": "a"}),
        ("def f(d): return d[1]", [{1: "a"}], "a"),
        ("def f(): return map(str, range(3))", [], ["0", "1", "2"]),
        ("def f():\n    print('noise')\n    return input", [], None),
        ("def f(): return 10**5000", [], 10**5000),
        ("def f(x): return x", ["\U0001f600 é"], "\U0001f600 é"),
    ],
    ids=range(9),
)
def test_calls(sandbox, code, arguments, value):
    [outcome] = sandbox.run(Program(code, "f"), [arguments])
    if value is None:
        assert outcome.status == "runtime_error" and "no JSON form" in outcome.detail
    else:
        assert (outcome.status, outcome.value) == ("ok", value), outcome.detail


def test_a_prelude_is_there_first(sandbox):
    program = Program("def f(x: List[int]) -> int: return sum(x)", "f", "from typing import *")
    assert sandbox.run(program, [[[1, 2]]])[0].value == 3


@pytest.mark.parametrize(
    "code, detail",
    [
        ("import sys\ndef f(): sys.exit(0)", "before the function returned"),
        ("import os\ndef f(): os._exit(0)", "before the function returned"),
        ("def g(): pass", "no function 'f'"),
        ("def f(x): pass", "TypeError"),
        ("def f():\n    x = []\n    x.append(x)\n    return x", "ValueError"),
        ("def f():\n    x = []\n    for _ in range(900): x = [x]\n    return input()", "EOFError"),
        ("import os\ndef f():\n    os.closerange(0, 999)\n    return 1", ""),
    ],
    ids=range(7),
)
def test_calls_that_fail(sandbox, code, detail):
    [outcome] = sandbox.run(Program(code, "f"), [[]])
    assert outcome.status == "runtime_error"
    assert detail in outcome.detail


def test_a_fork_that_comes_back_returns_nothing(sandbox):
    code = "import os\ndef f():\n    if os.fork() == 0: return 'child'\n    os.wait()\n    return 'parent'"
    assert sandbox.run(Program(code, "f"), [[]])[0].value == "parent"


def test_test_inputs_are_checked(sandbox):
    with pytest.raises(EagleError, match="list of its arguments"):
        sandbox.run(Program("", "f"), ["x"])
    with pytest.raises(EagleError, match="standard input is text"):
        sandbox.run(Program(""), [[1]])
    assert run(sandbox, "print(1)").status == "ok", "and the sandbox is of use afterwards"


# -- many --


def test_outcomes_keep_the_order_of_tests(sandbox):
    jobs = [
        Job(Program(f"print(int(input()) + {j})"), [str(i) for i in range(5)], key=j)
        for j in range(7)
    ]
    found = {job.key: [int(o.stdout) for o in outcomes] for job, outcomes in sandbox.map(jobs)}
    assert found == {j: [i + j for i in range(5)] for j in range(7)}


def test_a_producer_need_not_block(sandbox):
    jobs = [None, Job(Program("print(1)"), [""]), None, None, Job(Program("print(2)"), [""]), None]
    assert sorted(o.stdout for _, [o] in sandbox.map(jobs)) == [b"1\n", b"2\n"]


def test_a_producer_is_asked_again_while_a_job_runs(sandbox):
    asked, done = [], threading.Event()

    def produce():
        yield Job(Program("import time; time.sleep(0.3)"), [""])
        while not done.is_set():
            asked.append(time.monotonic())
            yield None

    for _ in sandbox.map(produce()):
        done.set()
    assert len(asked) > 5


def test_a_job_without_tests_has_no_outcomes(sandbox):
    [(_, outcomes)] = sandbox.map([Job(Program("print(1)"), [])])
    assert outcomes == []


def test_observe_sees_output_and_may_stop(sandbox):
    seen = []

    def observe(index, outcome):
        seen.append((index, outcome.stdout))
        return index == 1

    job = Job(Program("print(input())"), list("abcd"), observe=observe)
    [(same, outcomes)] = sandbox.map([job])
    assert same is job and seen == [(0, b"a\n"), (1, b"b\n")]
    assert [o.status for o in outcomes] == ["ok", "ok"] and not any(o.stdout for o in outcomes)


def test_one_map_at_a_time(sandbox):
    first = sandbox.map([Job(Program("print(1)"), ["", ""]) for _ in range(3)])
    next(first)
    with pytest.raises(EagleError, match="one map or run at a time"):
        sandbox.run(Program("print(1)"), [""])
    first.close()
    assert run(sandbox, "print(3)").stdout == b"3\n"


def test_closed():
    sandbox = Sandbox(QUICK, workers=1, allow_code_execution=True)
    process = sandbox.workers[0].process
    sandbox.close()
    sandbox.close()
    assert process.returncode is not None
    with pytest.raises(EagleError, match="closed"):
        sandbox.run(Program(""), [""])


def test_limits_of_a_job_come_first(sandbox):
    code = "print('x' * 100)"
    small = Limits(output_bytes=50)
    assert sandbox.run(Program(code), [""], small)[0].status == "output_limit"
    assert run(sandbox, code).status == "ok"


# -- time --


def test_load_is_no_timeout():
    """Four times as many workers as cores: CPU time decides, and the wall clock leaves room."""
    cores = len(os.sched_getaffinity(0))
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint('done')"
    limits = Limits(cpu_seconds=0.6, wall_seconds=0.6)
    with Sandbox(limits, workers=4 * cores, allow_code_execution=True) as sandbox:
        outcomes = [
            o for _, os_ in sandbox.map([Job(Program(code), [""] * 2)] * 4 * cores) for o in os_
        ]
    assert {o.status for o in outcomes} == {"ok"}


BURN = """
import time
started = time.monotonic()
while time.process_time() < {cpu}: pass
print(started, time.monotonic())
"""


def near(sandbox):
    """CPU seconds just above the limit, below the point where a program is stopped."""
    return 1.2 * QUICK.cpu_seconds


def test_a_near_miss_is_repeated_alone(sandbox):
    late = time.time() + 0.4
    slow_first = f"""
import time
started = time.monotonic()
end = {near(sandbox)} if time.time() < {late} else 0.1
while time.process_time() < end: pass
print(started, time.monotonic())
"""
    others = [Job(Program(BURN.format(cpu=0.2)), [""] * 3) for _ in range(4)]
    job = Job(Program(slow_first), [""])
    found = dict(sandbox.map([job, *others]))
    [outcome] = found.pop(job)
    assert outcome.status == "ok" and outcome.retried
    begin, end = map(float, outcome.stdout.split())
    for outcomes in found.values():
        for other in outcomes:
            assert other.status == "ok" and not other.retried
            other_begin, other_end = map(float, other.stdout.split())
            assert other_end < begin or other_begin > end, "it was not alone"


def test_a_second_miss_is_final(sandbox):
    outcome = run(sandbox, BURN.format(cpu=near(sandbox)))
    assert outcome.status == "timeout" and outcome.retried
    assert QUICK.cpu_seconds < outcome.cpu_seconds


def test_a_sleeper_is_not_repeated(sandbox):
    outcome = run(sandbox, "import time; time.sleep(60)")
    assert outcome.status == "timeout" and not outcome.retried


def test_children_count(sandbox):
    """Two processes with two thirds of the limit each."""
    code = "import os, time\nos.fork()\nwhile time.process_time() < 0.66 * %f: pass\nos.wait()"
    outcome = run(sandbox, code % near(sandbox))
    assert outcome.status == "timeout"


# -- when something of ours fails --


def test_a_killed_worker_is_replaced_and_its_test_repeated():
    with Sandbox(QUICK, workers=1, allow_code_execution=True) as sandbox:
        before = sandbox.workers[0].process
        threading.Timer(0.3, before.kill).start()
        outcome = run(sandbox, "import time; time.sleep(0.6); print('done')")
        assert (outcome.status, outcome.stdout, outcome.retried) == ("ok", b"done\n", True)
        assert sandbox.workers[0].process is not before
        assert run(sandbox, "print(1)").status == "ok"


def test_a_worker_that_dies_twice_is_a_harness_error():
    with Sandbox(QUICK, workers=1, allow_code_execution=True) as sandbox:
        done = threading.Event()

        def kill():
            while not done.wait(0.3):
                sandbox.workers[0].process.kill()

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            outcome = run(sandbox, "import time; time.sleep(1)")
        finally:
            done.set()
            thread.join()
        assert outcome.status == "harness_error" and outcome.retried


def test_an_idle_worker_that_died_is_replaced(sandbox):
    for worker in sandbox.workers:
        worker.process.kill()
        worker.process.wait()
    assert run(sandbox, "print(1)").stdout == b"1\n"


def test_what_the_runner_cannot_do_is_a_harness_error(sandbox):
    limits = Limits(file_bytes=1 << 70)  # no kernel knows such a number
    [outcome] = sandbox.run(Program("print(1)"), [""], limits)
    assert outcome.status == "harness_error" and outcome.retried
    assert outcome.detail.endswith(", twice") and "Error" in outcome.detail
    assert run(sandbox, "print(1)").stdout == b"1\n"


@pytest.mark.parametrize("level", ["namespaces", "rlimits"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_everything_goes_with_the_parent(number, level):
    """Killed in the middle of a test, the parent leaves no process and no scratch folder."""
    python = sys.executable if os.geteuid() or level == "namespaces" else readable_python()
    if python is None:
        pytest.skip("no interpreter here that uid 65534 can read")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (link := Path(folder, "python-of-this-test")).symlink_to(os.path.realpath(python))
        code = (
            "from inference.evaluation.sandbox import *\n"
            f"with Sandbox(None, 2, {level!r}, allow_code_execution=True, python={str(link)!r}) as s:\n"
            "    code = 'import os; os.fork(); print(1, flush=True)\\nwhile True: pass'\n"
            "    print('ready', flush=True)\n"
            "    list(s.map([Job(Program(code), [''])] * 2))\n"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with parent, io.TextIOWrapper(parent.stdout) as stdout:
            assert stdout.readline() == "ready\n"
            time.sleep(0.5)
            assert processes(str(link))
            parent.send_signal(number)
            parent.wait(10)
        end = time.monotonic() + 10
        while (processes(str(link)) or len(os.listdir(folder)) > 1) and time.monotonic() < end:
            time.sleep(0.05)
        assert processes(str(link)) == []
        assert os.listdir(folder) == [link.name]


WITHOUT_NAMESPACES = """
import json, os, sys
from eagle.errors import EagleError
from inference.evaluation.sandbox import isolation
isolation.prctl(isolation.PR_SET_NO_NEW_PRIVS, 1)
isolation.deny_system_calls(in_the_open=False)  # as many containers do
from inference.evaluation.sandbox import *
try:
    with Sandbox(workers=1, level=sys.argv[1], allow_code_execution=True) as sandbox:
        [outcome] = sandbox.run(Program("print(input())"), ["fine"])
        print(json.dumps([sandbox.level, sandbox.isolation, outcome.stdout.decode()]))
except EagleError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("user", ["the caller", "another user"])
def test_where_the_kernel_grants_no_namespaces(user):
    python, identity = sys.executable, {}
    if os.geteuid() == 0:
        python = readable_python()
        if python is None:
            pytest.skip("no interpreter here that uid 65534 can read")
    if user == "another user":
        if os.geteuid() or os.stat(ROOT).st_mode & 0o005 != 0o005:
            pytest.skip("needs root, and a checkout that others can read")
        identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}

    def start(level):
        done = subprocess.run(
            [python, "-B", "-c", WITHOUT_NAMESPACES, level],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin"},
            check=True,
            **identity,
        )
        return json.loads(done.stdout)

    assert "no sandbox can be started here" in start("namespaces")
    assert "unshare: Operation not permitted" in start("namespaces")
    level, isolation, stdout = start("auto")
    assert (level, stdout) == ("rlimits", "fine\n")
    assert "unshare: Operation not permitted" in isolation["not_reached"][0]


def processes(name):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = folder.joinpath("cmdline").read_bytes()
        except OSError:
            continue
        if name.encode() in command and b"_eagle_sandbox" in command:
            found.append(folder.name)
    return found


def test_an_interpreter_below_tmp(sandbox):
    """The private root keeps /tmp for the interpreter then, and the scratch folder lies
    elsewhere.
    """
    if sandbox.level != "namespaces":
        pytest.skip("no private root here")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, with_pip=False)
        python = f"{folder}/bin/python"
        with Sandbox(QUICK, workers=1, python=python, allow_code_execution=True) as below:
            code = "import os, sys, tempfile as t; print(sys.prefix, input(), t.gettempdir(), os.getcwd())"
            out = run(below, code, "in").stdout.decode().split()
    assert below.level == "namespaces"
    assert out == [folder, "in", "/scratch/work", "/scratch/work"]
