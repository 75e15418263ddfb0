"""tree="auto": lossless whatever it decides, and its decisions against what is best for known
costs."""

import functools
import json
import random

import numpy as np
import pytest
import torch
from engine_helpers import (
    head_model,
    make_head,
    make_prompts,
    make_target,
    new_tokens,
    plain,
    poison,
    prefilled,
)

import eagle.costs
import eagle.draft
import eagle.model
import eagle.plan
from eagle.costs import CostTable
from eagle.decode import Batch
from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.model import EaModel
from eagle.plan import SHAPES, WIDEST, Experience, Plan, size_of
from eagle.tree import TreeShape

NEW = 40
INGEST = HeadDrafter.ingest  # which a test watches
SAMPLING = ({}, {"temperature": 1.2, "top_p": 0.95, "seed": 21})


def make_costs(rows, base=1.0, node=0.02, draft=0.1, idle=1.0):
    """base + node a token, draft a pass of the head, idle a plain cycle."""
    trees = {str(s): base + node * rows * s.num_nodes + draft * (s.depth + 1) for s in SHAPES}
    return {"plain": idle, **trees}


BEHAVIOURS = {
    "wide": lambda rows: make_costs(rows, node=1e-6, draft=1e-6, idle=10.0),
    "narrow": lambda rows: make_costs(rows, node=0.5, draft=1e-3, idle=20.0),
    "rests": lambda rows: make_costs(rows, base=40.0),
    "any": make_costs,  # any tree may come after any other, or none
}


@pytest.fixture
def inject(monkeypatch):
    """inject(behaviour): costs as if measured; tries and pauses are short. rest: cycles that do not
    draft. Returns what happened, cycle by cycle: the shape drafted, or None."""
    expand = Batch.expand

    def use(behaviour, rest=None, check=False):
        make = BEHAVIOURS.get(behaviour, behaviour)
        monkeypatch.setattr(eagle.model, "CostTable", lambda *facts: lambda rows, _: make(rows))
        for name, value in (("TRIAL", 2), ("PAUSE", 5), ("LOSS", 1e9), ("AGAIN", 6)):
            monkeypatch.setattr(eagle.plan, name, value)
        shapes, rng = [], random.Random(4)

        def rests(plan, rows):
            return len(shapes) in rest if rest else rng.random() < 0.5

        def begin(plan, rows):
            plan._meet(rows)
            plan.place = 4 if rest else rng.randrange(-1, len(SHAPES))
            return None if plan.place < 0 or rest and len(shapes) in rest else SHAPES[plan.place]

        if behaviour == "any":
            monkeypatch.setattr(Plan, "begin", begin)
            monkeypatch.setattr(Plan, "rests", rests)

        def watched(batch):
            living = {id(row) for row in batch.rows}  # what is put off goes with its rows
            assert all(living & {id(row) for row in rows} for rows, _ in batch.deferred)
            tree = expand(batch)
            shapes.append(batch.drafter.shape if batch.drafting else None)
            for i, row in enumerate(batch.rows if check and batch.drafting else ()):
                fresh = fresh_drafter(batch.target, batch.drafter, row.context)
                assert batch.cache.host_lengths[i] == len(row.context) - 1
                assert_same(batch.drafter, i, fresh, 0, len(row.context) - 1, 1e-4)
            return tree

        monkeypatch.setattr(Batch, "expand", watched)
        return shapes

    return use


def assert_same(drafter, row, other, other_row, length, atol, state_atol=1e-3):
    """Two heads have seen the same `length` tokens."""
    for each, place in ((drafter, row), (other, other_row)):
        assert each.cache.host_lengths[place] == each.cache.lengths[place] == length
    got = drafter.cache.buffer[:, :, drafter.cache.order[row], :, :length]
    expected = other.cache.buffer[:, :, other.cache.order[other_row], :, :length]
    assert torch.allclose(got, expected, atol=atol)
    assert torch.allclose(drafter.last[row], other.last[other_row], atol=state_atol)
    assert torch.allclose(drafter.first[row], other.first[other_row], atol=state_atol)


def fresh_drafter(target, drafter, context):
    ids, count = torch.tensor([context]), len(context) - 1
    fresh = HeadDrafter(drafter.head, drafter.embed, WIDEST)
    fresh.begin(1, count)
    _, features = prefilled(target, [context[:-1]])
    INGEST(fresh, features, ids[:, 1:], torch.tensor([count]), [count])
    return fresh


AUTO = [("llama", "wide", 1, 0), ("llama", "rests", 5, 0), ("qwen2", "narrow", 5, 0)]
AUTO += [("qwen2", "any", 2, 0), ("qwen3", "wide", 5, 0), ("qwen3", "any", 5, 1)]
AUTO += [("mistral", "wide", 1, 1), ("mistral", "rests", 5, 1), ("mistral", "any", 3, 1)]
AUTO += [("gemma2", "any", 2, 1), ("gemma2", "narrow", 3, 0), ("gemma2", "rests", 3, 0)]


@pytest.mark.parametrize("family, behaviour, batch, sampled", AUTO)
def test_auto_equals_plain(targets, inject, family, behaviour, batch, sampled):
    target, prompts = targets(family), make_prompts()[:batch]
    options = dict(max_new_tokens=NEW, **SAMPLING[sampled])
    expected = plain(target, prompts, **options)
    shapes, model = inject(behaviour), head_model(target, "auto", draft_vocab=128)
    assert new_tokens(model.generate(prompts, on_cache=poison, **options)) == expected
    sizes = [shape.num_nodes for shape in shapes if shape]
    assert sizes and (None in shapes) == (behaviour in ("rests", "any"))
    if behaviour == "rests":
        assert len(sizes) < 0.4 * len(shapes)
    elif behaviour == "any":
        assert len(set(sizes)) > 4
    else:
        assert max(sizes) > 30 if behaviour == "wide" else max(sizes) < 30 and min(sizes) < 7


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_rows_come_and_go_while_others_rest(llama, inject, behaviour):
    """They are many for few slots, end early, and are cancelled."""
    prompts = make_prompts((9, 3, 14, 1, 6, 2, 11))
    requests = [
        {"input_ids": p, "max_new_tokens": 9 + 5 * i, "seed": 7 + i, "temperature": 1.2 * (i % 2)}
        for i, p in enumerate(prompts)
    ]
    expected = [row.tokens for row in EaModel(llama).generate_many(requests, slots=3)]
    requests[4]["eos_token_id"] = eos = expected[4][12]
    expected[4] = expected[4][: expected[4].index(eos) + 1]
    shapes = inject(behaviour, check=True)
    model, rows = head_model(llama, "auto", draft_vocab=128), {}
    for span in model.stream(requests, slots=3):
        rows[span.index] = span.row
        if span.index == 5 and len(span.row.tokens) > 7:
            span.row.cancel()
    gone = rows.pop(5)
    assert gone.finish_reason == "cancelled" and gone.tokens == expected[5][: len(gone.tokens)]
    assert {i: row.tokens for i, row in rows.items()} == {i: expected[i] for i in rows}
    assert len(rows) == 6 and rows[4].finish_reason == "eos"
    assert any(shapes) and (None in shapes) == (behaviour in ("rests", "any"))


def test_a_broken_head_costs_speed_only(llama, inject):
    prompts = make_prompts((5, 8))
    for broken in ("lm_head", "fc"):
        inject("wide")
        model = head_model(llama, "auto", draft_vocab=128)
        getattr(model.head, broken).weight.data[3] = float("nan")
        result = new_tokens(model.generate(prompts, max_new_tokens=12))
        assert result == plain(llama, prompts, max_new_tokens=12)


# what a rest leaves undone


SCHEDULES = {
    "amid": ([(9, 40), (3, 9), (14, 5), (1, 7), (6, 30)], range(4, 20), 2),
    "from the start": ([(9, 12), (3, 9), (14, 15), (1, 7), (6, 30), (2, 20)], range(30), 3),
    # the first row and the last prompt together are longer than a slot
    "long": ([(160, 60), (5, 8), (200, 30)], range(5, 20), 2),
    "to the end": ([(5, 6)] * 12, range(99), 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_prompts_that_come_in_a_rest_are_put_off(targets, monkeypatch, inject, name):
    """sizes: (prompt, new tokens) of each request."""
    (sizes, rest, slots), target = SCHEDULES[name], targets("mistral")
    prompts, taken = make_prompts([n for n, _ in sizes]), []
    limits = [new for _, new in sizes]
    whole = plain(target, prompts, max_new_tokens=max(limits))
    shapes = inject("any", rest, check=True)

    def watched(drafter, features, tokens, counts, host_counts):
        taken.append((len(shapes), not any(drafter.cache.host_lengths), host_counts))
        INGEST(drafter, features, tokens, counts, host_counts)

    monkeypatch.setattr(HeadDrafter, "ingest", watched)
    model = head_model(target, "auto", draft_vocab=128)
    requests = [{"input_ids": p, "max_new_tokens": n} for p, n in zip(prompts, limits, strict=True)]
    rows = model.generate_many(requests, slots=slots)
    assert [r.tokens for r in rows] == [a[:n] for a, n in zip(whole, limits, strict=True)]
    assert not any(empty and cycle in rest for cycle, empty, _ in taken)
    if name == "to the end":
        assert not taken and len(shapes) == 30
    else:
        late = [counts for cycle, _, counts in taken if cycle >= rest.stop]
        assert any(shapes) and any(len(counts) > 1 and max(counts) > 15 for counts in late)


def test_a_call_that_rests_from_end_to_end_never_runs_the_head(llama, inject, monkeypatch):
    """What one call has learnt, the next one knows."""
    shapes = inject("rests")
    monkeypatch.setattr(eagle.plan, "PAUSE", 1000)
    model = head_model(llama, "auto", draft_vocab=128)
    model.generate([[1, 2, 3]], max_new_tokens=NEW)
    assert any(shapes)
    shapes.clear()
    monkeypatch.setattr(HeadDrafter, "ingest", None)
    prompts = make_prompts((9,))
    expected = plain(llama, prompts, max_new_tokens=30)
    assert new_tokens(model.generate(prompts, max_new_tokens=30)) == expected
    assert not any(shapes)
    with pytest.raises(TypeError):  # samples are accepted otherwise: that is another experience
        model.generate(prompts, max_new_tokens=30, temperature=1.0)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_ingesting_in_chunks_equals_one_pass(llama, monkeypatch, chunk):
    head = make_head(llama, 128)
    llama.set_feature_layers(head.config.feature_layers)
    prompts = [make_prompts((24,), seed=i)[0] for i in range(3)]
    features, following = prefilled(llama, prompts)[1], torch.tensor(prompts).roll(-1, 1)
    calls = [([9, 1, 4], 0), ([0, 2, 11], 9), ([3, 3, 3], 20)]  # counts, and where to take from

    def ingest(size):
        monkeypatch.setattr(eagle.draft, "CHUNK", size)
        drafter = HeadDrafter(head, llama.embed, WIDEST)
        drafter.begin(3, 24)
        for counts, start in calls:
            piece = slice(start, start + max(counts))
            given = features[:, piece].clone(), following[:, piece].clone()
            for row, n in enumerate(counts):  # what is not a row's own is not looked at
                given[0][row, n:] = float("nan")
            drafter.ingest(*given, torch.tensor(counts), counts)
        return drafter

    whole, pieces = ingest(512), ingest(chunk)
    for row, n in enumerate([12, 6, 18]):
        assert_same(pieces, row, whole, row, n, 1e-5, 1e-5)


# trees, and calls that do not plan


@pytest.mark.parametrize("tree", ["Auto", "", "16,4", 5, (16, None, 4)])
def test_unknown_trees_name_auto(llama, tree):
    with pytest.raises(EagleError, match="auto.*16,4,4"):
        EaModel(llama, make_head(llama), tree)


@pytest.mark.parametrize("options", [{"forced_acceptance": 2}, {"draft": False}, {"tree": "8,4,2"}])
def test_calls_that_do_not_plan(llama, inject, options):
    shapes, prompts = inject(lambda rows: pytest.fail("costs were asked for")), make_prompts((4, 7))
    model = head_model(llama, "auto", draft_vocab=128)
    result = model.generate(prompts, max_new_tokens=13, **options)
    assert model.plan is None and "no call" in model.explain()
    assert [len(row.tokens) for row in result.rows] == [13, 13]
    if "forced_acceptance" in options:
        assert result.tau == 3.0 and set(shapes) == {WIDEST}
    headless = EaModel(llama, None, "auto").generate(prompts, max_new_tokens=10)
    assert new_tokens(headless) == plain(llama, prompts, max_new_tokens=10)
    # and the other way round: a call may plan where the model does not
    inject("wide")
    fixed = head_model(llama, "8,4,2", draft_vocab=128)
    fixed.generate([[1, 2]], max_new_tokens=4, tree="auto")
    assert isinstance(fixed.plan, Plan) and fixed.drafter.shape == TreeShape(8, 4, 2)


# decisions, against costs and a head that are known


@functools.cache
def reached(shape, p):
    """The chance that at least d draft tokens are accepted, d from 1, where a node's best child is
    right with probability p and the others share the rest, and the head knows that."""
    odds = [p] + [(1 - p) * 0.5**i for i in range(1, shape.top_k)]
    level, nodes = [1.0], []
    for d in range(1, shape.levels + 1):
        level = [a * o for a in sorted(level, reverse=True)[: shape.top_k] for o in odds]
        nodes += [(x, d) for x in level]
    kept = sorted(nodes, reverse=True)[: shape.num_nodes - 1]
    return [sum(x for x, e in kept if e == d) for d in range(1, shape.levels + 1)]


class Simulation:
    """A plan at work. `cycles`: whether it drafted, its milliseconds, and the tokens that its
    rows gain in the mean, so that what is judged is the choice and not the luck."""

    def __init__(self, rows, *args):
        self.rows, self.costs, self.cycles = rows, make_costs(size_of(rows), *args), []
        self.rng, self.plan = np.random.default_rng(0), Plan(lambda _: self.costs, Experience())
        self.plain_rate = rows / self.costs["plain"]

    def run(self, cycles, p):
        for _ in range(cycles):
            shape = self.plan.begin(self.rows)
            chances = reached(shape, p) if shape else []
            if shape:
                luck = self.rng.random((self.rows, 1)) < np.array(chances)
                self.plan.end(luck.sum(1).tolist())
            ms = self.costs[str(shape) if shape else "plain"]
            self.cycles.append((shape is not None, ms, self.rows * (1 + sum(chances))))
        return self

    def part(self, since=0, until=None):
        """The share of cycles that drafted, and tokens a millisecond."""
        drafted, ms, gained = np.array(self.cycles[since:until]).mean(0)
        return drafted, gained / ms

    def best_rate(self, p):
        rates = [self.rows * (1 + sum(reached(s, p))) / self.costs[str(s)] for s in SHAPES]
        return max(self.plain_rate, *rates)


SETTINGS = {
    "small": (1, 1.0, 0.02, 0.1, 1.0),
    "small, 8 rows": (8, 1.0, 0.02, 0.1, 1.0),
    "large": (1, 30.0, 0.3, 3.0, 30.0),
    "large, 4 rows": (4, 10.0, 0.2, 1.0, 10.0),
    "free nodes": (1, 10.0, 0.01, 0.5, 10.0),
    "dear nodes": (1, 1.0, 0.15, 0.1, 1.2),
    "hopeless": (8, 5.0, 0.2, 0.3, 3.0),
}


@pytest.mark.parametrize("p", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_comes_near_the_best_tree(name, p):
    work = Simulation(*SETTINGS[name]).run(1500, p)
    best = work.best_rate(p)
    if best < 1.1 * work.plain_rate:  # too little to be told from luck
        best = work.plain_rate
    assert work.part(500)[1] > 0.93 * best


@pytest.mark.parametrize("rows, unit", [(1, 0.02), (7, 100.0)])
@pytest.mark.parametrize("base, node, draft, p", [(2.0, 0.05, 0.3, 0.6), (4.0, 0.1, 1.0, 0.9)])
def test_trying_in_vain_costs_little(rows, unit, base, node, draft, p):
    """Whatever a cycle takes: a fiftieth of a millisecond or a tenth of a second."""
    work = Simulation(rows, unit * base, unit * node, unit * draft, unit).run(4000, p)
    assert work.best_rate(p) == work.plain_rate
    assert work.part()[1] > 0.96 * work.plain_rate
    assert 0 < work.part(1500)[0] < 0.05  # it does try again


@pytest.mark.parametrize("rows, args", [(1, (2.0, 0.05, 0.2, 1.0)), (4, (1.5, 0.02, 0.1, 1.0))])
def test_it_follows_what_is_accepted(rows, args):
    work = Simulation(rows, *args)
    for p, cycles in ((0.2, 2000), (0.9, 3000), (0.2, 3000)):
        work.run(cycles, p)
    drafted, rate = work.part(4000, 5000)
    assert drafted > 0.9 and rate > 0.9 * work.best_rate(0.9)
    assert work.part(500, 2000)[0] < 0.1 and work.part(7000)[0] < 0.1


def test_costs_are_asked_for_once_a_size():
    sizes = [size_of(rows) for rows in range(1, 26)]
    assert sizes == [1, 2, 3, 4] + [6] * 2 + [8] * 2 + [12] * 4 + [16] * 4 + [24] * 8 + [32]
    asked = []
    plan = Plan(lambda rows: asked.append(rows) or make_costs(rows), Experience())
    for rows in (3, 3, 5, 6, 1, 6, 5):
        plan.begin(rows)
        plan.end([1] * rows)
    assert asked == [3, 6, 1, 6]


# the table of costs: what is measured, when, and what becomes of its file


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """An empty EAGLE_CACHE, short measurements; returns the (rows, context) that were measured."""
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path))
    monkeypatch.setattr(eagle.costs, "REPEATS", 1)
    calls, measure = [], eagle.costs.measure

    def counting(target, drafter, *asked):
        calls.append(asked)
        return measure(target, drafter, *asked)

    monkeypatch.setattr(eagle.costs, "measure", counting)
    return calls


@pytest.fixture
def table(monkeypatch, tmp_path):
    """table(seed, mode, vocab, …): it measures in no time; `table.calls` holds what was asked."""

    def make(seed=0, mode="off", vocab=48, folder=tmp_path / "costs", **changes):
        target = make_target("llama", seed=seed, **changes)
        drafter = HeadDrafter(make_head(target, vocab), target.embed, WIDEST)
        return CostTable(target, drafter, mode, folder)

    make.calls = calls = []
    known = {"plain": 1.0}
    monkeypatch.setattr(eagle.costs, "measure", lambda t, d, *asked: calls.append(asked) or known)
    return make


def test_costs_are_measured_once(measured, tmp_path):
    prompts = make_prompts((5, 8, 3))
    for _ in range(2):  # the second model reads the file
        model = head_model(make_target("llama"), "auto", draft_vocab=128)
        for _ in range(2):
            got = new_tokens(model.generate(prompts, max_new_tokens=12))
            assert got == plain(model.target, prompts, max_new_tokens=12)
    assert measured[0] == (3, 128) and len(measured) == len(set(measured)) <= 3
    (path,) = tmp_path.rglob("costs-*.json")
    assert set(json.loads(path.read_text())) == {f"{rows}x{size}" for rows, size in measured}
    costs = model._costs["auto"](3, 128)
    assert list(costs)[:2] == ["plain", str(SHAPES[0])] and len(costs) > 2
    assert all(0 < ms < 1000 for ms in costs.values())
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    assert len(model.explain().splitlines()) > 2


def test_other_weights_modes_and_heads_have_files_of_their_own(table):
    tables = [table(), table(seed=1), table(mode="max"), table(vocab=128), table()]
    assert tables[0].path == tables[-1].path and len({t.path for t in tables}) == 4
    for each in (tables[0], tables[0], tables[1]):
        each(1, 10)
    assert table.calls == [(1, 128)] * 2


def test_rows_and_context_are_rounded_up(table):
    costs = table(max_position_embeddings=4096)
    for rows, context in ((1, 1), (1, 128), (5, 100), (6, 129), (5, 256), (7, 1025), (8, 9999)):
        costs(rows, context)
    expected = [(1, 128), (6, 128), (6, 256), (8, 2048)]
    assert table.calls == expected
    table(max_position_embeddings=4096)(7, 2000)
    assert table.calls == expected
    table()(2, 250)  # the model's own limit is 256
    assert table.calls[4:] == [(2, 128)]


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[3]", b"\xff\xfe", b'{"1x128": {"pla'])
def test_a_corrupt_file_is_measured_anew(table, text):
    path = table().path
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    costs = table()(1, 10)
    assert table()(1, 10) == costs and table.calls == [(1, 128)]  # what is there now is whole


def test_a_folder_that_cannot_be_written(table, tmp_path):
    (tmp_path / "file").write_text("")
    costs = table(folder=tmp_path / "file" / "costs")
    assert costs(1, 10) == costs(1, 20) == {"plain": 1.0} and table.calls == [(1, 128)]


@pytest.mark.parametrize("limit, vocab", [(8, 128), (16, 128), (40, 128), (256, 1), (256, 3)])
def test_models_with_a_small_limit_and_heads_with_few_tokens(measured, limit, vocab):
    """Fewer draft tokens than beams, too, when it is measured and when it drafts."""
    target, prompts = make_target("llama", max_position_embeddings=limit), [[1, 2], [5]]
    result = head_model(target, "auto", draft_vocab=vocab).generate(prompts, max_new_tokens=60)
    assert new_tokens(result) == plain(target, prompts, max_new_tokens=60)
    assert [len(row.tokens) for row in result.rows] == [min(limit - n, 60) for n in (2, 1)]
    assert measured and all(0 < context <= limit // 2 for _, context in measured)
