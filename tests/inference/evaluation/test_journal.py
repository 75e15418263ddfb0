"""The journal: torn lines, full disks, two writers."""

import json
import subprocess
import sys

import pytest

from eagle.errors import EagleError
from inference.evaluation import journal
from inference.evaluation.journal import Journal


def fill(path, records):
    with Journal(path) as kept:
        for record in records:
            kept.append(record)


RECORDS = [{"n": i, "text": "ü\n\u2028" * i} for i in range(4)]


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    fill(path, RECORDS[:2])
    fill(path, RECORDS[2:3])
    assert journal.read(path) == RECORDS[:3]
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start, len(whole)):  # wherever the kill came
        path.write_bytes(whole[:end])
        assert journal.read(path) == RECORDS[:2]
        assert path.read_bytes() == whole[:end]  # reading repairs nothing
        fill(path, RECORDS[3:])
        assert journal.read(path) == [*RECORDS[:2], RECORDS[3]]


@pytest.mark.parametrize("line", ["{", "[]", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    for opened in (Journal, journal.read):
        with pytest.raises(EagleError, match="x.jsonl:2 .*delete the line"):
            opened(path)
    assert path.read_text().count("\n") == 3  # and nothing is thrown away


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "x.jsonl"
    with Journal(path):
        with pytest.raises(EagleError, match="another run"):
            Journal(path)
    fill(path, RECORDS)
    with pytest.raises(EagleError, match="choose another"):
        Journal(path / "x.jsonl")
    with pytest.raises(EagleError, match="cannot read"):
        journal.read(tmp_path / "absent.jsonl")


FULL = """
import json, resource, sys
from eagle.errors import EagleError
from inference.evaluation.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with Journal(sys.argv[1]) as kept:
    for n in range(100):
        try:
            kept.append({"n": n, "text": "x" * 300})
        except EagleError as error:
            print(json.dumps([n, str(error)]))
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    kept.append({"n": "after"})
"""


def test_a_disk_that_is_full_loses_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    failed, message = json.loads(done.stdout)
    assert failed == 3 and "free some space" in message
    assert [r["n"] for r in journal.read(path)] == [0, 1, 2, "after"]
