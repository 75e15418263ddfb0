"""The cost model: its arithmetic, its limits, and how far it is from what was measured."""

import json
import statistics
from pathlib import Path

import pytest

from inference.bench import model as costs
from inference.bench.model import DEVICES, EMBEDDED, Device, fit, llama_like, predict, tau_of

RESULTS = Path(__file__).parents[3] / "docs" / "results"
LLAMA_8B = llama_like(8.03e9, 32, 8, 128, 4096)


def runs(name):
    return costs.read_runs(str(RESULTS / f"2026-11-21-cpu-{name}.json"))


def test_a_pass_that_only_reads_costs_its_bytes():
    assert LLAMA_8B.kv == 131072  # 32 layers, keys and values, 8 heads of 128, 16 bits
    assert LLAMA_8B.read == pytest.approx(7.5e9, rel=0.01)
    # fc 50 M, attention 84 M, MLP 176 M, LM head of 32,000 tokens 131 M
    assert LLAMA_8B.head == pytest.approx(425e6, rel=0.05)
    ideal = Device(1e12, 1e20, layer_s=0, cycle_s=0, plain_s=0, draft_s=0)
    made = predict(LLAMA_8B, ideal, "60,7,10", 5.0, rows=1, context=1000)
    read = 2 * LLAMA_8B.read + 1000 * LLAMA_8B.kv
    head = 2 * LLAMA_8B.head + 1000 * LLAMA_8B.kv / 32
    assert made["plain_ms"] == pytest.approx(1e3 * read / 1e12)
    assert made["verify_ms"] == pytest.approx(made["plain_ms"])
    assert made["draft_ms"] == pytest.approx(8e3 * head / 1e12)
    assert made["speedup"] == pytest.approx(5 / made["pays_from"])
    assert made["pays_from"] == pytest.approx(made["cycle_ms"] / made["plain_ms"])


def test_speculation_stops_paying_with_rows_and_pays_again_with_context():
    def speedup(tree, tau, rows, context):
        return predict(LLAMA_8B, DEVICES["h200"], tree, tau, rows, context)["speedup"]

    by_rows = [speedup("60,7,10", 5, rows, 2048) for rows in (1, 4, 16, 64)]
    assert by_rows == sorted(by_rows, reverse=True) and by_rows[0] > 2 and by_rows[-1] < 1
    assert speedup("16,4,4", 4, 64, 32768) > 2 * speedup("16,4,4", 4, 64, 512)


def test_the_measured_tau_follows_from_the_measured_rates():
    assert tau_of([0.8, 0.5]) == pytest.approx(1 + 0.8 + 0.4) and tau_of([]) == 1
    (run,) = [r for r in runs("engines") if (r["engine"], r["batch_size"]) == ("eagle_compiled", 1)]
    assert tau_of(run["acceptance_by_depth"]) == pytest.approx(run["tau"], rel=0.08)


def test_predictions_against_runs_that_it_was_not_fitted_to():
    """docs/scaling.md says so: one tree at two batch sizes tells of four trees, with this error.
    The cost of a cycle in plain steps: the same machine is faster on one day than on another."""
    device, errors = fit(runs("engines"), EMBEDDED), []
    for name in ("cycle", "capacity", "t08"):
        settings = ("batch_size", "temperature", "capacity")
        by = {(r["engine"], *map(r.get, settings)): r for r in runs(name)}
        for (engine, *key), run in by.items():
            plain = by.get(("vanilla_compiled", *key))
            if engine != "eagle_compiled" or plain is None:
                continue
            measured, tau = run["cycle_ms"] / plain["cycle_ms"], run["tau"]
            found = predict(EMBEDDED, device, run["tree"], tau, run["batch_size"], 128)
            errors.append(abs(found["pays_from"] / measured - 1))
            # who wins is right where it is not close
            if abs(tau / measured - 1) > 0.16:
                assert (found["speedup"] > 1) == (tau > measured)
    assert len(errors) >= 5 and statistics.mean(errors) < 0.12 and max(errors) < 0.22


def test_the_command(in_process):
    code, out, _ = in_process(costs.model, "--tau", 6.23, "--batch", "1,8")
    *table, last = out.splitlines()
    result = json.loads(last)
    assert code == 0 and len(table) == 4 and [run["batch"] for run in result["runs"]] == [1, 8]
    assert result["constants"]["bandwidth"] == 4.3e12
    path = RESULTS / "2026-11-21-cpu-engines.json"
    code, out, _ = in_process(costs.model, "--calibrate", path, "--acceptance", "0.8,0.7")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and 1e9 < result["constants"]["bandwidth"] < 1e12
