"""The environment that is recorded, and a kept result as a table, a page and plots."""

import json
import mmap
import re
import sys

import pytest
import torch

from eagle.errors import EagleError
from inference import environment
from inference.bench.environment import PeakMemory, describe, git_commit
from inference.bench.plots import PLOTS, write_plots
from inference.bench.report import markdown, table


def run(engine, batch_size=1, **changes):
    drafts = engine.startswith("eagle")
    plain = None if engine.startswith("hf") else 1.0
    return {
        "engine": engine,
        "batch_size": batch_size,
        "tree": "16,4,4" if drafts else None,
        "context_length": None,
        "capacity": None,
        "temperature": 0.0,
        "forced_acceptance": None,
        "tokens_per_second": 123.4,
        "tau": 3.21 if drafts else plain,
        "acceptance_by_depth": [0.9, 0.8] if drafts else None if plain is None else [],
        "cycle_ms": plain and 6.0,
        "draft_ms": plain and 1.0,
        "verify_ms": plain and 4.0,
        "commit_ms": plain and 1.0,
        "prefill_ms": plain and 9.0,
        "peak_memory_mb": 12.3,
        "looping": 0.25,
        "vs_hf": 2.28,
        "vs_hf_ci95": [2.1, 2.4] if drafts else None,
        "vs_best_vanilla": 1.7,
        "vs_best_vanilla_ci95": None,
        "identical": True if drafts else None,
        "divergences": {"hf": {"rows": 3, "near_ties": 3, "real": 0}} if drafts else None,
        **changes,
    }


@pytest.fixture
def result():
    where = describe(torch.device("cpu"))
    return {
        "device": where["cpu"],
        "threads": 2,
        "dtype": "bfloat16",
        "versions": where["versions"],
        "environment": {**where, "load_end": [0.1, 0.2, 0.3]},
        "model": "embedded",
        "tree": "16,4,4",
        "num_prompts": 4,
        "repeats": 3,
        "max_new_tokens": 64,
        "temperature": 0.0,
        "top_p": 0.0,
        "top_k": 0,
        "seed": 0,
        "forced_acceptance": None,
        "warm_up_s": {"hf": {}, "eagle_compiled": {"target": 41.25}},
        "notes": ["something is left out"],
        "runs": [run("hf"), run("vanilla"), run("eagle")],
        "speedup": {"vs_hf": {"1": 2.28}, "vs_vanilla": {}},
        "efficiency": {"1": 0.5},
        "efficiency_best": {},
        "identical": {"1": True},
        "divergences": {},
        "explain": {"1": "tree 8,4,2 is best\n"},
        "command": "python -m inference.bench --repeats 3",
    }


def rows_of(page):
    return [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]


def test_table_for_the_terminal(result):
    lines = table(result).splitlines()
    assert lines[-1] == "something is left out" and "embedded on" in lines[0]
    eagle = next(line for line in lines if " eagle " in line)
    for part in ("123.4", "3.21", "2.28", "1.70", "6.00", "yes (3)", "25%"):
        assert part in eagle
    assert "[" not in eagle  # intervals are for the page
    vanilla = next(line for line in lines if " vanilla " in line)
    assert "yes" not in vanilla and len({line.index("123.4") for line in lines[2:5]}) == 1
    result["runs"][2].update(identical=False)
    assert "NO (3)" in table(result)


def test_settings_are_shown_where_runs_differ(result):
    assert "tree" not in table(result).splitlines()[1]
    result["runs"].append(run("eagle", tree="8,4,2", context_length=64))
    head = table(result).splitlines()[1]
    assert "tree" in head and "context" in head and "capacity" not in head


def test_markdown_tells_everything(result):
    page = markdown(result)
    rows = rows_of(page)
    assert [
        "| 1",
        "eagle",
        "123.4",
        "3.21",
        "2.28 [2.10, 2.40]",
        "1.70",
        "6.00",
        "yes (3)",
        "25% |",
    ] in rows
    assert ["| 1", "eagle", "1.00", "4.00", "1.00", "6.00", "9.00", "12.3 |"] in rows
    assert ["| 1", "eagle", "hf", "3", "3", "0 |"] in rows
    assert ["| eagle_compiled", "target", "41.2 |"] in rows
    assert ["| `vs_hf`", "2.28 |"] in rows and ["| `efficiency`", "0.50 |"] in rows
    for part in (
        "something is left out",
        "tree 8,4,2 is best",
        result["command"],
        "[0.1, 0.2, 0.3]",
    ):
        assert part in page
    # every table is well formed: as many cells in each line as in its header
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_plots_of_what_there_is_data_for(result, tmp_path):
    def names():
        return {path.stem for path in write_plots(result, tmp_path / "deep" / "plots")}

    assert names() == {"acceptance_by_depth", "cycle_breakdown"}
    result["runs"] += [run("eagle", 8), run("hf", 8)]
    assert names() == {"acceptance_by_depth", "cycle_breakdown", "speedup_by_batch"}
    result["runs"] += [run("eagle", context_length=n) for n in (64, 256)]
    assert names() == PLOTS.keys()
    files = sorted((tmp_path / "deep" / "plots").iterdir())
    assert [f.name for f in files] == sorted(f"{name}.png" for name in PLOTS)  # no .part is left
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    result["runs"] = [run("hf")]
    assert names() == set()


def test_plots_without_matplotlib(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(EagleError, match=r"pip install 'eagle-heads\[plots\]'"):
        write_plots(result, tmp_path)


def test_environment_says_what_matters_and_nothing_private():
    import getpass
    import platform

    found = describe(torch.device("cpu"))
    json.dumps(found)
    assert {"python", "torch", "transformers", "triton", "numpy"} == found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__ and found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads() and found["accelerator"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    text = json.dumps(found)
    assert "/" not in text and "\\\\" not in text
    values = {str(value) for value in found.values()}
    assert not values & {platform.node(), getpass.getuser()}


CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.0GHz
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16 avx512_nonsense
processor\t: 1
model name\t: Another CPU
"""


def test_cpu_and_instruction_sets(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    monkeypatch.setattr(environment, "CPUINFO", file)
    assert environment.cpu_name() == "Some CPU @ 2.0GHz"
    assert environment.isa_flags() == ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "missing")
    assert environment.isa_flags() == [] and environment.cpu_name()


def test_git_commit_of_any_kind_of_checkout(tmp_path):
    assert git_commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert git_commit(tmp_path) is None  # no commit yet
    (git / "packed-refs").write_text(
        "# pack-refs with: peeled\naaaa refs/heads/main\nbbbb refs/tags/v1\n"
    )
    assert git_commit(tmp_path) == "aaaa"
    (git / "refs/heads/main").write_text("cccc\n")
    assert git_commit(tmp_path) == "cccc"
    (git / "HEAD").write_text("dddd\n")
    assert git_commit(tmp_path) == "dddd"
    # a worktree of it, on a branch of its own
    own = git / "worktrees" / "other"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/side\n")
    (own / "commondir").write_text("../..\n")
    (git / "refs/heads/side").write_text("eeee\n")
    tree = tmp_path / "other"
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {own}\n")
    assert git_commit(tree) == "eeee"


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is reset through /proc")
def test_peak_memory_sees_what_is_gone_again_and_starts_anew():
    def use(size):  # pages of its own: the heap may hold as much that earlier tests have freed
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1

    use(256 << 20)  # a high-water mark that must not hide what comes after it
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    use(64 << 20)
    assert 60 << 20 < memory.bytes() < 100 << 20
    memory.start()
    assert memory.bytes() < 30 << 20
