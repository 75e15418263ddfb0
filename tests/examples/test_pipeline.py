"""The recipe at toy size, its real commands run in this process; and that what is done is not done
again.
"""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ConfigError
from eagle.errors import EagleError
from examples.pipeline import pipeline
from examples.stages import Runner, Stage, digest

ROOT = Path(__file__).parents[2]
WORDS = "def class return self value index for in range len list item key print open path".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Chats to learn, and others held out."""
    folder, rng, paths = tmp_path_factory.mktemp("rows"), random.Random(0), {}

    def text(n):
        return " ".join(rng.choice(WORDS) for _ in range(n))

    for name, count in (("data", 24), ("heldout", 6)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": text(3)},
                    {"role": "assistant", "content": text(6)},
                ]
            }
            for _ in range(count)
        ]
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture
def called(monkeypatch):
    """The commands, run without a new interpreter each."""
    words_of = []

    def call(self, words, log):
        words_of.append(words)
        monkeypatch.setattr(sys, "argv", [words[1], *words[2:]])
        try:
            runpy.run_module(words[1], run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    monkeypatch.setattr(Runner, "call", call)
    return words_of


SMALL = (
    "sft.train.max_steps=2",
    "sft.train.batch_size=2",
    "sft.lora.r=2",
    "sft.data.max_length=96",
    "sft.data.min_supervised_tokens=1",
    "head.train.max_steps=2",
    "head.train.batch_size=2",
    "head.data.max_length=96",
    "head.eval.num_prompts=0",
    "head.train.dtype=fp32",
    "head.data.min_supervised_tokens=1",
    "head.train.report_to=none",
)


@pytest.mark.slow
def test_the_recipe_from_base_to_report(
    model_folder, head_folder, files, tmp_path, called, capfd, monkeypatch
):
    pytest.importorskip("trl")
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "cache"))
    given = dict(
        base=str(model_folder),
        head=str(head_folder),
        data=str(files["data"]),
        heldout=str(files["heldout"]),
        num_answers=8,
        num_prompts=2,
        max_new_tokens=8,
        repeats=1,
        tree="8,3,2",
        output=str(tmp_path / "run"),
    )
    assert pipeline(*SMALL, **given) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "run/report.json").read_text())
    assert [row["case"] for row in report["rows"]] == ["a", "b", "c"]
    assert all(row["tau"] >= 1 and row["tokens_per_second"] > 0 for row in report["rows"])
    assert report["identical"] and set(report["exact"]) == {"given", "adapted"}
    for found in report["exact"].values():  # with stock generate
        assert found["compared"] == 2 and found["rows"] == 0 and found["dtype"] == "float32"
    assert {"loss", "token_accuracy"} <= report["sft"]["heldout_before"].keys()
    assert report["sft"]["trainable_parameters"] > 0 and report["sft"]["adapter_bytes"] > 0
    assert report["sft"]["peak_memory_mb"] > 10 and report["quantization"] == "nf4"
    page = (tmp_path / "run/report.md").read_text()
    assert "| c | adapted | tuned |" in page and "held-out loss" in page
    # the head was adapted to what is served, on the tuned model's own answers
    belongs = json.loads((tmp_path / "run/head/head/eagle.json").read_text())
    assert belongs["target"]["quantization"] == "nf4" and len(belongs["target"]["adapter"]) == 64
    assert belongs["data"]["answers"] == "written by the target"
    assert len((tmp_path / "run/generations.jsonl").read_text().splitlines()) == 2

    # the same again is nothing new; other prompts leave the tuned model and its head as they are
    before = len(called)
    assert pipeline(*SMALL, **given) == 0 and len(called) == before
    assert pipeline(*SMALL, **(given | {"num_prompts": 1})) == 0
    assert [words[1] for words in called[before:]] == ["inference.generate"] + [
        "inference.bench"
    ] * 5


@pytest.mark.parametrize(
    "change, named",
    [
        ({"heldout": None}, "--heldout .* no such file"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"data_format": "plain"}, "has no prompts"),
        ({"quantization": "nf3"}, "use none, nf4, int8"),
        ({"tree": "8"}, "total_token"),
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"head": "no/such/head"}, "no head folder"),
        ({"base": "no/such/base"}, "no model folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_before_the_work(files, tmp_path, called, change, named):
    given = {
        "data": str(files["data"]),
        "heldout": str(files["heldout"]),
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(EagleError, match=named):
        pipeline(**(given | change))
    assert not called and not (tmp_path / "run").exists()


def test_overrides_name_their_stage_and_rows_are_held_out(files, tmp_path):
    with pytest.raises(EagleError, match="write sft.KEY=VALUE or head.KEY=VALUE"):
        pipeline("train.max_steps=3", output=str(tmp_path))
    with pytest.raises(ConfigError, match="unknown config key train.max_step"):
        pipeline("head.train.max_step=3", output=str(tmp_path))
    with pytest.raises(EagleError, match="24 rows of --heldout .* stand in --data too"):
        pipeline(data=str(files["data"]), heldout=str(files["data"]), output=str(tmp_path))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"conversations": []}\n')
    with pytest.raises(EagleError, match="p.jsonl:1 is no prompt"):
        pipeline(data=str(files["data"]), heldout=str(prompts), output=str(tmp_path))


# stages


def stage(folder, code, resume=None, inputs=()):
    words = ("-c", code, str(folder / "out"), str(folder / "count"))
    return Stage("work", "work", words, (folder / "out",), tuple(inputs), resume)


COUNT = """
import sys
from pathlib import Path
out, count = map(Path, sys.argv[1:3])
count.write_text(count.read_text() + "x" if count.exists() else "x")
print("to the log")
"""
DONE = COUNT + "out.write_text('done')"


def test_a_stage_is_done_once_and_again_when_what_it_reads_changes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("1")

    def times(code=DONE):
        assert Runner(tmp_path, 1).run(stage(tmp_path, code, inputs=[tmp_path / "in"])) == 0
        return len((tmp_path / "count").read_text())

    assert [times(), times()] == [1, 1]
    assert (tmp_path / "logs/work.log").read_text() == "to the log\n"
    (tmp_path / "in/file").write_text("2")
    assert [times(), times()] == [2, 2]
    assert [times(DONE + "\n"), times(DONE + "\n")] == [3, 3]  # another command
    (tmp_path / "out").unlink()
    assert times(DONE + "\n") == 4
    (tmp_path / "stages/work.json").write_text("torn")
    assert times(DONE + "\n") == 5


def test_the_log_holds_what_a_stage_says_too(tmp_path, capfd):
    code = DONE + "; print('step 3/80  ETA 9:00', file=sys.stderr)"
    assert Runner(tmp_path, 1).run(stage(tmp_path, code)) == 0
    assert sorted((tmp_path / "logs/work.log").read_text().splitlines()) == [
        "step 3/80  ETA 9:00",
        "to the log",
    ]
    assert "step 3/80  ETA 9:00\n" in capfd.readouterr().err


def test_a_failed_stage_goes_on_where_it_can(tmp_path, capsys):
    fails = (
        COUNT
        + "out.write_text('half'); sys.exit(0 if '--resume' in sys.argv and out.exists() else 3)"
    )
    assert Runner(tmp_path, 1).run(stage(tmp_path, fails)) == 3
    assert "goes on from here" in capsys.readouterr().err
    resumed = COUNT + (
        "half = out.exists(); out.write_text('x'); sys.exit(0 if '--resume' in sys.argv and half else 3)"
    )
    work = stage(tmp_path, resumed, resume=("--resume",))
    runner = Runner(tmp_path, 1)
    assert runner.run(work) == 3  # another command than before: what the other left was removed
    assert runner.run(work) == 0
    assert Runner(tmp_path, 1).run(stage(tmp_path, COUNT)) == 1  # it wrote nothing
    assert "ended without writing" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_stage_save(tmp_path, number):
    """Ctrl-C goes to the whole group, SIGTERM to the recipe alone; the stage ends in its own
    time.
    """
    script = tmp_path / "recipe.py"
    inner = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "def end(n, f):\n    time.sleep(0.5); Path(sys.argv[1]).write_text('saved'); sys.exit(128 + n)\n"
        "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)\n"
        "Path(sys.argv[2]).write_text('x'); time.sleep(30)"
    )
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom examples.stages import Runner, Stage\n"
        f"out = Path({str(tmp_path)!r})\n"
        f"stage = Stage('work', 'work', ('-c', {inner!r}, str(out / 'out'), str(out / 'count')), (out / 'out',))\n"
        "sys.exit(Runner(out, 1).run(stage))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, script], env=env, start_new_session=True, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 20
    while not (tmp_path / "count").exists() and time.monotonic() < until:
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    assert process.wait(20) == 128 + number
    assert (tmp_path / "out").read_text() == "saved"


def test_a_digest_sees_content(tmp_path):
    (tmp_path / "a").write_text("1")
    first = digest(tmp_path)
    os.utime(tmp_path / "a", (1, 1))
    assert digest(tmp_path) == first and digest(tmp_path / "b") is None
    (tmp_path / "a").write_text("2")
    assert digest(tmp_path) != first
