"""One thread, no network, and the tiny models that the engine's tests share."""

import contextlib
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)
# importlib mode adds no test folder to the path; engine_helpers lives in eagle/
sys.path.append(str(Path(__file__).parent / "eagle"))


SLOWEST = [
    "test_compile.py",
    "test_interpreter.py",
    "test_docs.py",
    "test_pipeline.py",
    "test_families.py",
    "test_sft.py",
    "test_head_step.py",
    "test_ranks.py",
    "test_resume.py",
    "test_demo.py",
    "test_head_ranks.py",
    "test_ablation.py",
    "test_structure.py",
    "test_dpo.py",
    "test_multitask.py",
]


def pytest_collection_modifyitems(items):
    """The slowest files first, so that no process works on one alone at the end."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays in one process, and so do all files that run programs in the sandbox, which look
    for what is left of them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            alone = Path(file).name.startswith(("test_sandbox", "test_evaluate"))
            return "sandbox" if alone else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled():
    """Once, for all processes: where tests have no cache of their own, they use the user's."""
    from filelock import FileLock

    from eagle.linears import load_kernels
    from eagle.loading import compiled_folder

    if not os.environ.get("TRITON_INTERPRET"):
        compiled_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(compiled_folder() / ".tests.lock"):
            load_kernels(compiled_folder())


@pytest.fixture(scope="session")
def targets():
    """targets(name) -> a tiny random Target of that family, made once."""
    from engine_helpers import make_target

    made = {}

    def get(name):
        if name not in made:
            made[name] = make_target(name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def llama(targets):
    return targets("llama")


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """An EAGLE_CACHE with nothing but the C++ in it when the tests begin, the same in all their
    processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        yield new_cache(base / "eagle_cache", patch)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The same for one test."""
    return new_cache(tmp_path / "cache", monkeypatch)


def new_cache(folder, patch):
    from eagle.loading import compiled_folder

    (folder / "compiled").mkdir(parents=True, exist_ok=True)
    for library in compiled_folder().glob("eagle_cpu_*.so"):
        with contextlib.suppress(FileExistsError):
            (folder / "compiled" / library.name).symlink_to(library.resolve())
    patch.setenv("EAGLE_CACHE", str(folder))
    return folder
