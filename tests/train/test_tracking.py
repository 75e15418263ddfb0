"""What a run leaves to be seen: rows, events, trackers, a trace, and a page made of them; also of a
run that was killed."""

import importlib.util
import json
import logging
import re
import shutil
import struct
import sys
import time
from importlib.machinery import ModuleSpec
from unittest.mock import Mock

import pytest
import torch
from data_helpers import read_jsonl
from head_helpers import config, rows_of

from configs.load import load_config
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from train.head.distributed import World
from train.head.metrics import Progress
from train.main import run
from train.report import report
from train.tracking.perf import PerfMeter
from train.tracking.recorder import Recorder
from train.tracking.report import RunFiles, render
from train.tracking.trackers import PACKAGES, open_trackers, require_installed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """12 steps of two sources, with TensorBoard, a profile and evaluations."""
    output = tmp_path_factory.mktemp("runs") / "seen"
    source = {"format": "fim", "path": str(data)}
    mixed = {"format": "mixed", "path": None, "mixture": [source | {"name": "<code>"}, source]}
    often = dict(max_steps=12, eval_every=6, perf_every=4, profile=2, log_every=2)
    more = dict(report_to=["tensorboard"], eval={"num_prompts": 2}, data_more=mixed)
    assert run(config(base, data, output, **often, **more), quiet=True) == 0
    return output


def tensorboard_scalars(folder):
    """(tag, step, value) of all event files: records are length, its checksum, bytes, their
    checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        raw, place = path.read_bytes(), 0
        while place < len(raw):
            (size,) = struct.unpack_from("<Q", raw, place)
            event = Event.FromString(raw[place + 12 : place + 12 + size])
            place += 12 + size + 4
            values = (v for v in event.summary.value if v.HasField("simple_value"))
            found += [(v.tag, event.step, v.simple_value) for v in values]
            if event.session_log.status == event.session_log.START:
                found.append(("purge", event.step, 0.0))
    return found


def test_a_run_leaves_rows_at_their_own_frequencies(finished):
    assert [row["step"] for row in rows_of(finished)] == [1, 2, 4, 6, 8, 10, 12]
    perf = read_jsonl(finished / "perf.jsonl")
    assert [row["step"] for row in perf] == [4, 8, 12]
    for row in perf:
        assert min(row["seconds"][k] for k in ("target", "head", "backward", "optimizer")) > 0
        assert row["tokens_per_second"] > 0
    events = [(e["kind"], e["step"]) for e in read_jsonl(finished / "events.jsonl")]
    assert events == [("start", 0), *(("evaluation", s) for s in (0, 6, 12))]
    trace = json.loads((finished / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in trace]
    assert names.count("train.optimizer") == 2 and "train.target" in names


def test_tensorboard_and_the_card_hold_what_the_files_hold(finished, data):
    found = tensorboard_scalars(finished / "tensorboard")
    row = rows_of(finished)[-1]
    assert ("train/loss", 12, pytest.approx(row["loss"], rel=1e-5)) in found
    tags = {tag for tag, _, _ in found}
    assert {"train/sources/fim/loss", "train/acceptance_by_depth/3", "heldout/tau"} <= tags
    assert {"perf/seconds/backward", "perf/memory/resident"} <= tags
    card = json.loads((finished / "run.json").read_text())
    assert card["environment"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    for stats in card["masks"].values():
        assert 0 < stats["supervised_tokens"] < stats["tokens"]
        assert 0 < stats["row_length"]["min"] <= stats["row_length"]["max"] <= 96
        assert stats["rows"] <= len(read_jsonl(data))
    targets = sum(stats["supervised_tokens"] for stats in card["masks"].values())
    assert card["data"]["supervised_tokens"] == targets
    assert list(card["masks"]) == ["<code>", "fim"] and card["head"]["parameters"] > 1000


def test_the_page_needs_nothing_else_and_shows_everything(finished, tmp_path):
    html = (finished / "report.html").read_text()
    assert "<script" not in html and "http" not in html and "<code>" not in html
    captions = re.findall("<figcaption>(.*?)</figcaption>", html)
    for text in ("loss, weighted sum", "loss by depth", "by source", "held-out", "learning rate"):
        assert any(text in caption for caption in captions), text
    assert len(captions) >= 10 and html.count("data:image/svg+xml") == len(captions)
    for text in ("finished", "train.max_steps", "transformers", "&lt;code&gt;", "coverage"):
        assert text in html
    assert report(str(finished), out=str(tmp_path / "new" / "page.html")) == 0
    assert "finished" in (tmp_path / "new" / "page.html").read_text()
    (tmp_path / "file").touch()
    for out, text in ((None, "holds no training run"), (tmp_path / "file" / "x", "another --out")):
        with pytest.raises(EagleError, match=text):
            report(str(finished if out else tmp_path), out=out and str(out))


def test_a_killed_run_has_a_page_too(finished, tmp_path):
    copy = tmp_path / "killed"
    copy.mkdir()
    for name in ("config.yaml", "run.json", "events.jsonl", "perf.jsonl"):
        shutil.copy(finished / name, copy)
    (copy / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text()[:-40])
    assert report(str(copy)) == 0
    html = (copy / "report.html").read_text()
    assert "no summary: still running, stopped, or killed" in html
    assert "1 lines of metrics.jsonl cannot be read" in html
    shown = RunFiles(copy)
    assert [row["step"] for row in shown.rows] == [1, 2, 4, 6, 8, 10]
    assert len(shown.evaluations) == 3


def test_a_resumed_run_repeats_nothing_and_counts_its_starts(base, data, tmp_path):
    output = tmp_path / "run"
    often = dict(save_every=3, log_every=1, perf_every=2, report_to=None, eval={"num_prompts": 2})
    assert run(config(base, data, output, max_steps=5, **often), quiet=True) == 0
    (output / "summary.json").unlink()
    for name in ("metrics", "perf", "events"):  # as if the process had been killed within step 5
        with open(output / f"{name}.jsonl", "a") as file:
            file.write('{"step": 99, "kind": "warning", "text": "late"}\n{"st')
    shutil.rmtree(output / "checkpoints" / "step-5")
    assert run(config(base, data, output, max_steps=6, resume="auto", **often), quiet=True) == 0
    assert [row["step"] for row in rows_of(output)] == list(range(1, 7))
    shown = RunFiles(output)
    assert [row["step"] for row in shown.perf] == [2, 4, 6] and shown.damaged == []
    assert len(shown.of_kind("start")) == 2
    assert [e["step"] for e in shown.evaluations] == [0, 6]
    found = tensorboard_scalars(output / "tensorboard")
    assert ("purge", 4, 0.0) in found, "TensorBoard hides what the run repeats"
    assert {step for tag, step, _ in found if tag == "train/loss"} == set(range(1, 7))


# the recorder alone


def recorder(output, rank=0):
    cfg = config("base", output / "d.jsonl", output, report_to=[], log_every=1)
    output.mkdir(exist_ok=True)
    world = World(rank, rank + 1, CPU)
    return Recorder(cfg, output, world, total=3)


def metrics_row(step):
    row = {"step": step, "loss": 1.0 / step, "acceptance_by_depth": [0.5], "tau_simulated": 1.5}
    rates = {"targets": 4, "tokens": 9, "tokens_per_second": 9.0, "steps_per_second": 1.0}
    return row | rates | {"seconds": {"data": 0.1}}


def test_warnings_are_shown_and_kept_and_a_tracker_that_fails_is_dropped(tmp_path, capsys):
    seen, failing = recorder(tmp_path), Mock()
    failing.log.side_effect = ConnectionError("the server\nis gone")
    with seen.running(0, {}):
        seen.trackers["wandb"] = failing
        for step in (1, 2):
            seen.begin(step)
            seen.step(metrics_row(step), step / 3, 1.0, 1.0, keep=True)
        logging.getLogger("train").warning("%d rows were set aside", 3)
        logging.getLogger("train").info("not this")
        seen.warn("loss spike")
    logging.getLogger("train").warning("after the run")
    assert failing.log.call_count == 1 and len(rows_of(tmp_path)) == 2
    failed = "wandb failed and gets nothing more of this run: the server is gone"
    told = [(1, failed), (2, "3 rows were set aside"), (2, "loss spike")]
    assert RunFiles(tmp_path).warnings == [f"step {step}: {text}" for step, text in told]
    shown = capsys.readouterr().err
    assert all(f"warning: {text}" in shown for _, text in told)


def test_a_run_that_fails_and_a_full_disk_leave_what_they_can(tmp_path, monkeypatch, capsys):
    seen = recorder(tmp_path)
    with pytest.raises(EagleError, match="loss is nan"), seen.running(0, {}):
        seen.step(metrics_row(1), 0.5, 1.0, 1.0, keep=True)
        raise EagleError("loss is nan")
    assert "killed" in (tmp_path / "report.html").read_text()

    def full(path, text):
        raise OSError(28, "No space left on device")

    with recorder(tmp_path).running(0, {}):
        monkeypatch.setattr("train.tracking.report.atomic_write_text", full)
    assert f"make space and run python -m train.report {tmp_path}" in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path):
    seen = recorder(tmp_path, rank=1)
    with seen.running(0, {}):
        seen.begin(1)
        seen.step(metrics_row(1), 0.5, 1.0, 1.0, keep=True)
        seen.evaluation({"step": 1, "tau": 2.0})
        seen.warn("x")
    assert list(tmp_path.iterdir()) == []


# what the files themselves warn about


def test_the_page_draws_conclusions(tmp_path):
    counts = {"rows": 10, "truncated": 5, "bad": 2, "records": 12}
    card = {"data": counts, "draft_vocabulary": {"coverage": 0.8}}
    taus = [{"step": s, "tau": t} for s, t in ((0, 1.0), (5, 3.0), (10, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No warnings." in render(RunFiles(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps(card))
    (tmp_path / "summary.json").write_text(json.dumps({"evaluations": taus}))
    joined = " ".join(RunFiles(tmp_path).warnings)
    for text in ("5 of 10 rows", "2 of 12 records", "holds 80.0%", "fell from 3.000 to 2.000"):
        assert text in joined
    for name, torn in (("run.json", "{"), ("summary.json", "[1]"), ("config.yaml", "a: [")):
        (tmp_path / name).write_text(torn)
    shown = RunFiles(tmp_path)
    assert len(shown.warnings) == 3 and all("cannot be read" in text for text in shown.warnings)
    render(shown)


# trackers


def test_report_to_is_read_from_a_command_line():
    def read(text):
        return load_config(HeadTrainConfig, overrides=[f"train.report_to={text}"]).train.report_to

    assert read("none") == [] and read("null") is None and read("[]") == []
    assert read("tensorboard,wandb") == read("[tensorboard,wandb]") == ["tensorboard", "wandb"]
    with pytest.raises(ValueError, match="report_to"):
        read("mlflow")


@pytest.fixture
def wandb(monkeypatch):
    """A module `wandb` that remembers what it is told."""
    made = Mock(__spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", made)
    made.init.return_value.id = "abc123"
    return made


def test_wandb_gets_the_run(wandb, tmp_path):
    output = tmp_path / "my-run"
    output.mkdir()
    for step in (0, 4):
        trackers = open_trackers(["wandb"], output, {"train": {"lr": 0.5}}, step)
        for tracker in trackers.values():
            tracker.log(step + 1, {"train/loss": 2.0})
            tracker.close()
    begun = [call.kwargs for call in wandb.init.call_args_list]
    assert [b["id"] for b in begun] == [None, "abc123"], "the second is the first, resumed"
    assert begun[0]["config"] == {"train.lr": 0.5} and begun[0]["name"] == "my-run"
    run = wandb.init.return_value
    run.log.assert_called_with({"train/loss": 2.0, "step": 5})
    assert run.finish.call_count == 2


def test_trackers_that_do_not_start_or_are_missing(wandb, base, data, tmp_path, monkeypatch):
    wandb.init.side_effect = RuntimeError("no API key\nconfigured")
    with pytest.raises(EagleError, match="no API key configured; .*WANDB_MODE=offline"):
        open_trackers(["wandb"], tmp_path, {}, 0)
    find = importlib.util.find_spec
    hidden = lambda name: None if name in PACKAGES.values() else find(name)  # noqa: E731
    monkeypatch.setattr("train.tracking.trackers.find_spec", hidden)
    with pytest.raises(EagleError, match="wandb, which is not .*: pip install wandb"):
        require_installed(["wandb"])
    assert open_trackers(None, tmp_path, {}, 0) == {}
    with pytest.raises(EagleError, match="pip install wandb"):
        run(config(base, data, tmp_path / "run", report_to=["wandb"]), quiet=True)
    assert not (tmp_path / "run").exists()


# performance


def test_perf_rows_come_at_their_own_frequency_and_add_up():
    perf, rows = PerfMeter(CPU, 3), []
    spent = {"data": 0.001, "target": 0.002, "head": 0.003, "backward": 0.002, "optimizer": 0.001}
    row = {"steps_per_second": 100.0, "tokens": 50, "targets": 10, "seconds": spent}
    for step in range(1, 7):
        perf.begin(step)
        with perf.phase("target"):
            time.sleep(0.002)
        rows.append(perf.add(row | {"step": step}))
        assert perf.times["target"] >= 0.002 and perf.times["backward"] == 0
    assert [bool(row) for row in rows] == [False, False, True] * 2
    row = rows[-1]
    assert row["steps"] == 3 and row["seconds_per_step"] == pytest.approx(0.01)
    assert row["seconds"]["other"] == pytest.approx(0.001)
    assert sum(row["seconds"].values()) == pytest.approx(0.01)
    assert row["tokens_per_second"] == pytest.approx(5000)
    assert row["memory"]["peak_resident"] >= row["memory"]["resident"] > 10 * 2**20
    assert PerfMeter(CPU, 0).add(row) is None


def test_on_a_gpu_only_sampled_steps_wait_and_are_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", waited := Mock())
    perf = PerfMeter(torch.device("cuda", 0), 3)
    for step in (1, 2, 3):
        perf.begin(step)
        with perf.phase("head"):
            assert waited.call_count == (step == 3)
    assert waited.call_count == 2


# the progress line


def test_progress_is_lines_on_a_pipe_and_one_on_a_terminal(monkeypatch, capsys):
    row = {"loss": 1.25, "acceptance_by_depth": [0.5, 0.25], "tau_simulated": 1.62}
    row |= {"tokens_per_second": 1234.5, "steps_per_second": 2.5}
    line = "loss 1.250  acceptance 0.50 0.25  tau~1.62  1234 tok/s  2.50 steps/s  ETA 1:15  3.0 GiB"
    progress = Progress(40)
    progress.update(10, 0.25, 75.0, row, 3 * 2**30)
    progress.update(11, 0.27, 75.0, row)  # too soon for another line
    progress.note("[bold]a note[/]")
    progress.update(40, 1.0, 0.0, row | {"loss": 1.0})
    progress.close()
    first, note, last = capsys.readouterr().err.splitlines()
    assert first == f"step 10/40  25%  {line}"
    assert note == "[bold]a note[/]" and last.startswith("step 40/40 100%  loss 1.000")
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    progress = Progress(40)
    assert progress.live
    progress.update(10, 0.25, 75.0, row)
    progress.note("a note")
    progress.close()
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("step 10/40", "acceptance 0.50 0.25", "a note"))
