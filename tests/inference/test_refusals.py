"""What commands refuse, in one line that names the remedy and before anything is written.
tests/data/refusals.yaml lists it."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from engine_helpers import make_head

from eagle.checkpoint import save_head

TABLE = Path(__file__).parents[1] / "data/refusals.yaml"
CASES = [
    pytest.param(f"{part['command']} {flags}", says, part.get("unloaded"), id=f"{room}: {flags}")
    for part in yaml.safe_load(TABLE.read_text("utf-8"))
    for room in [part["command"].split(" {")[0]]
    for flags, says in part["refused"]
]


@pytest.fixture(scope="module")
def files(tmp_path_factory, llama):
    folder, line = tmp_path_factory.mktemp("files"), '{"prompt": "def f():"}\n'
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    problem = {"task_id": "double", "question": "Double.", "input_output": tests}
    for name, text in (
        ("prompts.jsonl", 3 * line),
        ("broken.jsonl", line + "{oops\n"),
        ("no_runs.json", '{"runs": []}'),
        ("problems.jsonl", json.dumps(problem)),
        ("generations.json", '[{"task_id": "double", "output": ["x"]}]'),
    ):
        (folder / name).write_text(text)
    save_head(make_head(llama), folder / "other")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("words, says, unloaded", CASES)
def test_refused(here, base, files, model_folder, tmp_path, monkeypatch, words, says, unloaded):
    if unloaded:
        monkeypatch.setattr("inference.generate.load_model", lambda **_: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    base = " ".join(map(str, base))
    places = {"base": base, "model": model_folder, "out": tmp_path / "out", "long": "word" * 400}
    code, out, err = here(*shlex.split(words.format(**places, **files)))
    *before, last = err.splitlines()
    assert code != 0 and out == "" and last.startswith("error: ") and says in last, err
    assert not any("error:" in line or "Traceback" in line for line in before), err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("words", ["inference.evaluate --help", "inference.bench cycle --help"])
def test_help(here, words):
    code, out, _ = here(*words.split())
    assert code == 0 and f"python -m {words.removesuffix(' --help')}" in out
