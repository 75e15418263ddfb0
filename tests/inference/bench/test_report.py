"""The environment that is recorded, and a kept result as a table, a page and plots."""

import json
import mmap
import re
import sys

import pytest
import torch

from inference.bench import environment
from inference.bench.engines_page import PLOTS, sections, title, write_plots
from inference.bench.environment import describe
from inference.bench.record import Record
from inference.bench.report import markdown, terminal
from inference.bench.timing import PeakMemory, peak_bytes, turns

CPU = torch.device("cpu")


def run(engine, batch_size=1, **changes):
    drafts, stock = engine.startswith("eagle"), engine.startswith("hf")
    return {
        "engine": engine,
        "batch_size": batch_size,
        "tree": "16,4,4" if drafts else None,
        "context_length": None,
        "capacity": None,
        "temperature": 0.0,
        "forced_acceptance": None,
        "tokens_per_second": 123.4,
        "tau": 3.21 if drafts else None if stock else 1.0,
        "acceptance_by_depth": [0.9, 0.8] if drafts else None,
        **dict.fromkeys(("draft_ms", "commit_ms"), None if stock else 1.0),
        "cycle_ms": None if stock else 6.0,
        "verify_ms": None if stock else 4.0,
        "prefill_ms": None if stock else 9.0,
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
    settings = {"dtype": "bfloat16", "model": "embedded", "tree": "16,4,4", "num_prompts": 4}
    settings |= {"temperature": 0.0, "notes": ["something is left out"]}
    settings["warm_up_s"] = {"hf": {}, "eagle_compiled": {"target": 41.25}}
    record = Record(CPU, settings, "python -m inference.bench --repeats 3")
    record.runs = [run("hf"), run("vanilla"), run("eagle")]
    speedup = {"vs_hf": {"1": 2.28}, "vs_vanilla": {}}
    explain = {"1": "tree 8,4,2 is best\n"}
    return record.result(
        speedup=speedup, efficiency={"1": 0.5}, efficiency_best={}, explain=explain
    )


def table(result):
    return terminal(title(result), sections(result)[0])


def test_table_for_the_terminal(result):
    lines = table(result).splitlines()
    assert lines[-1] == "something is left out" and "embedded on" in lines[0]
    assert "tree" not in lines[1]
    eagle = next(line for line in lines if " eagle " in line)
    for part in ("123.4", "3.21", "2.28 [2.10, 2.40]", "1.70", "6.00", "yes (3)", "25%"):
        assert part in eagle
    vanilla = next(line for line in lines if " vanilla " in line)
    assert "yes" not in vanilla and len({line.index("123.4") for line in lines[2:5]}) == 1
    result["runs"][2].update(identical=False)
    assert "NO (3)" in table(result)
    # settings are shown where runs differ in them
    result["runs"].append(run("eagle", tree="8,4,2", context_length=64))
    head = table(result).splitlines()[1]
    assert "tree" in head and "context" in head and "capacity" not in head


def test_markdown_tells_everything(result):
    page = markdown(title(result), result, sections(result))
    for line in (
        "| 1 | eagle | 123.4 | 3.21 | 2.28 [2.10, 2.40] | 1.70 | 6.00 | yes (3) | 25% |",
        "| 1 | eagle | 1.00 | 4.00 | 1.00 | 6.00 | 9.00 | 12.3 |",
        "| 1 | eagle | hf | 3 | 3 | 0 |",
        "| eagle_compiled | target | 41.2 |",
        "| `vs_hf` | 2.28 |",
        "| `efficiency` | 0.50 |",
        "something is left out",
        "tree 8,4,2 is best",
        result["command"],
        str(result["environment"]["load_end"]),
    ):
        assert line in page
    # every table is well formed: as many cells in each line as in its header
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_plots_of_what_there_is_data_for(result, tmp_path):
    def names(folder):
        write_plots(result, tmp_path / folder)
        files = sorted((tmp_path / folder).iterdir())
        assert all(f.read_bytes().startswith(b"\x89PNG") and f.suffix == ".png" for f in files)
        return {file.stem for file in files}

    assert names("a") == {"acceptance_by_depth", "cycle_breakdown"}
    result["runs"] += [run("eagle", 8), *(run("eagle", context_length=n) for n in (64, 256))]
    assert names("b") == PLOTS.keys()
    result["runs"] = [run("hf")]
    assert names("c") == set()


def test_environment_says_what_matters_and_nothing_private():
    import getpass
    import platform

    found = describe(CPU)
    assert {"python", "torch", "transformers", "triton", "numpy"} == found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__ and found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads() and found["accelerator"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    text = json.dumps(found)
    assert "/" not in text and "\\\\" not in text
    assert not {str(value) for value in found.values()} & {platform.node(), getpass.getuser()}


def test_cpu_and_instruction_sets(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Some CPU @ 2.0GHz\nflags\t\t: fpu avx2 amx_tile avx512_x\n")
    monkeypatch.setattr(environment, "CPUINFO", file)
    found = describe(CPU)
    assert found["cpu"] == "Some CPU @ 2.0GHz" and found["isa"] == ["avx2", "amx_tile"]
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "missing")
    found = describe(CPU)
    assert found["isa"] == [] and found["cpu"]


def test_a_case_that_fails_is_recorded_and_the_others_run(tmp_path):
    record = Record(CPU, file=tmp_path / "engine.json")

    def broken():
        raise RuntimeError("no such\nkernel")

    record.attempt("a", {"rows": 1}, broken)
    record.attempt("b", {}, lambda: {"ms": 2.0})
    first, second = json.loads(record.file.read_text())["runs"]  # before the stage is over
    assert first["error"] == "RuntimeError: no such kernel" and first["rows"] == 1
    assert second["ms"] == 2.0 and second["kind"] == "b"


def test_turns_give_everybody_every_place():
    assert list(turns(["a", "b", "c"], 3)) == [*"abc", *"acb", *"cab"]


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is reset through /proc")
def test_peak_memory_sees_what_is_gone_again_and_starts_anew():
    def use(size):  # pages of its own: the heap may hold as much that earlier tests have freed
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1

    use(256 << 20)  # a high-water mark that must not hide what comes after it
    memory = PeakMemory(CPU)
    use(64 << 20)
    assert 60 << 20 < memory.bytes() < 100 << 20
    assert PeakMemory(CPU).bytes() < 30 << 20
    assert peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000), CPU) in range(12000, 13000)
