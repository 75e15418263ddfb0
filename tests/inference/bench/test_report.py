"""The environment that is recorded, and a kept result as a table and a page."""

import getpass
import json
import mmap
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

from inference.bench import record
from inference.bench.engines_page import sections, title
from inference.bench.record import Record, describe
from inference.bench.report import markdown, terminal
from inference.bench.slots import measure_slots
from inference.bench.timing import PeakMemory, peak_bytes

CPU = torch.device("cpu")
KEPT = Path(__file__).parents[3] / "docs" / "results" / "2026-11-21-cpu-engines.json"


@pytest.fixture
def result():
    """Seven engines at batch 1 and 8, as somebody measured them."""
    return json.loads(KEPT.read_text())


def test_table_for_the_terminal(result):
    def table():
        return terminal(title(result), sections(result)[0]).splitlines()

    lines = table()
    assert "hf_prompt_lookup is left out" in lines[-1] and "embedded on" in lines[0]
    # settings are shown where runs differ in them
    assert "tree" not in lines[1]
    result["runs"].append({**result["runs"][4], "tree": "8,4,2", "context_length": 64})
    result["runs"][4]["identical"] = False
    assert any("NO (5)" in line for line in table())
    head = table()[1]
    assert "tree" in head and "context" in head and "capacity" not in head


def test_markdown_tells_everything(result):
    page = markdown(title(result), result, sections(result))
    for part in (
        "| 1 | eagle | 294.3 | 4.25 | 2.24 [2.00, 2.46] | 0.69 [0.63, 0.75] | 13.55 | yes (5) | ",
        "| 1 | vanilla | 135.5 |  |",
        "| 1 | eagle | vanilla_compiled | 2 | 1 | 1 |",
        "| `vs_hf` | 2.24 | 1.32 |",
        "| `efficiency` | ",
        "hf_prompt_lookup is left out",
        "break-even tau about 1.42",
        result["command"],
        str(result["environment"]["load_end"]),
    ):
        assert part in page
    # every table is well formed: as many cells in each line as in its header
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_environment_says_what_matters_and_nothing_private(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(record, "CPUINFO", file)
    found = describe.__wrapped__(CPU)
    assert found["isa"] == [] and found["cpu"]
    assert {"python", "torch", "transformers", "triton", "numpy"} == found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__ and found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads() and found["accelerator"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    text = json.dumps(found)
    assert "/" not in text and "\\\\" not in text
    assert not {str(value) for value in found.values()} & {platform.node(), getpass.getuser()}
    file.write_text("model name\t: Some CPU @ 2.0GHz\nflags\t\t: fpu avx2 amx_tile avx512_x\n")
    found = describe.__wrapped__(CPU)
    assert found["cpu"] == "Some CPU @ 2.0GHz" and found["isa"] == ["avx2", "amx_tile"]


def test_a_case_that_fails_is_recorded_and_the_others_run(tmp_path):
    kept = Record("slots", measure_slots, {})
    kept.file = tmp_path / "engine.json"

    def broken():
        raise RuntimeError("no such\nkernel")

    kept.attempt("a", {"rows": 1}, broken)
    kept.attempt("b", {}, lambda: {"ms": 2.0})
    first, second = json.loads(kept.file.read_text())["runs"]  # before the stage is over
    assert first["error"] == "RuntimeError: no such kernel" and first["rows"] == 1
    assert second["ms"] == 2.0 and second["kind"] == "b"


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
