"""The profile: what the report says, and that a cycle's work on the host does not grow with the
tree.
"""

import re

import pytest
import torch
from engine_helpers import head_model, make_prompts, make_target

from inference import cycle
from inference.bench.profile import growth, listed, profile

# what the host keeps about each row; with the class from Python 3.11 on
BOOKKEEPING = re.compile(
    r"(request\.py (Row\.)?(take|done)"
    r"|decode\.py (Batch\.)?(judge|drop_finished|keep_logprobs|choose)(\.<locals>\.<\w+>)?"
    r"|decode\.py <(genexpr|listcomp)>"
    r"|cache\.py ((StaticKVCache\.)?advance(\.<locals>\.<\w+>)?|<listcomp>))"
)


def one_error(err):
    """One line for the user, no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    return "Traceback" not in err and len(lines) == 1 and err.strip().endswith(lines[0])


@pytest.fixture(scope="module")
def model():
    return head_model(make_target("llama"), "6,2,2")


@pytest.fixture(scope="module")
def counts(model):
    """counts[tree, rows], trees of one depth."""
    prompts = make_prompts((40, 30))

    def get(tree, rows):
        generate = cycle.alike(model, prompts, rows, tree, 5)
        return cycle.count(generate, rows, tree, model.target.device)

    return {(t, r): get(t, r) for t in ("6,2,2", "40,2,7") for r in (2, 5)}


def test_cycles_are_alike(counts):
    for found in counts.values():
        # 5 cycles: 4 lie between two commits with all rows in flight, and the first is left out
        assert len(found.calls) == len(found.operators) == 3
        for kind in cycle.Counts.KINDS:
            cycles = getattr(found, kind).counts
            assert all(c == cycles[0] for c in cycles) and sum(cycles[0].values()) >= 1


@pytest.mark.parametrize("kind", cycle.Counts.KINDS)
@pytest.mark.parametrize("rows", [2, 5])
def test_nothing_grows_with_nodes(counts, kind, rows):
    small, large = counts["6,2,2", rows], counts["40,2,7", rows]
    assert not cycle.grown(small, large, kind)
    assert getattr(small, kind).total() == getattr(large, kind).total()


@pytest.mark.parametrize("tree", ["6,2,2", "40,2,7"])
def test_only_bookkeeping_grows_with_rows(counts, tree):
    few, many = counts[tree, 2], counts[tree, 5]
    assert not cycle.grown(few, many, "operators") and not cycle.grown(few, many, "reads")
    take = [p for name, p in cycle.grown(few, many, "calls").items() if name.endswith("take")]
    assert take == [(2, 5)]  # once a row
    for kind in ("calls", "lines"):
        wrong = [n for n in cycle.grown(few, many, kind) if not BOOKKEEPING.fullmatch(n)]
        assert not wrong


def test_a_loop_over_nodes_is_seen(model, monkeypatch):
    """The check can fail: with a loop over nodes, each count that it should move grows."""
    import eagle.draft

    original = eagle.draft.rerank

    def looping(*args):
        tree = original(*args)
        for token in tree.tokens[0].tolist():
            torch.tensor(token).item()
        return tree

    found = {}
    for tree in ("6,2,2", "40,2,7"):
        monkeypatch.setattr(cycle, "OURS", (*cycle.OURS, __file__))
        monkeypatch.setattr(eagle.draft, "rerank", looping)
        generate = cycle.alike(model, make_prompts((40, 30)), 2, tree, 4)
        found[tree] = cycle.count(generate, 2, tree, model.target.device)
    pairs = growth([tuple(found.values())])
    assert {kind for kind, _ in pairs} == {"operators", "lines", "reads"}
    name = next(n for k, n in pairs if k == "lines")
    assert name.startswith("test_profile.py") and name.endswith("looping")
    assert any("item" in line and "6 -> 40" in line for line in listed(pairs))


def test_host_reads_are_named_by_our_line():
    reads = cycle.Reads()
    with reads:
        x = torch.arange(3)
        x.tolist(), x[0].item(), bool(x[0]), x + 1
    assert reads.counter == {"elsewhere: tolist": 1, "elsewhere: item": 1, "elsewhere: __bool__": 1}


def test_passes_are_timed_and_put_back(model):
    from eagle.decode import Timings
    from eagle.target import Target

    forward, timings = Target.forward, Timings()
    watch = cycle.Phases(2, timings, model.target.device)
    with watch.watching():
        model.generate(
            make_prompts((9, 5)),
            max_new_tokens=12,
            eos_token_id=-1,
            on_cache=watch.on_cache,
            timings=timings,
        )
    cycles = watch.cycles()
    assert Target.forward is forward and len(cycles) > 3
    # depth 2: two passes, and one that ingests
    assert cycles.mean("target passes") == 1 and cycles.mean("head passes") == 3
    assert 0 < cycles.mean("target") < cycles.mean("verify")
    assert 0 < cycles.mean("head") < cycles.mean("draft")


@pytest.fixture
def base(model_folder, head_folder):
    return ["--base", model_folder, "--head", head_folder, "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("inference.bench.profile.TREES", ("6,2,2", "20,2,5"))
    monkeypatch.setattr("inference.bench.profile.ROWS", (2, 3))
    monkeypatch.setattr("inference.bench.profile.CYCLES", 4)


def test_the_report(in_process, base, small, tmp_path):
    out = tmp_path / "new" / "profile.txt"
    code, stdout, err = in_process(
        profile,
        *base,
        "--batch_size",
        2,
        "--tree",
        "8,2,2",
        "--compile",
        "off",
        "--max_new_tokens",
        12,
        "--output",
        out,
    )
    assert code == 0 and stdout == "" and str(out) in err, err
    assert [p.name for p in out.parent.iterdir()] == ["profile.txt"]
    text = out.read_text()
    assert "batch size 2, tree 8,2,2, compile off, 12 new tokens a row" in text
    assert f"torch {torch.__version__}" in text and "Environment: " in text
    number = r" +([\d.]+)"
    (found,) = re.findall(rf"cycle{number} +100.0%{number}{number}{number}\n", text)
    whole, target, head, rest = map(float, found)
    assert whole == pytest.approx(target + head + rest, abs=0.01) and min(target, head, rest) > 0
    parts = [re.search(rf"  {p}{number}", text) for p in ("commit", "draft", "verify")]
    assert sum(float(p[1]) for p in parts) == pytest.approx(whole, abs=0.01)
    assert re.search(r"aten::(add)?mm ", text)
    assert re.search(r"1\.00  decode\.py (Batch\.)?judge: tolist", text)
    for title in cycle.Counts.KINDS.values():
        (line,) = re.findall(rf"^  {title}((?: +[\d.]+){{4}})$", text, re.M)
        a, b, c, d = map(float, line.split())
        assert a == b > 0 and c == d > 0
    assert "grows with nodes (6,2,2 to 20,2,5):\n    nothing\n" in text
    rows = text.split("grows with rows (2 to 3):")[1]
    assert re.search(r"request\.py (Row\.)?take 2 -> 3", rows)


BAD = {
    "batch size": ["--batch_size", "0"],
    "tree": ["--tree", "16,4"],
    "compile": ["--compile", "fast"],
    "too few tokens": ["--max_new_tokens", "4"],
    "too many tokens": ["--max_new_tokens", "5000"],
    "unknown flag": ["--trees", "8,4,2"],
    "missing head": ["--head", "/no/such/head"],
    "output is a folder": ["--output", "/"],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(in_process, base, name):
    code, stdout, err = in_process(profile, *base, *BAD[name])
    assert code != 0 and stdout == "" and one_error(err), err


def test_without_a_head(in_process, model_folder):
    code, _, err = in_process(profile, "--base", model_folder, "--device", "cpu")
    assert code != 0 and one_error(err) and "--head" in err


def test_the_name_hides_no_module_of_python(command):
    """`cProfile` imports a `profile` of its own."""
    result = command("cProfile", "--help")
    assert result.returncode == 0, result.stderr
    result = command("inference.bench.profile", "--help")
    assert result.returncode == 0 and "--max_new_tokens" in result.stdout
