"""tree="auto": lossless whatever it decides, and its decisions against what is best for known costs."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from engine_helpers import (
    FAMILIES,
    head_model,
    make_head,
    make_prompts,
    new_tokens,
    plain,
)

import eagle.draft
import eagle.model
import eagle.plan
from eagle.costs import NODES
from eagle.decode import Batch, decode
from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.model import EaModel
from eagle.plan import LADDER, WIDEST, Costs, Experience, Plan, size_of
from eagle.request import Request, Row, Stopping

NEW = 40
SAMPLING = ({}, {"temperature": 1.2, "top_p": 0.95, "seed": 21})


def make_costs(rows, base=1.0, node=0.02, draft=0.1, idle=1.0):
    """base + node a token, draft a pass, idle a plain cycle."""
    target = {rows * n: base + node * rows * n for n in NODES}
    return Costs(target, {rows: draft, rows * 5: 1.3 * draft}, idle)


BEHAVIOURS = {
    "wide": lambda rows: make_costs(rows, node=1e-6, draft=1e-6, idle=10.0),
    "narrow": lambda rows: make_costs(rows, node=0.5, draft=1e-3, idle=20.0),
    "rests": lambda rows: make_costs(rows, base=40.0),
    "any": make_costs,  # any rung may come after any other
}


@pytest.fixture
def inject(monkeypatch):
    """inject(behaviour): costs as if measured, which cycles then take; pauses are short. Returns what
    happened, cycle by cycle: the shape drafted, or None."""

    def use(behaviour):
        make = BEHAVIOURS[behaviour] if isinstance(behaviour, str) else behaviour
        monkeypatch.setattr(
            eagle.model, "CostTable", lambda *facts: lambda rows, context: make(rows)
        )
        monkeypatch.setattr(Plan, "clock", None)
        for name, value in (("TRIAL", 2), ("PAUSE", 5), ("LOSS", 1e9), ("AGAIN", 6)):
            monkeypatch.setattr(eagle.plan, name, value)
        if behaviour == "any":
            rng = random.Random(4)
            monkeypatch.setattr(Plan, "_choose", lambda plan, pace: rng.randrange(len(LADDER)))
            monkeypatch.setattr(Plan, "rests", lambda plan, rows: rng.random() < 0.5)
        shapes = []
        expand = Batch.expand

        def watched(batch):
            tree = expand(batch)
            shapes.append(batch.drafter.shape if batch.drafting else None)
            return tree

        monkeypatch.setattr(Batch, "expand", watched)
        return shapes

    return use


@pytest.fixture
def check_heads(monkeypatch):
    """In every cycle that drafts, the head has seen all that is committed, as if ingested afresh. Returns
    the lengths checked."""
    checked = []

    def checking(expand, batch):
        tree = expand(batch)
        if not batch.drafting:
            return tree
        assert batch.drafter.cache.host_lengths == batch.cache.host_lengths
        for i, row in enumerate(batch.rows):
            length = batch.drafter.cache.host_lengths[i]
            assert length == len(row.context) - 1 == batch.drafter.cache.lengths[i]
            fresh = fresh_drafter(batch.target, batch.drafter, row.context)
            slot = batch.drafter.cache.order[i]
            got = batch.drafter.cache.buffer[:, :, slot, :, :length]
            assert torch.allclose(got, fresh.cache.buffer[:, :, 0, :, :length], atol=1e-4)
            assert torch.allclose(batch.drafter.last[i], fresh.last[0], atol=1e-3)
            if not isinstance(batch.drafter, Oracle):  # what an oracle predicts is not the head's
                assert torch.allclose(batch.drafter.first[i], fresh.first[0], atol=1e-3)
            checked.append(length)
        return tree

    def use():
        expand = Batch.expand
        monkeypatch.setattr(Batch, "expand", lambda batch: checking(expand, batch))
        return checked

    return use


def features_of(target, ids):
    """ids [b, T], all real -> features [b, T, F]."""
    b, T = ids.shape
    cache = target.new_cache(b, T)
    return target.prefill(ids, torch.full((b,), T), [T] * b, cache, features=True)[1]


def fresh_drafter(target, drafter, context):
    ids, count = torch.tensor([context]), len(context) - 1
    fresh = HeadDrafter(drafter.head, drafter.embed, WIDEST)
    fresh.begin(1, count)
    features = features_of(target, ids[:, :-1])
    fresh.ingest(features, ids[:, 1:], torch.tensor([count]), [count])
    return fresh


class Oracle(HeadDrafter):
    """The head runs as ever, but its prediction is the row's next token with probability 0.9, or a wrong one
    with 0.3 where `right(row, position)` is false. It looks its rows up by slot: as many slots as rows."""

    def teach(self, texts, right):
        self.texts, self.right = texts, right
        self.ids = self.head.draft_token_ids().tolist()
        return self

    def told(self, row, position):
        """Log-probabilities [D] of the token that follows `position` + 1."""
        text = self.texts[row]
        token, sure = text[position + 2] if position + 2 < len(text) else 0, 0.9
        if not self.right(row, position + 2):
            token, sure = (token + 1) % 128, 0.3
        spread = torch.full((len(self.ids),), math.log((1 - sure) / 127))
        spread[self.ids.index(token)] = math.log(sure)
        return spread

    def ingest(self, *args):
        super().ingest(*args)
        if self.cache.order:
            ends = zip(self.cache.order, self.cache.host_lengths, strict=True)
            self.first = torch.stack([self.told(row, n - 1) for row, n in ends])

    def _pass(self, hidden, tokens, context):
        out, log_probs = super()._pass(hidden, tokens, context)
        assert out.isfinite().all()
        told = [
            torch.stack([self.told(row, p) for p in positions])
            for row, positions in zip(self.cache.order, context.positions.tolist(), strict=True)
        ]
        return out, torch.stack(told)


def oracle_model(target, prompts, answers, right=lambda row, position: True):
    head = make_head(target, 128)
    texts = [p + a for p, a in zip(prompts, answers, strict=True)]
    drafter = Oracle(head, target.embed, WIDEST).teach(texts, right)
    return EaModel(target, head, "auto", drafter=drafter)


def auto_cases():
    batch, sampling = itertools.cycle((1, 2, 5)), itertools.cycle((0, 1))
    for family, behaviour in itertools.product(FAMILIES, BEHAVIOURS):
        yield family, behaviour, next(batch), next(sampling)


@pytest.mark.parametrize("family, behaviour, batch, sampled", auto_cases())
def test_auto_equals_plain(targets, inject, family, behaviour, batch, sampled):
    target, prompts, sampling = targets(family), make_prompts()[:batch], SAMPLING[sampled]
    expected = plain(target, prompts, max_new_tokens=NEW, **sampling)
    shapes = inject(behaviour)
    model = head_model(target, "auto", draft_vocab=128)
    assert new_tokens(model.generate(prompts, max_new_tokens=NEW, **sampling)) == expected
    sizes = [shape.num_nodes for shape in shapes if shape]
    if behaviour == "rests":
        assert 0 < len(sizes) < 0.4 * len(shapes)
    elif behaviour == "any":
        assert len(set(sizes)) > 4 and None in shapes
    else:
        assert (max(sizes) > 30) == (behaviour == "wide") and min(sizes) < 13


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "sampled"])
def test_slots_past_the_length_are_never_read(targets, inject, behaviour, sampling):
    for family in ("llama", "gemma2", "mistral"):
        target, prompts = targets(family), make_prompts((9, 2, 15))
        answers = plain(target, prompts, max_new_tokens=NEW, **sampling)
        shapes = inject(behaviour)
        model = oracle_model(target, prompts, answers, lambda row, p: (p + row) % 4)

        def poison(cache, drafter):
            for each in (cache, drafter.cache):
                for row, length in zip(each.order, each.host_lengths, strict=True):
                    each.buffer[:, :, row, :, length:] = float("nan")

        result = model.generate(prompts, max_new_tokens=NEW, on_cache=poison, **sampling)
        assert new_tokens(result) == answers and result.tau > 1.05
        assert any(shapes) and None in shapes


def test_after_a_rest_the_head_drafts_as_before(llama, inject, check_heads):
    prompts = make_prompts((9, 3))
    answers = plain(llama, prompts, max_new_tokens=150)
    shapes, checked = inject("rests"), check_heads()
    model = oracle_model(llama, prompts, answers)
    seen, tokens = [], [0, 0]
    start = model._start(prompts, max_new_tokens=150)
    for _ in start.steps:
        now = [len(row.tokens) for row in start.rows]
        seen.append([a - b for a, b in zip(now, tokens, strict=True)])
        tokens = now
    assert [row.tokens for row in start.rows] == answers
    # the first step is the prompts' pass; an always right head gains the longest path in every drafting cycle
    for shape, gained in list(zip(shapes, seen[1:], strict=True))[:-1]:
        assert gained == [1 if shape is None else shape.levels + 1] * 2
    rests = [len(list(run)) for drafts, run in itertools.groupby(shapes, bool) if not drafts]
    assert rests[0] == 1 and set(rests[1:-1]) == {5} and len(rests) >= 6
    assert len(checked) == 2 * sum(shape is not None for shape in shapes)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_generate_many_with_few_slots(llama, inject, check_heads, behaviour, slots):
    """Rows come and go while others rest."""
    prompts = make_prompts((9, 3, 14, 1, 6, 2, 11))
    requests = [
        {"input_ids": p, "max_new_tokens": 9 + 5 * i, "seed": 7 + i, "temperature": 1.2 * (i % 2)}
        for i, p in enumerate(prompts)
    ]
    expected = [row.tokens for row in EaModel(llama).generate_many(requests, slots=slots)]
    shapes, checked = inject(behaviour), check_heads()
    model = head_model(llama, "auto", draft_vocab=128)
    rows = model.generate_many(requests, slots=slots)
    assert [row.tokens for row in rows] == expected
    assert [len(row.tokens) for row in rows] == [9 + 5 * i for i in range(7)]
    assert checked and None in shapes


@pytest.mark.parametrize("behaviour", ["wide", "rests", "any"])
def test_rows_that_are_cancelled_or_end_early(llama, inject, check_heads, behaviour):
    prompts = make_prompts()
    answers = plain(llama, prompts, max_new_tokens=NEW)
    eos = answers[3][12]
    expected = plain(llama, prompts, max_new_tokens=NEW, eos_token_id=[eos])
    _, checked = inject(behaviour), check_heads()
    model = head_model(llama, "auto", draft_vocab=128)
    rows = {}
    for span in model.stream(prompts, slots=3, max_new_tokens=NEW, eos_token_id=[eos]):
        rows[span.index] = span.row
        if span.index == 1 and len(span.row.tokens) > 7:
            span.row.cancel()
    gone = rows.pop(1)
    assert gone.finish_reason == "cancelled" and gone.tokens == expected[1][: len(gone.tokens)]
    assert {i: row.tokens for i, row in rows.items()} == {i: expected[i] for i in (0, 2, 3, 4)}
    assert len(rows[3].tokens) <= 13 and rows[3].finish_reason == "eos" and checked


def test_a_broken_head_costs_speed_only(llama, inject):
    prompts = make_prompts((5, 8))
    for broken in ("lm_head", "fc"):
        inject("wide")
        model = head_model(llama, "auto", draft_vocab=128)
        getattr(model.head, broken).weight.data[3] = float("nan")
        result = new_tokens(model.generate(prompts, max_new_tokens=12))
        assert result == plain(llama, prompts, max_new_tokens=12)


# what a rest leaves undone


class Schedule:
    """A plan that drafts in the cycles for which `drafts` says so; a rest puts prompts off or does not."""

    def __init__(self, drafts, put_off):
        self.drafts, self.put_off, self.cycle = drafts, put_off, 0

    def rests(self, rows):
        return self.put_off and not self.drafts(self.cycle)

    def begin(self, rows):
        self.cycle += 1
        return LADDER[4][0] if self.drafts(self.cycle - 1) else None

    def end(self, gained):
        pass


def run_schedule(target, sizes, drafts, put_off, slots=2):
    """sizes: (prompt, new tokens) of each request -> their tokens, and how many tokens the head took in which
    pass, before which cycle."""
    prompts = make_prompts([n for n, _ in sizes])
    rows = [
        Row(Request(p, stopping=Stopping(new)), new)
        for p, (_, new) in zip(prompts, sizes, strict=True)
    ]
    head, taken, plan = make_head(target, 128), [], Schedule(drafts, put_off)
    target.set_feature_layers(head.config.feature_layers)

    class Watched(HeadDrafter):
        def ingest(self, features, tokens, counts, host_counts):
            assert counts.tolist() == host_counts
            taken.append((plan.cycle, host_counts))
            super().ingest(features, tokens, counts, host_counts)

    for _ in decode(
        target, rows, slots=slots, drafter=Watched(head, target.embed, WIDEST), plan=plan
    ):
        pass
    return [row.tokens for row in rows], taken


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "sizes, rest, slots",
    [
        ([(9, 40), (3, 9), (14, 5), (1, 7), (6, 30)], range(4, 20), 2),
        ([(9, 12), (3, 9), (14, 15), (1, 7), (6, 30), (2, 20)], range(0, 30), 3),
        # the first row and the last prompt together are longer than a slot
        ([(160, 60), (5, 8), (200, 30)], range(5, 20), 2),
    ],
    ids=["amid", "from the start", "long"],
)
def test_prompts_that_come_in_a_rest_are_put_off(targets, check_heads, family, sizes, rest, slots):
    target, checked = targets(family), check_heads()
    expected = [
        plain(target, [p], max_new_tokens=new)[0]
        for p, (_, new) in zip(make_prompts([n for n, _ in sizes]), sizes, strict=True)
    ]
    for put_off in (True, False):
        tokens, taken = run_schedule(target, sizes, lambda n: n not in rest, put_off, slots)
        assert tokens == expected
        passes = [counts for cycle, counts in taken if cycle in rest]
        assert bool(passes) != put_off  # passes of prompts
        late = [counts for cycle, counts in taken if cycle == rest.stop + 1]
        assert (len(late[0]) > 1 and max(late[0]) > len(rest)) or not put_off
    assert checked


def test_what_is_put_off_goes_with_its_rows(llama, monkeypatch):
    held, expand = [], Batch.expand

    def watched(batch):
        living = {id(row) for row in batch.rows}
        assert all(living & {id(row) for row in rows} for rows, _ in batch.deferred)
        held.append(len(batch.deferred))
        return expand(batch)

    monkeypatch.setattr(Batch, "expand", watched)
    _, taken = run_schedule(llama, [(5, 6)] * 12, lambda n: False, True)
    assert not taken and len(held) == 30 and max(held) < 7


def test_a_call_that_rests_from_end_to_end_never_runs_the_head(llama, inject, monkeypatch):
    """What one call has learnt, the next one knows."""
    shapes = inject("rests")
    monkeypatch.setattr(eagle.plan, "PAUSE", 1000)
    model = head_model(llama, "auto", draft_vocab=128)
    model.generate([[1, 2, 3]], max_new_tokens=NEW)
    assert any(shapes)
    shapes.clear()
    monkeypatch.setattr(HeadDrafter, "ingest", None)
    prompts = make_prompts((9, 3))
    for batch in (prompts[:1], prompts):  # and more rows gain less
        assert new_tokens(model.generate(batch, max_new_tokens=9)) == plain(
            llama, batch, max_new_tokens=9
        )
    assert not any(shapes)
    with pytest.raises(TypeError):  # samples are accepted otherwise: that is another experience
        model.generate(prompts, max_new_tokens=9, temperature=1.0)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_ingesting_in_chunks_equals_one_pass(llama, monkeypatch, chunk):
    head = make_head(llama, 128)
    llama.set_feature_layers(head.config.feature_layers)
    ids = torch.tensor([make_prompts((24,), seed=i)[0] for i in range(3)])
    features, following = features_of(llama, ids), ids.roll(-1, 1)
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
    assert pieces.cache.host_lengths == whole.cache.host_lengths == [12, 6, 18]
    assert pieces.cache.lengths.tolist() == [12, 6, 18]
    assert torch.allclose(pieces.last, whole.last, atol=1e-5)
    assert torch.allclose(pieces.first, whole.first, atol=1e-5)
    for row, n in enumerate([12, 6, 18]):
        got, expected = (d.cache.buffer[:, :, row, :, :n] for d in (pieces, whole))
        assert torch.allclose(got, expected, atol=1e-5)


# trees, and calls that do not plan


@pytest.mark.parametrize("tree", ["automatic", "Auto", "", "wide", "16,4", 5, None, (16, None, 4)])
def test_unknown_trees_name_auto(llama, tree):
    with pytest.raises(EagleError, match="auto.*16,4,4"):
        EaModel(llama, make_head(llama), tree)
    if tree is not None:
        model = head_model(llama)
        with pytest.raises(EagleError, match="auto.*16,4,4"):
            model.generate([[1, 2]], max_new_tokens=2, tree=tree)


def test_auto_without_a_head_decodes_plainly(llama):
    prompts = make_prompts((4, 7))
    model = EaModel(llama, None, "auto")
    result = model.generate(prompts, max_new_tokens=10)
    assert new_tokens(result) == plain(llama, prompts, max_new_tokens=10)
    assert model.plan is None and result.tau == 1.0
    assert "no call" in model.explain()


@pytest.mark.parametrize(
    "options",
    [{"forced_acceptance": 2}, {"draft": False}, {"tree": "8,4,2"}],
    ids=["forced", "plain", "fixed"],
)
def test_calls_that_do_not_plan(llama, inject, options):
    def refuse(rows):
        raise AssertionError("costs were asked for")

    shapes = inject(refuse)
    model = head_model(llama, "auto", draft_vocab=128)
    result = model.generate(make_prompts((4, 7)), max_new_tokens=13, **options)
    assert model.plan is None
    assert [len(row.tokens) for row in result.rows] == [13, 13]
    if "forced_acceptance" in options:
        assert result.tau == 3.0 and set(shapes) == {WIDEST}
    # and the other way round: a call may plan where the model does not
    inject("wide")
    fixed = head_model(llama, "8,4,2", draft_vocab=128)
    fixed.generate([[1, 2]], max_new_tokens=4, tree="auto")
    assert isinstance(fixed.plan, Plan)


# decisions, against costs and a head that are known


@functools.cache
def reached(shape, p):
    """The chance that at least d draft tokens are accepted, d from 1, where a node's best child is right with
    probability p and the others share the rest, and the head knows that."""
    odds = [p] + [(1 - p) * 0.5**i for i in range(1, shape.top_k)]
    level, nodes = [1.0], []
    for d in range(1, shape.levels + 1):
        level = [a * o for a in sorted(level, reverse=True)[: shape.top_k] for o in odds]
        nodes += [(x, d) for x in level]
    kept = sorted(nodes, reverse=True)[: shape.num_nodes - 1]
    return [sum(x for x, e in kept if e == d) for d in range(1, shape.levels + 1)]


def tau(shape, p):
    return 1 + sum(reached(shape, p)) if shape else 1.0


def best_rate(costs, rows, p):
    return max(rows * tau(shape, p) / costs.cycle(shape, rows) for shape, _ in LADDER)


class Simulation:
    """A plan at work on a made-up clock. `cycles`: the rows, shape and milliseconds of each, and the tokens
    that its rows gain in the mean, so that what is judged is the choice and not the luck."""

    def __init__(self, costs, believed=None, seed=0):
        self.costs, self.cycles, self.now = costs, [], 0.0
        self.rng = np.random.default_rng(seed)
        self.plan = Plan(believed or costs, Experience())
        self.plan.clock = lambda: self.now

    def run(self, cycles, rows, p, slower=lambda cycle: 1.0):
        """slower(cycle): by what factor, of those counted from the beginning."""
        for _ in range(cycles):
            shape = self.plan.begin(rows)
            ms = self.costs(size_of(rows)).cycle(shape, rows) * slower(len(self.cycles))
            gained = rows
            if shape:
                luck = self.rng.random(rows)
                gained += sum(int((luck < r).sum()) for r in reached(shape, p))
            self.now += ms * self.rng.lognormal(0, 0.05) / 1e3
            self.plan.end(gained)
            self.cycles.append((rows, shape, ms, rows * tau(shape, p)))
        return self

    def rate(self, since=0, but=None):
        some = [c for i, c in enumerate(self.cycles) if i >= since and i != but]
        return sum(c[3] for c in some) / sum(c[2] for c in some)

    def drafted(self, since=0, until=None):
        """The share of cycles."""
        some = self.cycles[since:until]
        return sum(shape is not None for _, shape, _, _ in some) / len(some)


def fixed(*args):
    """For any number of rows."""
    return lambda rows: make_costs(rows, *args)


SETTINGS = {
    "small": (1, (1.0, 0.02, 0.1, 1.0)),
    "small, 8 rows": (8, (1.0, 0.02, 0.1, 1.0)),
    "large": (1, (30.0, 0.3, 3.0, 30.0)),
    "large, 4 rows": (4, (10.0, 0.2, 1.0, 10.0)),
    "free nodes": (1, (10.0, 0.01, 0.5, 10.0)),
    "dear nodes": (1, (1.0, 0.15, 0.1, 1.2)),
    "tiny": (4, (0.1, 0.002, 0.02, 0.11)),
    "dear drafts": (1, (2.0, 0.1, 0.3, 1.0)),
    "hopeless": (8, (5.0, 0.2, 0.3, 3.0)),
}


@pytest.mark.parametrize("p", [0.2, 0.4, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_comes_within_5_percent_of_the_best_rung(name, p):
    rows, args = SETTINGS[name]
    costs = make_costs(rows, *args)
    rates = [Simulation(fixed(*args), seed=s).run(1500, rows, p).rate(500) for s in range(2)]
    assert np.mean(rates) > 0.95 * best_rate(costs, rows, p)
