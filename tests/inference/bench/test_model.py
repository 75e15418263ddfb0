"""The cost model: its arithmetic, its limits, and how far it is from what was measured."""

import json
import statistics
from pathlib import Path

import pytest

from eagle.errors import EagleError
from inference import scaling
from inference.bench.model import DEVICES, EMBEDDED, Device, Model, predict, tau_of

RESULTS = Path(__file__).parents[2] / "docs" / "results"
LLAMA_8B = Model.of(8.03e9, 32, 8, 128, 4096)


def runs(name):
    return scaling.read_runs(str(RESULTS / f"2026-11-21-cpu-{name}.json"))


def test_a_known_model_has_its_known_size():
    assert (
        LLAMA_8B.kv == 131072
    )  # bytes a token: 32 layers, keys and values, 8 heads of 128, 16 bits
    assert LLAMA_8B.read == pytest.approx(7.5e9, rel=0.01)
    # fc 50 M, attention 84 M, MLP 176 M, LM head of 32,000 tokens 131 M
    assert LLAMA_8B.head == pytest.approx(425e6, rel=0.05)


def test_a_head_is_as_large_as_a_real_one():
    from inference.bench.gpu.models import parameters
    from inference.bench.gpu.sizes import LLAMA_8B as SHAPE

    assert parameters(SHAPE) == pytest.approx(8.03e9, rel=0.001)
    assert Model.of(parameters(SHAPE), 32, 8, 128, 4096).read == pytest.approx(
        LLAMA_8B.read, rel=1e-3
    )


def test_a_pass_that_only_reads_costs_its_bytes():
    ideal = Device("x", 1e12, 1e20, layer_s=0, cycle_s=0, plain_s=0, draft_s=0)
    made = predict(LLAMA_8B, ideal, "60,7,10", 5.0, rows=1, context=1000)
    read = 2 * LLAMA_8B.read + 1000 * LLAMA_8B.kv
    head = 2 * LLAMA_8B.head + 1000 * LLAMA_8B.kv / 32
    assert made.plain_ms == pytest.approx(1e3 * read / 1e12)
    assert made.verify_ms == pytest.approx(made.plain_ms)
    assert made.draft_ms == pytest.approx(8e3 * head / 1e12)
    assert made.speedup == pytest.approx(5 * made.plain_ms / made.cycle_ms)
    assert made.break_even == pytest.approx(made.cycle_ms / made.plain_ms)


def test_speculation_stops_paying_with_rows_and_pays_again_with_context():
    h200 = DEVICES["h200"]
    speedups = [
        predict(LLAMA_8B, h200, "60,7,10", 5, rows, 2048).speedup for rows in (1, 4, 16, 64)
    ]
    assert speedups == sorted(speedups, reverse=True) and speedups[0] > 2 and speedups[-1] < 1
    few, many = (predict(LLAMA_8B, h200, "16,4,4", 4, 64, n).speedup for n in (512, 32768))
    assert many > 2 * few


def test_reading_and_multiplying_in_turns_costs_their_sum():
    turns = Device("x", 1e12, 1e12, overlap=1, layer_s=0)
    assert scaling.pass_s(turns, 1e9, 2, 4, 0, 1) == pytest.approx(2e-3 + 8e-3)
    both = Device("x", 1e12, 1e12, overlap=50, layer_s=0)
    assert scaling.pass_s(both, 1e9, 2, 4, 0, 1) == pytest.approx(8e-3, rel=1e-3)


def test_tau_of_acceptance_by_depth():
    assert tau_of([0.8, 0.5]) == pytest.approx(1 + 0.8 + 0.4)
    assert tau_of([]) == 1
    with pytest.raises(EagleError, match="0 … 1"):
        tau_of([1.2])


def test_the_measured_tau_follows_from_the_measured_rates():
    (run,) = [
        r for r in runs("engines") if r["engine"] == "eagle_compiled" and r["batch_size"] == 1
    ]
    assert tau_of(run["acceptance_by_depth"]) == pytest.approx(run["tau"], rel=0.08)


def test_predictions_against_runs_that_it_was_not_fitted_to():
    """docs/scaling.md says so: one tree at two batch sizes tells of four trees, with this error."""
    device = scaling.calibrate(runs("engines"), EMBEDDED, "cpu")
    checks = [
        c
        for name in ("cycle", "capacity", "t08")
        for c in scaling.check(runs(name), EMBEDDED, device)
    ]
    errors = [abs(c.error) for c in checks]
    assert len(errors) == 8 and statistics.mean(errors) < 0.12 and max(errors) < 0.22
    # who wins is right where it is not close
    for c in checks:
        if abs(c.tau / c.measured - 1) > 0.16:
            assert (c.tau / c.predicted > 1) == (c.tau / c.measured > 1), c


def test_a_device_is_found_again_from_its_own_cycles():
    true = Device("x", 2e10, 5e11, 1, 0, 3e-4, 0, draft_s=2e-5, draft_token_s=1e-5)
    model = Model(1e7, 2e6, 8, 0)  # the bench's contexts are short: nothing is fitted to them
    made = []
    for batch in (1, 4, 16):
        common = {"batch_size": batch, "commit_ms": 0.0}
        for tree in ("8,4,2", "30,5,6"):
            p = predict(model, true, tree, 3.0, batch, 100)
            made.append(
                {
                    "engine": "eagle_compiled",
                    "tree": tree,
                    "tau": 3.0,
                    "draft_ms": p.draft_ms,
                    "verify_ms": p.verify_ms + 1e3 * true.cycle_s,
                    "cycle_ms": p.cycle_ms,
                    **common,
                }
            )
        made.append({"engine": "vanilla_compiled", "tree": None, "cycle_ms": p.plain_ms, **common})
    found = scaling.calibrate(made, model, "y")
    for name in ("bandwidth", "flops", "cycle_s", "draft_s", "draft_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3), name
    with pytest.raises(EagleError, match="vanilla_compiled"):
        scaling.calibrate([], model, "y")


def test_a_device_from_the_gpu_suite(tmp_path, capsys):
    data = {
        "device": "cuda",
        "environment": {"accelerator": "GPU"},
        "cases": [
            {"kind": "plain", "rows": 1, "error": "no"},
            {
                "kind": "model",
                "layers": 32,
                "target_bytes": 15e9,
                "head_bytes": 8.5e8,
                "kv_bytes_per_token": 131072,
                "copy_bytes_per_second": 4e12,
            },
            {"kind": "plain", "rows": 1, "context": 2000, "graphed_ms": 4.2},
            {"kind": "draft", "rows": 1, "per_pass_ms": 0.3},
        ],
    }
    model, device = scaling.from_suite(data)
    assert predict(model, device, "16,4,4", 4, 1, 2000).plain_ms == pytest.approx(4.2, rel=1e-3)
    assert device.name == "GPU" and device.draft_s > 0
    (tmp_path / "engine.json").write_text(json.dumps(data))
    assert scaling.main(["--calibrate", str(tmp_path / "engine.json"), "--tau", "4"]) == 0
    assert "GPU: 4000 GB/s" in capsys.readouterr().out
    with pytest.raises(EagleError, match="no case draft"):
        scaling.from_suite(data | {"cases": data["cases"][:3]})


def test_the_arithmetic_of_training_at_scale():
    found = scaling.head_training(
        LLAMA_8B, 4096, DEVICES["h200"], gpus=1000, mfu=0.4, steps=7, tokens_a_step=16384
    )
    assert found["feature_bytes_a_token"] == 32768
    assert found["flops_a_token"] == 2 * LLAMA_8B.read + 42 * LLAMA_8B.head
    rate = 1000 * 7.9e14 * 0.4
    assert found["online_tokens_per_s"] == pytest.approx(rate / found["flops_a_token"])
    assert found["store_read_bytes_per_s"] == pytest.approx(found["offline_tokens_per_s"] * 32768)


def test_the_command(capsys):
    assert scaling.main(["--tau", "6.23", "--batch", "1,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].split()[0] == "1" and lines[3].split()[0] == "8"
    path = str(RESULTS / "2026-11-21-cpu-engines.json")
    assert scaling.main(["--calibrate", path, "--check", path]) == 0
    assert "mean error" in capsys.readouterr().out
    assert scaling.main(["--acceptance", "0.8,0.7", "--train_gpus", "1000"]) == 0
    assert "store_read_bytes_per_s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--tau, or --acceptance"),
        (["--tau", "3", "--device", "cray"], "unknown device"),
        (["--tau", "3", "--batch", "1,x"], "list of numbers"),
        (["--tau", "3", "--batch", "0"], "above 0"),
        (["--tau", "3", "--params", "1e8"], "less than the embedding"),
        (["--tau", "3", "--tree", "60"], "total_token,depth,top_k"),
        (["--check", "nowhere.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_answered_is_refused(arguments, words, capsys):
    assert scaling.main(arguments) == 1
    assert words in capsys.readouterr().err
