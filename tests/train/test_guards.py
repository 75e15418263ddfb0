"""What stops a run or warns about it, each seen to do so."""

import json
import math

import numpy as np
import pytest
import torch
from head_helpers import config, rows_of
from torch import nn

from eagle.errors import EagleError
from train.head import accumulate, guards
from train.head.accumulate import Accumulator
from train.head.engine import Engine
from train.head.vocab import coverage, describe
from train.main import run


def weights_of(output):
    from safetensors.torch import load_file

    return load_file(output / "checkpoints" / "step-2" / "state.safetensors")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_names_the_parameter_and_stops_before_the_update(
    base, data, tmp_path, monkeypatch, zero
):
    update, updates = Engine.update, []
    monkeypatch.setattr(Engine, "update", lambda self: updates.append(1) or update(self))
    forward = Accumulator._forward

    def poisoned(self, batch, *rest):
        if self.step == 3:  # one gradient becomes infinite, the loss does not
            norm = self.parts.head.midlayer.input_layernorm
            norm.register_forward_hook(
                lambda module, inputs, out: out.register_hook(lambda g: g * math.inf) and None
            )
        return forward(self, batch, *rest)

    monkeypatch.setattr(Accumulator, "_forward", poisoned)
    expected = (
        r"^the gradient of midlayer.input_layernorm.weight is not finite at step 3, micro batch 1 of 1, "
        r"rank 0, rows \d+ \(.*fim.jsonl:\d+\), .*; lower train.lr"
    )
    with pytest.raises(EagleError, match=expected):
        run(config(base, data, tmp_path / "run", zero=zero, save_every=2), quiet=True)
    assert len(updates) == 2


def test_a_loss_that_is_not_finite_names_the_row_that_it_came_from(
    base, data, tmp_path, monkeypatch
):
    """One row's hidden states are not a number: that row is named, with its line, and no other."""
    bad = []
    states = accumulate.hidden_and_features

    def poisoned(source, ids, mask):
        hidden, features = states(source, ids, mask)
        hidden[1] = math.nan
        return hidden, features

    monkeypatch.setattr(accumulate, "hidden_and_features", poisoned)
    forward = Accumulator._forward
    monkeypatch.setattr(
        Accumulator,
        "_forward",
        lambda self, batch, *rest: bad.append(batch) or forward(self, batch, *rest),
    )
    with pytest.raises(EagleError, match="the loss is nan at step 1, micro batch 1 of 2") as error:
        run(config(base, data, tmp_path / "run", grad_accum=2), quiet=True)
    epoch, row = bad[0].places[1]
    named = str(error.value).split("rows ")[1].split(";")[0]
    assert named.startswith(f"{row} ({data}:") and named.count("jsonl") == 1
    line = int(named.split("jsonl:")[1].rstrip(")"))
    prefix = json.loads(data.read_text().splitlines()[line - 1])["prefix"]
    from records import load_tokenizer

    text = load_tokenizer(str(base)).decode(bad[0].input_ids[1])
    assert prefix.strip() in text


def test_the_weights_of_a_checkpoint_survive_a_value_that_is_not_finite(
    base, data, tmp_path, monkeypatch
):
    forward = Accumulator._forward

    def broken(self, *args):
        loss, sums = forward(self, *args)
        return (loss * math.nan if self.step == 4 else loss), sums

    monkeypatch.setattr(Accumulator, "_forward", broken)
    with pytest.raises(EagleError, match="the loss is nan at step 4.*rows .* and 4 more.*lower"):
        run(config(base, data, tmp_path / "run", save_every=2, batch_size=12), quiet=True)
    state = weights_of(tmp_path / "run")
    assert all(v.isfinite().all() for k, v in state.items() if k.startswith("weights/"))


def test_gradient_watch_sees_every_micro_batch():
    layer = nn.Linear(3, 2)
    watch = guards.GradientWatch(layer, torch.device("cpu"))
    layer(torch.ones(1, 3)).sum().backward()
    assert not watch.take().any()
    (layer(torch.ones(1, 3)) * torch.tensor([1.0, math.inf])).sum().backward()
    layer(torch.ones(1, 3)).sum().backward()
    found = watch.take()
    assert watch.names_of(found) == ["weight", "bias"] and not watch.take().any()


def losses(*parts):
    """Noisy runs of (steps, level)."""
    rng = np.random.default_rng(0)
    return [
        level * (1 + 0.03 * rng.standard_normal()) for steps, level in parts for _ in range(steps)
    ]


def warnings_of(values):
    watch = guards.LossWatch()
    return [text for step, loss in enumerate(values, 1) for text in watch.see(step, float(loss))]


def test_a_loss_spike_is_told_once_and_a_single_outlier_is_not():
    [said] = warnings_of(losses((100, 2.0), (40, 4.0), (60, 2.0)))
    assert said.startswith("loss spike at step 10") and "2" in said
    assert warnings_of(losses((100, 2.0), (1, 4.0), (100, 2.0))) == []
    falling = [5 * 0.99**n + 1 for n in range(280)]
    assert warnings_of(np.array(falling) * np.array(losses((280, 1.0)))) == []
    twice = warnings_of(losses((60, 2.0), (20, 4.0), (150, 2.0), (20, 4.0)))
    assert [text.split(" at ")[0] for text in twice] == ["loss spike", "loss spike"]


def test_a_plateau_is_told_after_steps_without_gain():
    falling = list(np.geomspace(5, 2, 200))
    [said] = warnings_of(falling + [2.0] * 320)
    assert said.startswith("loss plateau at step 5") and "300 steps" in said
    assert warnings_of(list(np.geomspace(5, 1, 900))) == []


def test_warnings_are_in_metrics_and_summary_and_survive_a_resume(
    base, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(guards.LossWatch, "WARM_UP", 2)
    monkeypatch.setattr(guards.LossWatch, "PLATEAU", 2)
    more = {"max_steps": 6, "lr": 1e-9, "log_every": 100, "save_every": 5, "save_total_limit": 9}
    assert run(config(base, data, tmp_path / "run", **more), quiet=True) == 0
    rows = rows_of(tmp_path / "run")
    warned = [text for row in rows for text in row.get("warnings", [])]
    assert warned and all("plateau" in text for text in warned)
    assert {"loss_smoothed"} <= rows[0].keys()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["warnings"] == warned
    start = str(tmp_path / "run/checkpoints/step-5")
    assert run(config(base, data, tmp_path / "more", resume=start, **more), quiet=True) == 0
    assert json.loads((tmp_path / "more/summary.json").read_text())["warnings"] == warned


def test_too_little_supervision_is_refused(base, data, tmp_path):
    with pytest.raises(EagleError, match=r"supervises \d+ tokens, fewer than data.min_supervised"):
        run(
            config(base, data, tmp_path / "run", data_more={"min_supervised_tokens": 10**6}),
            quiet=True,
        )
    assert not (tmp_path / "run").exists()


def test_coverage_is_told_by_source():
    fim, chat = np.array([5, 0, 5, 0]), np.array([0, 9, 1, 0])
    report = coverage(fim + chat, np.array([0, 2]), [3], {"fim": fim, "chat": chat})
    assert report["coverage_by_source"] == {"fim": 1.0, "chat": 0.1}
    assert report["special_tokens"] == 0 and report["coverage"] == 11 / 20
    assert describe(report).endswith("hold 55.00% of what is supervised (fim 100.00%, chat 10.00%)")


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**58)
    assert guards.out_of_memory(error.value)
    assert guards.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not guards.out_of_memory(RuntimeError("shapes do not match"))
    assert not guards.out_of_memory(ValueError("can't allocate memory"))
