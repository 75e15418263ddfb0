"""The journal: torn lines, full disks, two writers."""

import resource

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


def test_a_disk_that_is_full_loses_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as kept:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(EagleError, match="free some space"):
                for n in range(100):
                    kept.append({"n": n, "text": "x" * 300})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        kept.append({"n": "after"})
    assert [r["n"] for r in journal.read(path)] == [0, 1, 2, "after"]
