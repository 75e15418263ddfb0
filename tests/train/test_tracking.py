"""Trackers, the performance meter, the profiler, the progress line: alone, without a run."""

import json
import struct
import sys
import textwrap
import time

import pytest
import torch
from head_helpers import tiny_head
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from configs.load import load_config
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from eagle.target import Target
from train.head.metrics import Progress
from train.head.seeing.perf import (
    FlopCount,
    PerfMeter,
    active_weights,
    gpu_utilization,
    memory,
    peak_flops,
)
from train.head.seeing.profiler import SKIP, StepProfiler
from train.head.seeing.trackers import OPEN, open_trackers, require_installed, scalars

CPU = torch.device("cpu")
ROW = {
    "step": 3,
    "loss": 1.5,
    "loss_by_depth": [1.0, 0.5],
    "lr": 1e-3,
    "warnings": ["text"],
    "sources": {"chat": {"loss": 2.0, "acceptance_by_depth": [0.25]}},
}


def tensorboard_scalars(folder):
    """(tag, step, value) of all event files: records are length, its checksum, bytes, their
    checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        raw, place = path.read_bytes(), 0
        while place < len(raw):
            (size,) = struct.unpack_from("<Q", raw, place)
            event = Event.FromString(raw[place + 12 : place + 12 + size])
            place += 12 + size + 4
            found += [
                (v.tag, event.step, v.simple_value)
                for v in event.summary.value
                if v.HasField("simple_value")
            ]
            if event.session_log.status == event.session_log.START:
                found.append(("purge", event.step, 0.0))
    return found


def test_scalars_are_flat_and_numbers_only():
    assert scalars(ROW, "train") == {
        "train/loss": 1.5,
        "train/loss_by_depth/1": 1.0,
        "train/loss_by_depth/2": 0.5,
        "train/lr": 1e-3,
        "train/sources/chat/loss": 2.0,
        "train/sources/chat/acceptance_by_depth/1": 0.25,
    }


def test_report_to_is_read_from_a_command_line():
    def read(text):
        return load_config(HeadTrainConfig, overrides=[f"train.report_to={text}"]).train.report_to

    assert read("none") == [] and read("null") is None and read("[]") == []
    assert read("tensorboard,wandb") == read("[tensorboard,wandb]") == ["tensorboard", "wandb"]
    with pytest.raises(ValueError, match="report_to"):
        read("mlflow")
    assert load_config(HeadTrainConfig, flags={"train.profile": True}).train.profile == 3


def test_tensorboard_files_hold_the_values_and_hide_what_is_repeated(tmp_path):
    for step in (0, 5):  # a run, and the same resumed at step 5
        (tracker,) = open_trackers(None, tmp_path, {"train": {"lr": 1}}, step).values()
        tracker.log(step + 1, {"train/loss": 0.5 + step})
        tracker.close()
    found = tensorboard_scalars(tmp_path / "tensorboard")
    assert ("train/loss", 1, 0.5) in found and ("train/loss", 6, 5.5) in found
    assert ("purge", 6, 0.0) in found


STUB = """
import json, os
CALLS = os.environ["STUB_CALLS"]

def record(*call):
    with open(CALLS, "a") as file:
        file.write(json.dumps([__name__, *call]) + "\\n")

class Run:
    id = "abc123"
    def define_metric(self, *args, **kwargs): record("define_metric", args, kwargs)
    def log(self, values): record("log", values, None)
    def finish(self): record("finish")

def init(**kwargs):
    if os.environ.get("STUB_FAILS"):
        raise RuntimeError("no API key\\nconfigured")
    record("init", kwargs)
    return Run()

def log(values, step=None): record("log", values, step)
def finish(): record("finish")
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Modules `wandb` and `trackio` that write down what they are told; returns a reader of it."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("wandb", "trackio"):
        (site / f"{name}.py").write_text(textwrap.dedent(STUB))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls.jsonl"))
    yield lambda: [json.loads(s) for s in (tmp_path / "calls.jsonl").read_text().splitlines()]
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def test_wandb_and_trackio_get_the_run(stubs, tmp_path):
    output = tmp_path / "my-run"
    for step in (0, 4):
        trackers = open_trackers(["wandb", "trackio"], output, {"train": {"lr": 0.5}}, step)
        for tracker in trackers.values():
            tracker.log(step + 1, {"train/loss": 2.0})
            tracker.close()
    calls = stubs()
    begun = [call[2] for call in calls if call[1] == "init" and call[0] == "wandb"]
    assert [b["id"] for b in begun] == [None, "abc123"], "the second is the first, resumed"
    assert begun[0]["config"] == {"train.lr": 0.5} and begun[0]["name"] == "my-run"
    assert ["wandb", "log", {"train/loss": 2.0, "step": 5}, None] in calls
    assert ["trackio", "log", {"train/loss": 2.0}, 5] in calls
    assert [call[0] for call in calls if call[1] == "finish"] == ["wandb", "trackio"] * 2


def test_a_tracker_that_does_not_start_says_what_to_do(stubs, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FAILS", "1")
    with pytest.raises(EagleError, match="no API key configured; .*WANDB_MODE=offline"):
        open_trackers(["wandb"], tmp_path, {}, 0)
    with pytest.raises(EagleError, match="trackio does not start"):
        open_trackers(["trackio"], tmp_path, {}, 0)


@pytest.mark.parametrize("name", OPEN)
def test_a_missing_tracker_names_its_install_command(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        EagleError, match=f"names {name}, which is not installed: pip install {name}"
    ):
        require_installed([name])
    require_installed(None)


def test_no_tensorboard_by_default_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_trackers(None, tmp_path, {}, 0) == {}


# performance


def tiny_target(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    return Target(LlamaForCausalLM(config), name="tiny")


@pytest.mark.parametrize("layers", [1, 3])
def test_flops_are_what_pytorch_counts(layers):
    """All positions supervised, no padding. Of causal attention the formula counts the half that is
    needed.
    """
    target, head, steps, B, T = tiny_target(), tiny_head(num_layers=layers), 3, 4, 40
    target.set_feature_layers(head.config.feature_layers)
    ids, place = torch.randint(0, 60, (B, T)), torch.arange(T).expand(B, T)

    def attend(layer, q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_target:
        _, features = target.hidden_and_features(ids, torch.ones(B, T, dtype=torch.int64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_head:
        hidden, loss = head.fc(features), 0.0
        for _ in range(steps):
            hidden = head(hidden, target.embed(ids), place, attend)
            loss = loss + head.logits(hidden).sum()
        loss.backward()
    whole, stored = (FlopCount.of(target, head, steps, target_runs=runs) for runs in (True, False))
    n = B * T
    other_half = 6 * (4 * 8) * T * n * steps * layers
    trained = stored(n, n, B) - n * 2 * 60 * 32  # without the teacher's logits
    assert trained + other_half == of_head.get_total_flops()
    other_half = 2 * (4 * 4 * 8) * T * n
    assert whole(n, 0, B) - stored(n, 0, B) + other_half == of_target.get_total_flops()


def test_only_active_experts_count():
    experts = torch.nn.ModuleDict(
        {"experts": torch.nn.ParameterList([torch.ones(8, 10, 5)]), "gate": torch.nn.Linear(5, 8)}
    )
    config = LlamaConfig()
    config.num_experts, config.num_experts_per_tok = 8, 2
    assert active_weights(torch.nn.ModuleList([experts]), config) == 2 * 50 + 40


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", None),
        ("Some CPU A100X", "bf16", None),
    ],
)
def test_peaks_by_device_name(name, dtype, peak):
    assert peak_flops(name, dtype) == peak


def meter(every, peak=None):
    return PerfMeter(CPU, FlopCount(100, 0, 0, 10, 10, 5, 0, 10, 1), every, peak=peak)


def test_perf_rows_come_at_their_own_frequency_and_add_up():
    perf, rows = meter(every=3, peak=1e9), []
    for step in range(1, 7):
        perf.begin(step)
        with perf.phase("target"):
            time.sleep(0.002)
        with perf.phase("backward"):
            pass
        rows.append(
            perf.add(
                {
                    "step": step,
                    "steps_per_second": 100.0,
                    "tokens": 50,
                    "targets": 10,
                    "seconds": {
                        "data": 0.001,
                        "target": 0.002,
                        "head": 0.003,
                        "backward": 0.002,
                        "step": 0.001,
                    },
                },
                rows=5,
            )
        )
        assert perf.times["target"] >= 0.002 and perf.times["backward"] < 0.002
    assert [bool(row) for row in rows] == [False, False, True] * 2
    row = rows[-1]
    assert row["steps"] == 3 and row["seconds_per_step"] == pytest.approx(0.01)
    assert row["ratio"]["forward"] == pytest.approx(0.5) and row["ratio"][
        "optimizer"
    ] == pytest.approx(0.1)
    assert sum(v for k, v in row["ratio"].items() if k != "forward") == pytest.approx(1)
    assert row["seconds"]["other"] == pytest.approx(0.001)
    assert row["tokens_per_second"] == pytest.approx(5000)
    step_flops = 50 * 2 * 100 + 50 * (4 * 10 + 6 * 5) + 10 * 6 * 5 + 10 * 6 * 10
    assert row["flops_per_step"] == step_flops
    assert row["gflops_per_second"] == pytest.approx(step_flops * 100 / 1e9)
    assert row["mfu"] == pytest.approx(step_flops * 100 / 1e9)
    assert row["memory"]["peak_resident"] >= row["memory"]["resident"] > 10 * 2**20
    assert "gpu_utilization" not in row


def test_no_mfu_without_a_known_peak_and_no_rows_when_off():
    row = {"step": 1, "steps_per_second": 1.0, "tokens": 1, "targets": 1, "seconds": {"head": 0.5}}
    assert "mfu" not in meter(every=1).add(row, 1)
    assert meter(every=0).add(row, 1) is None


def test_on_a_gpu_only_sampled_steps_wait_and_are_timed(monkeypatch):
    waited, gpu = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 83)
    perf = PerfMeter(gpu, FlopCount(100, 0, 0, 10, 10, 5, 0, 10, 1), every=3)
    for step in (1, 2, 3):
        perf.begin(step)
        with perf.phase("head"):
            assert len(waited) == (step == 3)
        spent = {"head": 0.5 if step == 3 else 0.1}
        row = perf.add(
            {"step": step, "steps_per_second": 1.0, "tokens": 1, "targets": 1, "seconds": spent}, 1
        )
    assert len(waited) == 2 and row["seconds"]["head"] == 0.5 and row["ratio"]["head"] == 0.5
    assert row["steps"] == 3 and row["seconds_per_step"] == 1.0
    assert row["memory"] == {"allocated": 5, "peak_allocated": 7} and row["gpu_utilization"] == 83

    def no_nvml(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", no_nvml)
    assert gpu_utilization(gpu) is None


def test_peak_memory_follows_what_is_held():
    before = memory(CPU)["peak_resident"]
    held = torch.ones((before // 4 + 2**24) // 4 * 4)
    assert memory(CPU)["peak_resident"] > before
    del held


def test_the_profile_is_a_trace_of_the_steps_after_the_first(tmp_path):
    profiler, perf = StepProfiler(tmp_path / "profile", 2), meter(every=0)
    traces = []
    for step in range(1, 7):
        perf.begin(step)
        profiler.before_step()
        with perf.phase("head"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        traces.append(profiler.after_step())
    trace = tmp_path / "profile" / "trace.json"
    assert [n for n, t in enumerate(traces, 1) if t] == [SKIP + 2] and traces[SKIP + 1] == trace
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("train.head") == 2 and "aten::mm" in names
    assert "aten::mm" in (tmp_path / "profile" / "operators.txt").read_text()
    assert profiler.close() is None


def test_a_profile_cut_short_is_written_when_the_run_ends(tmp_path):
    profiler = StepProfiler(tmp_path / "profile", 50)
    for _ in range(SKIP + 1):
        profiler.before_step()
        torch.ones(2) + 1
        profiler.after_step()
    assert profiler.close().exists()
    none = StepProfiler(tmp_path / "none", 50)
    none.before_step()
    assert none.close() is None and not (tmp_path / "none").exists()


def progress_row(**changes):
    row = {
        "loss": 1.25,
        "acceptance_by_depth": [0.5, 0.25],
        "tau_simulated": 1.62,
        "tokens_per_second": 1234.5,
        "steps_per_second": 2.5,
    }
    return {**row, **changes}


def test_progress_lines_on_a_pipe(capsys):
    progress = Progress(40)
    progress.update(10, 0.25, 75.0, progress_row(), 3 * 2**30)
    progress.update(11, 0.27, 75.0, progress_row())  # too soon for another line
    progress.note("[bold]a note[/]")
    progress.update(40, 1.0, 0.0, progress_row(loss=1.0))
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "step 10/40  25%  loss 1.250  acceptance 0.50 0.25  tau~1.62  1234 tok/s  2.50 steps/s  ETA 1:15  3.0 GiB"
    )
    assert lines[1] == "[bold]a note[/]" and lines[2].startswith("step 40/40 100%  loss 1.000")
    assert len(lines) == 3


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    progress = Progress(40)
    assert progress.live
    progress.update(10, 0.25, 75.0, progress_row())
    progress.note("a note")
    progress.close()
    text = capsys.readouterr().err
    assert (
        "step 10/40" in text and "acceptance 0.50 0.25" in text and "━" in text and "a note" in text
    )
    quiet = Progress(40, quiet=True)
    quiet.update(1, 1.0, 0.0, progress_row())
    quiet.note("hush")
    assert capsys.readouterr().err == ""
