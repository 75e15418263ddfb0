"""The ablation on the embedded target: arms, nothing twice, and numbers that add up."""

import json

import numpy as np
import pytest

from configs.errors import ConfigError
from eagle.errors import EagleError
from examples.ablation import ARMS, KINDS, ablation, summarise, tau


@pytest.mark.slow
def test_every_arm_is_trained_once(called, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("examples.ablation.TEMPERATURES", ("0.8",))
    output = tmp_path / "ablation"
    options = {"output": str(output), "steps": 1, "prompts": 1, "new_tokens": 4}
    options["arms"] = "soft_ce,focal_2_target_prob"
    assert ablation(**options) == 0
    summary = json.loads((output / "ablation.json").read_text())
    assert list(summary["arms"]) == ["soft_ce", "focal_2_target_prob"] and summary["steps"] == 1
    for of in summary["arms"].values():
        assert of["0.8"]["tau"] >= 0 and set(KINDS) < of["0.8"].keys()
    config = (output / "heads/focal_2_target_prob/config.yaml").read_text()
    assert "gamma: 2.0" in config and "weight: target_prob" in config
    written = (output / "ablation.md").read_text()
    assert "| focal_2_target_prob |" in written and written in capsys.readouterr().out
    # again: a result that is gone is the only one made again
    gone, before = output / "measured/soft_ce-0.8.jsonl", len(called)
    gone.unlink()
    assert ablation(**options) == 0
    assert len(called) == before + 1 and called[-1][0] == "inference.generate" and gone.exists()


def test_tau_is_of_sums_and_differences_are_paired():
    rows = np.array([(10, 10), (40, 10), (10, 5), (10, 10)])
    assert tau(rows) == 70 / 35 and summarise(rows, rows)["fim"] == 4.0
    cycles = np.array([10 + n % 7 for n in range(40)])
    ours, theirs = (np.stack([2 * cycles - less, cycles], axis=1) for less in (0, 3))
    found = summarise(ours, theirs)
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["difference"] == pytest.approx(3 * 40 / sum(cycles))
    # prompts differ much, the arms' difference on one does not
    assert found["low"] > 0.15 and found["high"] < 0.35
    same = summarise(ours, ours)
    assert (same["difference"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_wrong_arguments(tmp_path):
    assert "on_policy" in ARMS
    with pytest.raises(ConfigError, match="unknown focus; use some of soft_ce"):
        ablation(output=str(tmp_path), arms="soft_ce,focus")
    with pytest.raises(EagleError, match="steps must be at least 1"):
        ablation(output=str(tmp_path), steps=0)
