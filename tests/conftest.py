"""One thread, no network, and the tiny models that the engine's tests share."""

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With several processes (pytest-xdist) a file stays in one, and so do all that run programs in the sandbox,
    which look for what is left of them. The longest files come first."""
    for item in items:
        name = item.path.name
        alone = name.startswith(("test_sandbox", "test_evaluate"))
        item.add_marker(pytest.mark.xdist_group("sandbox" if alone else name))
    first = ("test_readme.py", "test_interpreter.py", "test_compile.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


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
    """An empty EAGLE_CACHE for the session: what is compiled is compiled here and now, once."""
    folder = tmp_path_factory.mktemp("eagle_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EAGLE_CACHE", str(folder))
        yield folder
