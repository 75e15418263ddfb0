"""The table of costs: what is measured, when, and what becomes of its file."""

import json

import pytest
from engine_helpers import head_model, make_head, make_prompts, make_target, new_tokens, plain

import eagle.costs
from eagle.costs import CostTable
from eagle.draft import HeadDrafter
from eagle.plan import SHAPES, WIDEST


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """An empty EAGLE_CACHE, short measurements; returns the (rows, context) that were measured."""
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path))
    monkeypatch.setattr(eagle.costs, "REPEATS", 1)
    calls, measure = [], eagle.costs.measure

    def counting(target, drafter, rows, context):
        calls.append((rows, context))
        return measure(target, drafter, rows, context)

    monkeypatch.setattr(eagle.costs, "measure", counting)
    return calls


def cost_files(folder):
    return sorted(folder.rglob("costs-*.json"))


def test_costs_are_measured_once(measured, tmp_path):
    prompts = make_prompts((5, 8, 3))
    expected = None
    for _ in range(2):  # the second model reads the file
        model = head_model(make_target("llama"), "auto", draft_vocab=128)
        for _ in range(2):
            got = new_tokens(model.generate(prompts, max_new_tokens=12))
            expected = expected or plain(model.target, prompts, max_new_tokens=12)
            assert got == expected
    assert measured[0] == (3, 128) and len(measured) == len(set(measured)) <= 3
    (path,) = cost_files(tmp_path)
    known = json.loads(path.read_text())
    assert set(known) == {f"{rows}x{context}" for rows, context in measured}
    costs = model._costs["auto"](3, 128)
    assert list(costs)[:2] == ["plain", str(SHAPES[0])] and len(costs) > 2
    assert all(0 < ms < 1000 for ms in costs.values())
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_other_weights_modes_and_heads_have_files_of_their_own(measured, tmp_path):
    def table(seed=0, mode="off", vocab=128):
        target = make_target("llama", seed=seed)
        drafter = HeadDrafter(make_head(target, vocab), target.embed, WIDEST)
        return CostTable(target, drafter, mode, tmp_path)

    assert table().path == table().path
    other = [table(seed=1), table(mode="max"), table(vocab=48)]
    assert len({t.path for t in [table(), *other]}) == 4
    table()(1, 10)
    table()(1, 10)
    other[0](1, 10)
    assert measured == [(1, 128)] * 2 and len(cost_files(tmp_path)) == 2


@pytest.fixture
def table(llama, monkeypatch, tmp_path):
    """A table that measures in no time; `table.calls` holds what was asked."""
    calls = []
    monkeypatch.setattr(
        eagle.costs, "measure", lambda t, d, *asked: calls.append(asked) or {"plain": 1.0}
    )
    drafter = HeadDrafter(make_head(llama), llama.embed, WIDEST)

    def make(target=llama):
        made = CostTable(target, drafter, "off", tmp_path / "costs")
        made.calls = calls
        return made

    return make


def test_rows_and_context_are_rounded_up(table, llama):
    long = make_target("llama", max_position_embeddings=4096)
    costs = table(long)
    for rows, context in ((1, 1), (1, 128), (5, 100), (6, 129), (5, 256), (7, 1025), (8, 9999)):
        costs(rows, context)
    expected = [(1, 128), (6, 128), (6, 256), (8, 2048)]
    assert costs.calls == expected
    table(long)(7, 2000)
    assert costs.calls == expected
    table(llama)(2, 250)  # the model's own limit is 256
    assert costs.calls[4:] == [(2, 128)]


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[3]", b"\xff\xfe", b'{"1x128": {"pla'])
def test_a_corrupt_file_is_measured_anew(table, text):
    path = table().path
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    costs = table()
    costs(1, 10)
    assert costs.calls == [(1, 128)]
    assert table()(1, 10) == costs(1, 10) and len(costs.calls) == 1  # what is there now is whole


def test_a_folder_that_cannot_be_written(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "file"))
    target = make_target("llama")
    result = head_model(target, "auto").generate([[1, 2, 3]], max_new_tokens=6)
    assert new_tokens(result) == plain(target, [[1, 2, 3]], max_new_tokens=6)
    assert measured == [(1, 128)]


@pytest.mark.parametrize("limit", [8, 16, 40])
def test_models_with_a_small_limit(measured, limit):
    target = make_target("llama", max_position_embeddings=limit)
    prompts = [[1, 2], [5]]
    result = head_model(target, "auto", draft_vocab=128).generate(prompts, max_new_tokens=60)
    assert new_tokens(result) == plain(target, prompts, max_new_tokens=60)
    assert [len(row.tokens) for row in result.rows] == [limit - 2, limit - 1]
    assert measured and all(0 < context <= limit // 2 for _, context in measured)


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_heads_with_few_tokens(measured, llama, vocab):
    """Fewer draft tokens than beams, when it is measured and when it drafts."""
    prompts = make_prompts((5, 8))
    result = head_model(llama, "auto", draft_vocab=vocab).generate(prompts, max_new_tokens=12)
    assert new_tokens(result) == plain(llama, prompts, max_new_tokens=12)
    assert measured[0] == (2, 128)
