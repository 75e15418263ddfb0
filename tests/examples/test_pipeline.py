"""The recipe at toy size, its real commands; and that what is done is not done again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ConfigError
from eagle.errors import EagleError
from examples.pipeline import pipeline
from examples.steps import Steps

ROOT = Path(__file__).parents[2]
WORDS = "def class return self value index for in range len list item key print open path".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Chats to learn, and others held out."""
    folder, rng, paths = tmp_path_factory.mktemp("rows"), random.Random(0), {}
    for name, count in (("data", 24), ("heldout", 6)):
        paths[name] = str(folder / f"{name}.jsonl")
        lines = []
        for _ in range(count):
            texts = {role: " ".join(rng.choices(WORDS, k=6)) for role in ("user", "assistant")}
            messages = [{"role": role, "content": text} for role, text in texts.items()]
            lines.append(json.dumps({"messages": messages}) + "\n")
        Path(paths[name]).write_text("".join(lines))
    return paths


SMALL = """
sft.train.max_steps=2 sft.train.batch_size=2 sft.lora.r=2 sft.data.max_length=96
sft.data.min_supervised_tokens=1 head.train.max_steps=2 head.train.batch_size=2
head.data.max_length=96 head.eval.num_prompts=0 head.train.dtype=fp32
head.data.min_supervised_tokens=1 head.train.report_to=none
""".split()


@pytest.mark.slow
def test_the_recipe_from_base_to_report(files, tmp_path, called, capfd):
    pytest.importorskip("trl")
    given = {"num_answers": 8, "num_prompts": 2, "max_new_tokens": 8, "tree": "8,3,2"}
    given |= {**files, "output": str(tmp_path / "run")}
    assert pipeline(*SMALL, **given) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "run/report.json").read_text())
    assert [row["case"] for row in report["rows"]] == ["a", "b", "c"]
    assert all(row["tau"] >= 1 and row["tokens_per_second"] > 0 for row in report["rows"])
    assert report["identical"] and set(report["exact"]) == {"given", "adapted"}
    for found in report["exact"].values():  # with stock generate
        assert found["compared"] == 2 and found["rows"] == 0 and found["dtype"] == "float32"
    assert {"loss", "token_accuracy"} <= report["sft"]["heldout_before"].keys()
    assert report["quantization"] == "nf4" and report["head"]["answers"] > 0
    page = (tmp_path / "run/report.md").read_text()
    assert "| c | adapted | tuned |" in page and "held-out" in page
    # the head was adapted to what is served, on the tuned model's own answers
    belongs = json.loads((tmp_path / "run/head/head/eagle.json").read_text())
    assert belongs["target"]["quantization"] == "nf4" and len(belongs["target"]["adapter"]) == 64
    assert belongs["data"]["answers"] == "written by the target"
    assert len((tmp_path / "run/generations.jsonl").read_text().splitlines()) == 2
    # the same again is nothing new
    before = len(called)
    assert pipeline(*SMALL, **given) == 0 and len(called) == before


def test_what_cannot_work_is_said_before_the_work(files, tmp_path, called):
    given = {**files, "output": str(tmp_path / "run")}
    for change, named in (
        ({"heldout": None}, "--heldout .* no such file"),
        ({"data_format": "plain"}, "has no prompts"),
        ({"quantization": "nf3"}, "nf4"),
        ({"tree": "8"}, "total_token"),
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"head": "no/such/head"}, "no head folder"),
        ({"base": "no/such/base"}, "no model folder"),
        ({"heldout": files["data"]}, "24 rows of --heldout .* stand in --data too"),
    ):
        with pytest.raises((EagleError, ConfigError), match=named):
            pipeline(**(given | change))
    with pytest.raises(EagleError, match="write sft.KEY=VALUE or head.KEY=VALUE"):
        pipeline("train.max_steps=3", **given)
    with pytest.raises(ConfigError, match="unknown config key train.max_step"):
        pipeline("head.train.max_step=3", **given)
    assert not called and not (tmp_path / "run").exists()


# steps; the command is a module of the test's own, as `python -m` wants one


@pytest.fixture
def work(tmp_path, monkeypatch):
    """work(code, resume=…): run it as a step that writes tmp_path/out, in the folder steps/."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = "import sys\nfrom pathlib import Path\nout = Path(sys.argv[1])\n"
    start += "out.with_name('count').open('a').write('x')\nprint('to the log')\n"

    def run_step(code, *more, resume=None):
        (tmp_path / "job.py").write_text(start + code)
        out = tmp_path / "out"
        Steps(tmp_path / "steps").run("work", ["job", str(out), *more], out, resume=resume)
        return len((tmp_path / "count").read_text())

    return run_step


DONE = "out.write_text('done')"


def test_a_step_is_done_once_and_again_when_what_it_reads_changes(work, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "file").write_text("1")
    assert [work(DONE, str(source)), work(DONE, str(source))] == [1, 1]
    assert (tmp_path / "steps/logs/work.log").read_text() == "to the log\n"
    (source / "file").write_text("22")
    assert [work(DONE, str(source)), work(DONE, str(source))] == [2, 2]
    assert [work(DONE), work(DONE)] == [3, 3]  # another command
    (tmp_path / "out").unlink()
    assert work(DONE) == 4
    (tmp_path / "steps/stages/work.json").write_text("torn")
    assert work(DONE) == 5


def test_a_failed_step_goes_on_where_it_can(work, tmp_path, capsys):
    code = "half = out.exists()\nout.write_text('x')\n"
    code += "sys.exit(0 if '--resume' in sys.argv and half else 3)"
    for resume in (None, ["--resume"]):
        (tmp_path / "out").write_text("of another command")
        with pytest.raises(SystemExit) as end:
            work(code, str(resume), resume=resume)
        assert end.value.code == 3 and "goes on from here" in capsys.readouterr().err
    assert work(code, str(["--resume"]), resume=["--resume"]) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_save(tmp_path, number):
    """Ctrl-C goes to the whole group, SIGTERM to the recipe alone; the step ends in its own
    time."""
    (tmp_path / "job.py").write_text(
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "def end(n, f):\n    time.sleep(0.3); Path('out').write_text('saved'); sys.exit(128 + n)\n"
        "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)\n"
        "Path('begun').write_text('x'); time.sleep(60)"
    )
    recipe = "import sys; from examples.steps import call; sys.exit(call(['job']))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    options = {"env": environment, "cwd": tmp_path, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", recipe], **options)
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(60) == 128 + number
    assert (tmp_path / "out").read_text() == "saved"
