"""The ablation on a tiny target: every arm once, nothing twice, and numbers that add up."""

import json

import pytest
from head_helpers import save_tiny_model

from configs.errors import ConfigError
from eagle.errors import EagleError
from examples.ablation import ARMS
from examples.ablation_table import KINDS, paired, summarise, tau_of
from train import ablation as study


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, tokenizer_dir)
    return folder


def run(base, output, **options):
    return study.ablation(
        output=str(output), base=str(base), **{"steps": 3, "prompts": 1, "new_tokens": 6, **options}
    )


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path_factory.getbasetemp() / "ablation_cache"))


def test_every_arm_is_trained_once(base, tmp_path, monkeypatch, capsys):
    output = tmp_path / "ablation"
    assert run(base, output) == 0
    summary = json.loads((output / "ablation.json").read_text())
    assert [a["arm"] for a in summary["arms"]] == [a.name for a in ARMS] and summary["steps"] == 3
    for entry in summary["arms"]:
        for temperature in ("temperature 0", "temperature 0.8"):
            assert entry[temperature]["tau"] >= 0 and set(KINDS) < entry[temperature].keys()
    answers = {r["arm"]: r["answers"] for r in summary["results"]}
    assert answers.pop("on_policy") == "written by the target" and set(answers.values()) == {
        "as in the data"
    }
    configs = {a.name: (output / "runs" / f"{a.name}-0" / "config.yaml").read_text() for a in ARMS}
    assert (
        "gamma: 1.0" in configs["focal_1_overlap"]
        and "weight: target_prob" in configs["focal_2_target_prob"]
    )
    assert str(output / "features") in configs["kl"] and "features: null" in configs["fim_only"]
    heads = {
        a.name: (output / "runs" / f"{a.name}-0" / "head" / "model.safetensors").read_bytes()
        for a in ARMS
    }
    assert len(set(heads.values())) >= len(ARMS) - 1  # kl is soft_ce less a constant
    written = (output / "ablation.md").read_text()
    assert all(f"| {a.name} |" in written for a in ARMS) and written in capsys.readouterr().out
    # again: nothing is trained; a result that is gone is the only one made again, and the same
    trained = []
    monkeypatch.setattr(
        study.Study, "_run", lambda *a, **k: trained.append(a[3].name) or _run(*a, **k)
    )
    gone = output / "arms" / "kl-0.json"
    before = json.loads(gone.read_text())
    gone.unlink()
    assert run(base, output) == 0
    assert trained == ["kl-0"] and json.loads(gone.read_text())["measured"] == before["measured"]
    with pytest.raises(EagleError, match="holds an ablation with asked=.*choose another --output"):
        run(base, output, steps=4)


_run = study.Study._run


def test_a_signal_stops_and_the_same_command_goes_on(base, tmp_path, monkeypatch):
    """`train.main.run` returns 143 after SIGTERM: no result of that arm, no further arm."""
    options, trained = {"arms": "soft_ce,overlap,kl", "steps": 2}, []

    def stopped(self, loss, data, output, *rest, **more):
        trained.append(output.name)
        return 143 if loss else _run(self, loss, data, output, *rest, **more)

    monkeypatch.setattr(study.Study, "_run", stopped)
    assert run(base, tmp_path / "out", **options) == 143
    assert trained == ["soft_ce-0", "overlap-0"]
    assert [p.name for p in (tmp_path / "out" / "arms").iterdir()] == ["soft_ce-0.json"]
    assert not (tmp_path / "out" / "ablation.json").exists()
    monkeypatch.setattr(study.Study, "_run", _run)
    assert run(base, tmp_path / "out", **options) == 0


def test_minutes_become_steps_once(base, tmp_path):
    assert run(base, tmp_path / "out", steps=None, minutes=0.01, seeds=2, arms="soft_ce,kl") == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["steps"] >= 1 and plan["rows"] == 8 * plan["steps"]
    summary = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [r["seed"] for r in summary["results"]] == [0, 0, 1, 1]
    assert summary["arms"][0]["temperature 0"]["spread"] is not None
    assert "±" in (tmp_path / "out" / "ablation.md").read_text()
    assert not (tmp_path / "out" / "calibration").exists()


def measured(gained, cycles, temperature=0.0):
    return [
        {"kind": KINDS[n % 4], "temperature": temperature, "gained": g, "cycles": c}
        for n, (g, c) in enumerate(zip(gained, cycles, strict=True))
    ]


def result(arm, rows):
    rows = rows + [{**r, "temperature": 0.8} for r in rows]
    return {"arm": arm, "group": "loss", "answers": "", "train_seconds": 1.0, "measured": rows}


def test_tau_is_of_sums_and_differences_are_paired():
    rows = measured([10, 40, 10, 10], [10, 10, 5, 10])
    assert (
        tau_of(rows, 0.0) == 70 / 35
        and tau_of(rows, 0.0, "fim") == 4.0
        and tau_of(rows, 0.8) == 0.0
    )
    cycles = [10 + n % 7 for n in range(40)]
    ours, theirs = [2 * c for c in cycles], [2 * c - 3 for c in cycles]
    difference, low, high = paired(
        [result("kl", measured(ours, cycles))], [result("soft_ce", measured(theirs, cycles))], 0.0
    )
    assert low <= difference <= high and difference == pytest.approx(3 * 40 / sum(cycles))
    assert low > 0.15 and high < 0.35  # prompts differ much, the arms' difference on one does not
    same = paired(
        [result("kl", measured(ours, cycles))], [result("soft_ce", measured(ours, cycles))], 0.0
    )
    assert same == (0.0, 0.0, 0.0)
    entries = summarise(
        [result("soft_ce", measured(theirs, cycles)), result("kl", measured(ours, cycles))]
    )
    assert (
        "difference" not in entries[0]["temperature 0"] and entries[1]["temperature 0"]["low"] > 0
    )


def test_wrong_arguments(base, tmp_path):
    with pytest.raises(ConfigError, match="--steps N or --minutes M"):
        study.ablation(output=str(tmp_path))
    with pytest.raises(ConfigError, match="unknown focus; use some of soft_ce"):
        run(base, tmp_path / "out", arms="soft_ce,focus")
    with pytest.raises(ConfigError, match="--seeds=0"):
        run(base, tmp_path / "out", seeds=0)
