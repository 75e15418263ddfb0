"""What a run leaves to be seen: rows, events, traces, and a page made of them; also of a run that
was killed.
"""

import json
import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import commands
import pytest
import torch
import yaml
from head_helpers import config, rows_of, save_tiny_model, write_fim
from test_tracking import tensorboard_scalars

from eagle.errors import EagleError
from train.head.distributed import World
from train.head.seeing.card import mask_statistics
from train.head.seeing.perf import FlopCount
from train.head.seeing.recorder import Recorder
from train.head.seeing.report import read_run, render, write_report
from train.head.seeing.svg import MOST, bar_chart, line_chart, short, thin, ticks
from train.main import run
from train.report import report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, tokenizer_dir)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "fim.jsonl"
    write_fim(path)
    return path


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """12 steps of two sources, all trackers that need no network, a profile, evaluations."""
    output = tmp_path_factory.mktemp("runs") / "seen"
    mixture = [
        {"format": "fim", "path": str(data), "name": "<code>"},
        {"format": "fim", "path": str(data)},
    ]
    cfg = config(
        base,
        data,
        output,
        max_steps=12,
        eval_every=6,
        perf_every=4,
        profile=2,
        log_every=2,
        report_to=["tensorboard"],
        eval={"num_prompts": 2},
        data_more={"format": "mixed", "path": None, "mixture": mixture},
    )
    assert run(cfg, quiet=True) == 0
    return output


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Page(HTMLParser):
    """Tags that are open, and every link to somewhere."""

    def __init__(self, html):
        super().__init__()
        self.open, self.links, self.captions = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        assert tag != "script"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "figcaption":
            self.captions.append(text)


def test_a_run_leaves_rows_at_their_own_frequencies(finished):
    assert [row["step"] for row in rows_of(finished)] == [1, 2, 4, 6, 8, 10, 12]
    perf = lines_of(finished / "perf.jsonl")
    assert [row["step"] for row in perf] == [4, 8, 12]
    for row in perf:
        assert sum(v for k, v in row["ratio"].items() if k != "forward") == pytest.approx(
            1, abs=1e-4
        )
        assert (
            min(row["seconds"][k] for k in ("data", "target", "head", "backward", "optimizer")) > 0
        )
        assert row["gflops_per_second"] > 0 and row["tokens_per_second"] > 0 and "mfu" not in row
    events = lines_of(finished / "events.jsonl")
    assert [(e["kind"], e["step"]) for e in events] == [
        ("start", 0),
        *(("evaluation", s) for s in (0, 6, 12)),
    ]
    trace = json.loads((finished / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in trace]
    assert names.count("train.step") == 2 and "train.target" in names and "train.backward" in names


def test_trackers_get_what_the_files_hold(finished):
    found = tensorboard_scalars(finished / "tensorboard")
    row = rows_of(finished)[-1]
    assert ("train/loss", 12, pytest.approx(row["loss"], rel=1e-5)) in found
    assert ("train/sources/fim/loss", 12) in {(tag, step) for tag, step, _ in found}
    tags = {tag for tag, _, _ in found}
    assert {
        "train/acceptance_by_depth/3",
        "heldout/tau",
        "perf/ratio/backward",
        "perf/memory/resident",
    } <= tags


def test_the_card_says_what_the_run_was_made_of(finished, data):
    card = json.loads((finished / "run.json").read_text())
    assert card["environment"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for stats in card["masks"].values():
        assert 0 < stats["rows"] <= len(rows) and stats["supervised_tokens"] < stats["tokens"]
        assert sum(stats["row_length"]["counts"]) == stats["rows"]
    whole = card["data"]
    assert whole["supervised_tokens"] == sum(s["supervised_tokens"] for s in card["masks"].values())
    assert list(card["masks"]) == ["<code>", "fim"] and card["head"]["parameters"] > 1000


def test_the_page_needs_nothing_else_and_shows_everything(finished):
    html = (finished / "report.html").read_text()
    page = Page(html)
    assert page.links == [] and "://" not in html
    for text in (
        "loss, weighted sum",
        "loss by depth",
        "conditional acceptance by depth, training rows",
        "conditional acceptance by depth, held-out",
        "loss by source",
        "share of a step",
        "memory, GiB",
        "row length, rows",
        "learning rate",
    ):
        assert any(text in caption for caption in page.captions), text
    for text in ("finished", "train.max_steps", "transformers", "&lt;code&gt;", "coverage", "12"):
        assert text in html
    assert "<code>" not in html and html.count("<svg") >= 15


def test_a_killed_run_has_a_page_too(finished, tmp_path):
    copy = tmp_path / "killed"
    copy.mkdir()
    for name in ("config.yaml", "run.json", "events.jsonl", "perf.jsonl"):
        (copy / name).write_bytes((finished / name).read_bytes())
    (copy / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text()[:-40])
    done = commands.run("train.report", copy)
    assert done.returncode == 0 and done.stdout.strip() == str(copy / "report.html"), done.stderr
    html = (copy / "report.html").read_text()
    Page(html)
    assert "no summary: still running, stopped, or killed" in html
    assert "1 lines of metrics.jsonl cannot be read" in html and "held-out" in html
    shown = read_run(copy)
    assert [row["step"] for row in shown.rows] == [1, 2, 4, 6, 8, 10] and len(
        shown.evaluations
    ) == 3


def test_the_report_command_says_what_is_wrong(finished, tmp_path):
    for runs, out, text in (
        ([tmp_path], None, "holds no training run"),
        ([], None, "give one run folder"),
        ([finished], ROOT / "setup.py" / "x", "choose another --out"),
    ):
        with pytest.raises(EagleError, match=text):
            report(*map(str, runs), out=out and str(out))
    assert report(str(finished), out=str(tmp_path / "new" / "page.html")) == 0
    assert (tmp_path / "new" / "page.html").read_text() == (finished / "report.html").read_text()


def test_a_resumed_run_repeats_nothing_and_counts_its_starts(base, data, tmp_path):
    output = tmp_path / "run"
    settings = {
        "save_every": 3,
        "log_every": 1,
        "perf_every": 2,
        "report_to": [],
        "eval": {"num_prompts": 2},
    }
    assert run(config(base, data, output, max_steps=5, **settings), quiet=True) == 0
    (output / "summary.json").unlink()
    for name in ("metrics", "perf", "events"):  # as if the process had been killed within step 5
        with open(output / f"{name}.jsonl", "a") as file:
            file.write('{"step": 99, "kind": "warning", "text": "late"}\n{"st')
    shutil.rmtree(output / "checkpoints" / "step-5")
    assert run(config(base, data, output, max_steps=6, resume="auto", **settings), quiet=True) == 0
    assert [row["step"] for row in rows_of(output)] == list(range(1, 7))
    shown = read_run(output)
    assert [row["step"] for row in shown.perf] == [2, 4, 6] and shown.damaged == []
    assert shown.starts == 2 and [e["step"] for e in shown.evaluations] == [0, 6]
    assert "1 times" in (output / "report.html").read_text()


def test_a_run_with_a_tracker_that_is_not_there_does_not_begin(base, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    with pytest.raises(EagleError, match="pip install wandb"):
        run(config(base, data, tmp_path / "run", report_to=["wandb"]), quiet=True)
    assert not (tmp_path / "run").exists()


# the recorder alone


def recorder(output, **train):
    cfg = config("base", output / "d.jsonl", output, **{"report_to": [], "log_every": 1, **train})
    (output / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    flops = FlopCount(1, 1, 1, 1, 1, 1, 1, 1, 1)
    world = World(0, 1, torch.device("cpu"))
    return Recorder(cfg, output, world, flops=flops, rows_per_step=4, total=3)


def metrics_row(step):
    return {
        "step": step,
        "loss": 1.0 / step,
        "acceptance_by_depth": [0.5],
        "tau_simulated": 1.5,
        "targets": 4,
        "tokens": 9,
        "tokens_per_second": 9.0,
        "steps_per_second": 1.0,
        "seconds": {"data": 0.1},
    }


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tmp_path, capsys):
    class Failing:
        calls = 0

        def log(self, step, values):
            Failing.calls += 1
            raise ConnectionError("the server\nis gone")

        def close(self):
            raise AssertionError("dropped trackers are not closed")

    seen = recorder(tmp_path)
    with seen.running(0, {}):
        seen.trackers["wandb"] = Failing()
        for step in (1, 2):
            seen.begin(step)
            seen.step(metrics_row(step), step / 3, 1.0, 1.0, keep=True)
    assert Failing.calls == 1
    text = "wandb failed and gets nothing more of this run: the server is gone"
    assert f"warning: {text}" in capsys.readouterr().err
    assert read_run(tmp_path).warnings == [f"step 1: {text}"] and len(rows_of(tmp_path)) == 2


def test_warnings_of_loggers_are_shown_and_kept(tmp_path, capsys):
    seen = recorder(tmp_path)
    with seen.running(0, {}):
        seen.begin(2)
        logging.getLogger("records").warning("%d rows were set aside", 3)
        logging.getLogger("records").info("not this")
        seen.warn("loss spike")
    logging.getLogger("records").warning("after the run")
    assert read_run(tmp_path).warnings == ["step 2: 3 rows were set aside", "step 2: loss spike"]
    assert "warning: 3 rows were set aside" in capsys.readouterr().err


def test_a_run_that_fails_leaves_its_page(tmp_path):
    seen = recorder(tmp_path)
    with pytest.raises(EagleError, match="loss is nan"), seen.running(0, {}):
        seen.step(metrics_row(1), 0.5, 1.0, 1.0, keep=True)
        raise EagleError("loss is nan")
    assert "killed" in (tmp_path / "report.html").read_text()


def test_a_disk_that_is_full_at_the_end_does_not_undo_the_run(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    seen = recorder(tmp_path)
    with seen.running(0, {}):
        monkeypatch.setattr("train.head.seeing.report.atomic_write_text", full)
    assert f"make space and run python -m train.report {tmp_path}" in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path):
    seen = recorder(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    seen.world = World(1, 2, torch.device("cpu"))
    with seen.running(0, {}):
        seen.begin(1)
        seen.step(metrics_row(1), 0.5, 1.0, 1.0, keep=True)
        seen.evaluation({"step": 1, "tau": 2.0})
        seen.warn("x")
    assert list((tmp_path / "run").iterdir()) == []


# what the files themselves warn about


def page_of(folder, **files):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("")
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("_json", ".json").replace("_yaml", ".yaml")).write_text(text)
    return read_run(folder)


def test_the_page_draws_conclusions(tmp_path):
    card = {
        "data": {"rows": 10, "truncated": 5, "bad": 2, "records": 12},
        "draft_vocabulary": {"coverage": 0.8},
    }
    taus = [{"step": s, "tau": t} for s, t in ((0, 1.0), (5, 3.0), (10, 2.0))]
    shown = page_of(tmp_path / "a", run_json=card, summary_json={"evaluations": taus})
    joined = " ".join(shown.warnings)
    for text in (
        "5 of 10 rows were cut",
        "2 of 12 records were unusable",
        "holds 80.0%",
        "fell from 3.000 to 2.000",
    ):
        assert text in joined
    assert "None." in render(page_of(tmp_path / "b"))


def test_files_that_cannot_be_read_are_told(tmp_path):
    shown = page_of(tmp_path / "a", run_json="{", summary_json="[1]", config_yaml="a: [")
    assert len(shown.warnings) == 3 and all("cannot be read" in text for text in shown.warnings)
    Page(render(shown))
    with pytest.raises(EagleError, match="holds no training run"):
        write_report(tmp_path)


# drawing


def test_ticks_enclose_the_data_with_round_steps():
    for low, high in (
        (0.0, 1.0),
        (3.0, 3.0),
        (-2.5, 17.0),
        (1e-6, 3e-6),
        (0.0, 0.0),
        (1e9, 1e9 + 5),
    ):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert [short(v) for v in (0.0, 1234567, 12000, 999, 0.00031, 0.25)] == [
        "0",
        "1.235M",
        "12k",
        "999",
        "0.00031",
        "0.25",
    ]


def test_charts_hold_what_is_finite_and_escape_names():
    svg = line_chart({"<b>": [(0, 1.0), (1, float("nan")), (2, 3.0)], "empty": [(0, None)]})
    [points] = re.findall(r'points="([^"]*)"', svg)
    assert len(points.split()) == 2 and "&lt;b&gt;" in svg and "<b>" not in svg
    assert (
        line_chart({"a": []}) == line_chart({}) == bar_chart([], []) == bar_chart([0], [0, 1]) == ""
    )
    many = [(n, float(n)) for n in range(MOST * 3 + 1)]
    assert len(thin(many)) <= MOST and sum(y for _, y in thin(many[:-1])) * 3 == sum(
        y for _, y in many[:-1]
    )
    assert bar_chart([1, 2], [0.0, 0.5, 1.0]).count("<rect") == 2
    log = line_chart({"a": [(0, 1e-3), (1, 1e3)]}, log=True)
    assert ">100<" in log and ">0.01<" in log


def test_mask_statistics_count():
    import numpy as np

    stats = mask_statistics(np.array([10, 20]), np.array([5, 5]))
    assert (stats["rows"], stats["tokens"], stats["supervised_tokens"]) == (2, 30, 10)
    assert stats["supervised_share"] == pytest.approx(1 / 3)
    assert sum(stats["supervised_share_of_row"]["counts"]) == 2
    assert mask_statistics(np.array([]), np.array([]))["row_length"] == {}
