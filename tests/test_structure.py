"""Imports go one way, our `kernels` lives beside the distribution of the same name, and Python 3.10
is enough.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# configs, kernels <- eagle <- records <- train, inference <- examples, tools
BELOW = {
    "configs": set(),
    "kernels": set(),
    "eagle": {"kernels", "configs"},
    "records": {"eagle", "kernels", "configs"},
    "train": {"records", "eagle", "kernels", "configs"},
    "inference": {"records", "eagle", "kernels", "configs"},
    "examples": {"train", "inference", "records", "eagle", "kernels", "configs"},
    "tools": {"train", "inference", "records", "eagle", "kernels", "configs"},
}
STEP = "inference/bench/train.py"  # the benchmark of a training step, and of nothing else of it
# names of the other distribution's modules: a file of ours called so would shadow it or be shadowed
THEIRS = set(
    "_rust _system _versions _windows archs backends benchmark benchmarks cli compat deps hf_hub "
    "importer install layer load locking python_deps resolver status validate variants "
    "verify".split()
)


def sources(folder):
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path, text=None):
    """Dotted names that a file imports, relative ones resolved, import functions included."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(text or path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package), f"{path}: a relative import leaves its package"
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            constant = node.args and isinstance(node.args[0], ast.Constant)
            if name in ("import_module", "__import__") and constant:
                yield str(node.args[0].value)


def imported(path, text=None):
    return {name.split(".")[0] for name in imports(path, text)}


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_one_way(room):
    files = sources(room)
    assert files
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        above = BELOW.keys() - BELOW[room] - {room} - ({"train"} if name == STEP else set())
        assert not imported(path) & above, name


def test_no_circle_closes():
    """Imports inside functions count. Repeatedly drop the files that import none that is left."""
    files = {
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p
        for room in BELOW
        for p in sources(room)
    }
    left = {name: {i for i in imports(p) if i in files and i != name} for name, p in files.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: needs & left.keys() for name, needs in left.items()}


@pytest.mark.parametrize(
    "text",
    ["import inference.x", "def f():\n    from inference import x", "import_module('inference.x')"],
)
def test_the_walk_sees_wrong_imports(text):
    assert "inference" in imported(ROOT / "train" / "x.py", text)


def version_dependent(*paths):
    """What a type checker, which knows the standard library of every Python, says of the oldest or
    the newest only."""
    said = []
    for version in ("3.10", "3.13"):
        options = ["--python-version", version, "--output-format", "concise", "--no-progress"]
        command = [sys.executable, "-m", "ty", "check", *options, *map(str, paths)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr  # 1: it finds something in any untyped code
        said.append({line for line in done.stdout.splitlines() if ": error[" in line})
    return sorted(said[0] ^ said[1])


def test_the_oldest_and_the_newest_python_are_enough():
    assert version_dependent(*BELOW, "tests", "setup.py") == []


def test_the_check_sees_what_one_python_lacks(tmp_path):
    (tmp_path / "x.py").write_text("print(int.from_bytes(b'12'))\n")
    assert version_dependent(tmp_path / "x.py")


def test_configs_and_kernels_are_leaves():
    for path in sources("configs"):
        assert not set(imported(path)) & {"torch", "transformers", "deepspeed"}, path
    for path in sources("kernels"):
        assert not set(imported(path)) & {"transformers", "pydantic", "omegaconf"}, path


@pytest.mark.parametrize("names", ["configs, configs.cli, configs.load, configs.schema", "eagle"])
def test_what_is_light_until_used(names):
    code = f"import sys, {names}; print({{'torch', 'transformers'}} & sys.modules.keys())"
    assert run(code).stdout.strip() == "set()"


def test_kernels_is_a_namespace_portion():
    folder = ROOT / "kernels"
    assert not (folder / "__init__.py").exists()
    taken = {p.stem if p.is_file() else p.name for p in folder.iterdir()} & THEIRS
    assert not taken, f"kernels/ may not hold {taken}"


def test_distribution_discovery():
    from setuptools import find_namespace_packages

    calls = [n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8")))]
    calls = [n for n in calls if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    (call,) = [n for n in calls if n.func.id == "find_namespace_packages"]
    (include,) = [ast.literal_eval(k.value) for k in call.keywords if k.arg == "include"]
    found = find_namespace_packages(str(ROOT), include=include)
    found = {p.split(".")[0] for p in found if "__pycache__" not in p}
    assert found == BELOW.keys() - {"examples", "tools"}
    for name in ("configs", "eagle", "records", "train", "inference"):
        assert (ROOT / name / "__init__.py").exists()


def test_version():
    """transformers takes a `kernels` from 0.18 to 0.19 for the other distribution."""
    text = (ROOT / "eagle" / "__init__.py").read_text("utf-8")
    version = tuple(int(n) for n in re.search(r'__version__ = "(\d+)\.(\d+)', text).groups())
    assert version < (0, 18) or version > (0, 19)


def run(code, path=(), cwd=ROOT / "tests"):
    # -P is younger than 3.10: run from elsewhere so that only the given path decides
    path = os.pathsep.join([*map(str, path), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def stand_in(tmp_path):
    """A regular package `kernels` 0.16.0 with a module of its own."""
    site = tmp_path / "site"
    package, info = site / "kernels", site / "kernels-0.16.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '0.16.0'\nTHEIRS = True\ndef get_kernel(name): return name\n"
    )
    (package / "layer.py").write_text("LAYER = True\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\nkernels/layer.py,,\n")
    (info / "top_level.txt").write_text("kernels\n")
    return site


CHECK = """
import importlib.metadata, sys
{first}
import kernels, kernels.layer
assert kernels.THEIRS and kernels.layer.LAYER and kernels.get_kernel("x") == "x"
import eagle
from kernels.tree_attention import attend
from kernels.choose import choose
{last}
assert importlib.metadata.version("kernels") == "0.16.0"
assert "tree_attention" in sys.modules["kernels.tree_attention"].__file__
print("fine")
"""


@pytest.mark.parametrize("first", ["import transformers", "import eagle", "checkout"])
def test_beside_the_other_distribution(stand_in, tmp_path, first):
    if first == "checkout":  # the repository first on the path: a regular package still wins
        first = f"sys.path.append({str(stand_in)!r})"
        done = run(CHECK.format(first=first, last=""), cwd=ROOT)
    else:
        last = "import transformers; from eagle import EaModel"
        done = run(CHECK.format(first=first, last=last), [stand_in], cwd=tmp_path)
    assert done.stdout.strip() == "fine"
