"""The profile of a cycle: its report, and that a cycle's work on the host does not grow with the
tree."""

import json

import pytest
import torch
from engine_helpers import head_model, make_prompts, make_target

from inference.bench.cycle import Calls, count_calls, cycle


@pytest.fixture(scope="module")
def calls():
    """calls(tree, rows): torch calls and host reads of a cycle; trees of one depth."""
    model = head_model(make_target("llama"), "6,2,2")

    def count(tree, rows):
        prompts = make_prompts((40, 30, 35, 20, 10)[:rows])
        options = {"max_new_tokens": 16, "eos_token_id": -1, "tree": tree}
        return count_calls(lambda **hook: model.generate(prompts, **options, **hook), rows)

    return count


def test_nothing_grows_with_nodes_or_rows(calls):
    small = calls("6,2,2", 2)
    assert small == calls("40,2,7", 2) == calls("6,2,2", 5) == calls("40,2,7", 5)
    reads = {name: number for (kind, name), number in small.items() if kind == "read"}
    assert sum(small.values()) > 50 and sum(reads.values()) == 1.0  # of what was accepted


def test_host_reads_are_named_by_our_line():
    calls, x = Calls(), torch.arange(3)
    with calls:
        x.tolist(), x[0].item(), bool(x[0]), x + 1
    reads = {name: n for (kind, name), n in calls.counter.items() if kind == "read"}
    assert reads == {"elsewhere: tolist": 1, "elsewhere: item": 1, "elsewhere: __bool__": 1}


def test_the_report(in_process, base, tmp_path):
    page = tmp_path / "new" / "cycle.md"
    flags = "--batch_size 2 --tree 8,2,2 --compile off --max_new_tokens 12 --report"
    code, out, err = in_process(cycle, *base, *flags.split(), page)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    phases = {run["phase"]: run["ms"] for run in result["runs"]}
    whole = phases.pop("cycle")
    assert phases.keys() == {"commit", "draft", "verify"} and min(phases.values()) > 0
    assert whole == pytest.approx(sum(phases.values()))
    assert any(row["operator"].startswith("aten::") for row in result["operators"])
    assert sum(result["host_reads"].values()) == 1 and result["torch_calls"] > 50
    assert result["tree"] == "8,2,2" and result["versions"]["torch"] == torch.__version__
    assert "| cycle | " in page.read_text() and "inference.bench cycle" in page.read_text()
