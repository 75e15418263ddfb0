"""A run on several sources: their shares, loss weights and metrics."""

import json
from types import SimpleNamespace

import pytest
import torch
from data_helpers import chat, write_jsonl
from head_helpers import losses_of, require_same_tensors, rows_of, trained, write_fim

from train.head.metrics import COLUMNS, SourceMetrics, by_source


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_fim(folder / "fim.jsonl", rows=60)
    write_jsonl(
        folder / "chat.jsonl", [chat(f"Add {n}?", f"return {n} + value") for n in range(40)]
    )
    return folder


def mixed(base, files, output, loss_weights=(1.0, 1.0), **more):
    mixture = [
        {"format": name, "path": str(files / f"{name}.jsonl"), "loss_weight": weight}
        for name, weight in zip(("fim", "chat"), loss_weights, strict=True)
    ]
    rows = {"format": "mixed", "path": None, "mixture": mixture, "cache_dir": str(files / "cache")}
    return trained(base, files / "fim.jsonl", output, data_more=rows, **more)


LONG = {"max_steps": 20, "batch_size": 8, "save_every": 10, "log_every": 4}  # an epoch passes
LONG["eval"] = {"num_prompts": 5}


@pytest.fixture(scope="module")
def whole(base, files, tmp_path_factory):
    return mixed(base, files, tmp_path_factory.mktemp("runs") / "whole", **LONG)


def test_metrics_and_evaluation_are_told_by_source(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [1, 4, 8, 12, 16, 20]
    last = rows[-1]["sources"]
    assert last.keys() == {"fim", "chat"}
    for values in last.values():
        assert values["loss"] > 0 and len(values["acceptance_by_depth"]) == 3
        assert values["targets"] > rows[-1]["targets"] / 8  # of four steps, since the row before
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["final"]["sources"].keys() == {"fim", "chat"}
    assert summary["draft_vocabulary"]["coverage_by_source"].keys() == {"fim", "chat"}
    evaluation = summary["evaluations"][-1]["sources"]
    assert evaluation["fim"]["prompts"] + evaluation["chat"]["prompts"] == 5
    assert {"tau", "acceptance_by_depth"} <= evaluation["chat"].keys()


def test_a_mixture_resumes_bit_for_bit(whole, base, files, tmp_path):
    cut = mixed(base, files, tmp_path / "cut", resume=str(whole / "checkpoints/step-10"), **LONG)
    require_same_tensors(whole / "head/model.safetensors", cut / "head/model.safetensors")
    expected = {row["step"]: row["sources"] for row in rows_of(whole)}
    assert all(row["sources"] == expected[row["step"]] for row in rows_of(cut))


def test_a_source_of_no_weight_leaves_the_gradient_of_the_other(base, files, tmp_path):
    """With 1e-6 beside 1, gradient and loss are those of the other source's rows alone."""
    found = {}
    for name, weights in (("both", (1, 1)), ("fim", (1, 1e-6)), ("chat", (1e-6, 1))):
        output = mixed(base, files, tmp_path / name, weights, max_steps=1, batch_size=8)
        [found[name]] = rows_of(output)
    for name in ("fim", "chat"):
        loss = pytest.approx(found["both"]["sources"][name]["loss"], rel=1e-3)
        assert found[name]["loss"] == loss == found[name]["sources"][name]["loss"]
        assert found[name]["grad_norm"] != pytest.approx(found["both"]["grad_norm"], rel=1e-2)


def test_the_cut_into_micro_batches_leaves_loss_weights_alone(base, files, tmp_path):
    more = {"max_steps": 3, "lr": 1e-4, "loss_weights": (3.0, 0.5)}
    whole = mixed(base, files, tmp_path / "whole", batch_size=8, **more)
    parts = mixed(base, files, tmp_path / "parts", batch_size=2, grad_accum=4, zero=1, **more)
    assert losses_of(whole) == pytest.approx(losses_of(parts), rel=1e-5)
    norms = [[row["grad_norm"] for row in rows_of(x)] for x in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_source_metrics_weigh_what_is_minimised_alone():
    sums = torch.zeros(3, 2, len(COLUMNS))  # rows
    column = {name: i for i, name in enumerate(COLUMNS)}
    sums[..., column["targets"]] = 2.0
    sums[0, :, column["loss"]], sums[1, :, column["loss"]], sums[2, :, column["loss"]] = 2, 4, 10
    found = by_source(sums, torch.tensor([0, 0, 1]), 2)
    pair = [SimpleNamespace(name=n, loss_weight=weight) for n, weight in (("a", 1.0), ("b", 3.0))]
    metrics = SourceMetrics(pair, [1.0, 0.5])
    row = metrics.step(found)
    assert row["loss_by_depth"] == pytest.approx([(6 + 3 * 10) / (4 + 3 * 2)] * 2)
    assert row["loss"] == pytest.approx(1.5 * 3.6) and row["targets"] == 6
    told = metrics.take()
    assert told["a"]["loss"] == pytest.approx(1.5 * 1.5) and told["b"]["targets"] == 2
    assert metrics.take() == {}
