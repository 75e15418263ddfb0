"""tree="auto": lossless whatever it decides, and its decisions against what is best for known
costs.
"""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from engine_helpers import FAMILIES, head_model, make_head, make_prompts, new_tokens, plain

import eagle.draft
import eagle.model
import eagle.plan
from eagle.costs import NODES
from eagle.decode import Batch, decode
from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.model import EaModel
from eagle.plan import LADDER, PLAIN, WIDEST, Costs, Experience, Pace, Plan, size_of
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
    """inject(behaviour): costs as if measured, which cycles then take; pauses are short. Returns
    what
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
    """In every cycle that drafts, the head has seen all that is committed, as if ingested afresh.
    Returns the lengths checked."""
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
    """The head runs as ever, but its prediction is the row's next token with probability 0.9, or a
    wrong one with 0.3 where `right(row, position)` is false. It looks its rows up by slot: as many
    slots as rows."""

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
    for i, (family, behaviour) in enumerate(itertools.product(FAMILIES, BEHAVIOURS)):
        yield family, behaviour, (1, 2, 5)[i % 3], (i + i // 4) % 2


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
        assert max(sizes) > 30 if behaviour == "wide" else max(sizes) < 30 and min(sizes) < 7


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
    # the first step is the prompts' pass; an always right head gains the longest path in every
    # drafting cycle
    for shape, gained in list(zip(shapes, seen[1:], strict=True))[:-1]:
        assert gained == [1 if shape is None else shape.levels + 1] * 2
    rests = [len(list(run)) for drafts, run in itertools.groupby(shapes, bool) if not drafts]
    assert rests[0] == 1 and set(rests[1:-1]) == {5} and len(rests) >= 6
    assert len(checked) == 2 * sum(shape is not None for shape in shapes)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("slots", [1, 3])
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
    """A plan that drafts in the cycles for which `drafts` says so; a rest puts prompts off or does
    not.
    """

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
    """sizes: (prompt, new tokens) of each request -> their tokens, and of each pass of the head
    that takes
    tokens: before which cycle, whether over an empty cache, and how many a row."""
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
            taken.append((plan.cycle, not any(self.cache.host_lengths), host_counts))
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
        assert any(empty and cycle in rest for cycle, empty, _ in taken) != put_off
        late = next(counts for cycle, _, counts in taken if cycle > rest.stop)
        assert not put_off or len(late) > 1 and max(late) > 15
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
        expected = plain(llama, batch, max_new_tokens=30)
        assert new_tokens(model.generate(batch, max_new_tokens=30)) == expected
    assert not any(shapes)
    with pytest.raises(TypeError):  # samples are accepted otherwise: that is another experience
        model.generate(prompts, max_new_tokens=30, temperature=1.0)


@torch.inference_mode()
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


@pytest.mark.parametrize("tree", ["automatic", "Auto", "", "wide", "16,4", 5, (16, None, 4)])
def test_unknown_trees_name_auto(llama, tree):
    with pytest.raises(EagleError, match="auto.*16,4,4"):
        EaModel(llama, make_head(llama), tree)
    with pytest.raises(EagleError, match="auto.*16,4,4"):
        head_model(llama).generate([[1, 2]], max_new_tokens=2, tree=tree)


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
    """A plan at work on a made-up clock. `cycles`: the rows, shape and milliseconds of each, and
    the tokens that its rows gain in the mean, so that what is judged is the choice and not the
    luck."""

    def __init__(self, costs, believed=None, seed=0, chances=reached):
        """costs(rows): what cycles take; believed: what the plan is told that they take."""
        self.costs, self.chances, self.cycles, self.now = costs, chances, [], 0.0
        self.rng = np.random.default_rng(seed)
        self.plan = Plan(believed or costs, Experience())
        self.plan.clock = lambda: self.now

    def run(self, cycles, rows, p, slower=lambda cycle: 1.0):
        """slower(cycle): by what factor, of those counted from the beginning."""
        for _ in range(cycles):
            shape = self.plan.begin(rows)
            ms = self.costs(size_of(rows)).cycle(shape, rows) * slower(len(self.cycles))
            chances = self.chances(shape, p) if shape else []
            luck = self.rng.random((rows, 1))
            self.now += ms * self.rng.lognormal(0, 0.05) / 1e3
            self.plan.end(rows + int((luck < chances).sum()))
            self.cycles.append((shape, ms, rows * (1 + sum(chances))))
        return self

    def rate(self, since=0, until=None, but=None):
        some = [c for i, c in enumerate(self.cycles[:until]) if i >= since and i != but]
        return sum(gained for _, _, gained in some) / sum(ms for _, ms, _ in some)

    def drafted(self, since=0, until=None):
        """The share of cycles."""
        some = self.cycles[since:until]
        return sum(shape is not None for shape, _, _ in some) / len(some)


def best_rate(costs, rows, p, chances=reached):
    return max(
        rows * (1 + sum(chances(shape, p) if shape else [])) / costs.cycle(shape, rows)
        for shape, _ in LADDER
    )


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
    best, plain_rate = best_rate(costs, rows, p), rows / costs.plain
    if best < 1.1 * plain_rate:  # too little to be told from luck
        best = plain_rate
    assert np.mean(rates) > 0.95 * best


def test_the_dearer_nodes_are_the_smaller_the_trees():
    def size(node):
        cycles = Simulation(fixed(1.0, node, 0.05, 1.0)).run(900, 1, 0.75).cycles[400:]
        return np.mean([shape.num_nodes for shape, _, _ in cycles if shape])

    sizes = [size(node) for node in (0.001, 0.02, 0.08, 0.3)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 30 and sizes[-1] < 6


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("unit", [0.02, 1.0, 100.0])
@pytest.mark.parametrize(
    "base, node, draft, p", [(1.4, 0.1, 0.2, 0.4), (2.0, 0.05, 0.3, 0.6), (4.0, 0.1, 1.0, 0.9)]
)
def test_trying_in_vain_costs_little(rows, unit, base, node, draft, p):
    """Whatever a cycle takes: a fiftieth of a millisecond or a tenth of a second."""
    costs = fixed(unit * base, unit * node, unit * draft, unit)
    assert best_rate(costs(size_of(rows)), rows, p) == rows / unit
    work = Simulation(costs).run(4000, rows, p)
    assert work.rate() > 0.97 * rows / unit
    assert 0 < work.drafted(1500) < 0.05  # it does try again


@pytest.mark.parametrize("rows", [1, 4])
def test_it_follows_what_is_accepted(rows):
    args = {1: (2.0, 0.05, 0.2, 1.0), 4: (1.5, 0.02, 0.1, 1.0)}[rows]
    costs, work = fixed(*args), Simulation(fixed(*args))
    for p, cycles in ((0.2, 2000), (0.9, 3000), (0.2, 3000)):
        work.run(cycles, rows, p)
    assert work.drafted(500, 2000) < 0.05
    assert work.drafted(4000, 5000) > 0.9
    assert work.rate(4000, 5000) > 0.9 * best_rate(costs(rows), rows, 0.9)
    assert work.drafted(7000) < 0.05


def test_a_try_looks_at_neighbours():
    """Chains lose, and so would wider trees if they were as much worse than was guessed."""

    def chances(shape, p):
        return [(0.7 if shape.top_k == 1 else 0.9) ** d for d in range(1, shape.levels + 1)]

    costs = fixed(2.0, 0.07, 0.3, 1.0)
    assert 1.25 > best_rate(costs(1), 1, 0, chances) > 1.2
    for seed in range(2):
        assert Simulation(costs, seed=seed, chances=chances).run(4000, 1, 0).rate(3000) > 1.15


@pytest.mark.parametrize("at", [1, 2, 3, 6, 11, 29, 128, 200])
@pytest.mark.parametrize("args, p", [((1.0, 0.02, 0.1, 1.0), 0.75), ((1.5, 0.05, 0.2, 1.0), 0.75)])
def test_a_hiccup_of_the_machine_is_soon_forgotten(args, p, at):
    costs = fixed(*args)
    work = Simulation(costs).run(700, 1, p, slower=lambda cycle: 50.0 if cycle == at else 1.0)
    assert work.rate(but=at) > 0.9 * best_rate(costs(1), 1, p)


def test_a_hiccup_in_a_try_prolongs_no_rest():
    costs = fixed(2.0, 0.05, 0.3, 1.0)

    def longest_rest(hiccup):
        work = Simulation(costs).run(6000, 1, 0.4, lambda cycle: 50.0 if cycle == hiccup else 1.0)
        runs = itertools.groupby(shape is not None for shape, _, _ in work.cycles)
        return max(len(list(run)) for drafts, run in runs if not drafts)

    assert longest_rest(hiccup=4) < 2 * longest_rest(hiccup=None)


@pytest.mark.parametrize("believed, true, wins", [(0.3, 1.0, True), (3.0, 1.0, False)])
def test_plain_decoding_is_looked_at_again(believed, true, wins):
    """Its cost was measured while the machine did something else, or less than now."""
    args = (1.3, 0.02, 0.1) if wins else (4.0, 0.05, 0.3)
    costs = fixed(*args, true)
    work = Simulation(costs, fixed(*args, believed)).run(2500, 1, 0.75)
    assert (work.drafted(0, 100) < 0.5) == wins  # misled
    assert (work.drafted(1000) > 0.9) == wins and (work.drafted(1000) < 0.1) == (not wins)
    # and while it drafts, it goes on looking
    plain_cycles = [i for i, (shape, _, _) in enumerate(work.cycles) if shape is None]
    assert not wins or sum(i > 1000 for i in plain_cycles) >= 2 * 11


# rows, and what is known of them


def test_sizes_that_share_costs_and_a_pace():
    sizes = [size_of(rows) for rows in range(1, 26)]
    assert sizes == [1, 2, 3, 4] + [6] * 2 + [8] * 2 + [12] * 4 + [16] * 4 + [24] * 8 + [32]


def loses(plan, rows, cycles=400):
    """Until speculation rests: cycles that take no time by the clock, and gain nothing by
    drafts.
    """
    plan.clock = None
    for _ in range(cycles):
        plan.begin(rows)
        plan.end(rows)
        if plan.pace.resting:
            return
    raise AssertionError("it never rests")


def test_more_rows_inherit_a_rest_and_fewer_do_not():
    experience = Experience()
    plan = Plan(lambda rows: make_costs(rows, base=5.0), experience)
    loses(plan, 4)
    assert plan.rests(5) and plan.rests(8) and plan.rests(4)
    assert plan.begin(8) is None
    plan.end(8)
    later = Plan(plan.costs, experience)  # another call
    later.clock = None
    assert later.rests(6) and later.rests(3) is False
    assert later.begin(3) is None  # to see what plain decoding takes, and then:
    later.end(3)
    assert later.begin(3) is not None and not later.rests(3)
    later.end(3)
    # fewer rows may gain, but where they do not either, they rest as well
    loses(later, 3)
    assert later.rests(3) and later.rests(4)
    later.pace.resting = 1  # the very next cycle but one drafts
    assert not later.rests(4)


def test_costs_are_asked_for_once_a_size():
    asked = []
    plan = Plan(lambda rows: asked.append(rows) or make_costs(rows), Experience())
    for rows in (3, 3, 5, 6, 1, 6, 5):
        plan.begin(rows)
        plan.end(rows)
    assert asked == [3, 6, 1, 6]
    assert sorted(plan.experience.paces) == [1, 3, 6]


@pytest.mark.parametrize("then", [4, 2])
def test_a_cycle_that_makes_up_for_a_rest_tells_nothing(then):
    """Of a cycle's time, that is: nor where the rows that rested have become fewer."""
    plan = Plan(lambda rows: make_costs(rows, base=1.5), Experience())
    loses(plan, 4)
    now, seen = 0.0, None
    plan.clock = lambda: now
    while True:
        drafts = plan.begin(then if seen else 4) is not None
        if drafts and seen:
            break
        seen = plan.pace.resting < 3  # the rest is over for four rows, or cut short for two
        now += 1e-3
        plan.end(plan.rows)
    rung = plan.pace.rungs[plan.place]
    before = (rung.tokens, rung.ms, rung.seen)
    now += 0.5
    plan.end(plan.rows)
    assert (rung.tokens, rung.ms, rung.seen) == before and plan.pace.lost > 400
    while plan.begin(then) is None:  # but the next one does
        plan.end(then)
    rung = plan.pace.rungs[plan.place]
    seen = rung.seen
    plan.end(then)
    assert rung.seen == seen + then


@pytest.mark.parametrize("rows", [1, 4])
def test_a_first_look_does_not_undo_what_its_neighbour_has_taught(rows):
    pace = Pace(make_costs(rows), rows)
    for _ in range(200):
        pace.rungs[5].see(6.0, 3.0, rows)
    tokens, ms = pace.estimate(6)
    assert tokens > pace.rungs[6].tokens and ms > pace.rungs[6].ms
    plan = Plan(lambda rows: make_costs(rows), Experience())
    plan.clock = None
    plan.begin(rows)
    plan.pace, plan.place = pace, 6
    plan.end(round(rows * tokens))
    assert pace.rungs[6].tokens == pytest.approx(tokens, rel=0.05)
    assert pace.rungs[6].ms == pytest.approx(ms, rel=0.5) and pace.rungs[6].ms > 0.5 * ms


def test_of_rungs_alike_the_one_that_is_seen_counts_most():
    pace = Pace(make_costs(1), 1)
    guess = [pace.expect(place) for place in range(len(LADDER))]
    assert all(a == rung.rate for a, rung in zip(guess, pace.rungs, strict=True))
    for _ in range(50):
        pace.rungs[4].see(1.2, pace.rungs[4].ms, 1)
    assert pace.expect(PLAIN) == guess[PLAIN]  # whatever the head
    assert all(pace.expect(place) < guess[place] for place in range(1, len(LADDER)))
    assert 1 <= min(pace.estimate(place)[0] for place in range(1, len(LADDER)))


# costs


def test_costs_between_and_beyond_the_table():
    costs = Costs({4: 2.0, 8: 3.0, 16: 7.0}, {1: 0.5}, 1.0)
    for tokens, ms in ((1, 2.0), (4, 2.0), (6, 2.5), (8, 3.0), (12, 5.0), (16, 7.0), (20, 9.0)):
        assert costs.of(costs.target, tokens) == pytest.approx(ms)
    for tokens in (0, 1, 99):
        assert costs.of(costs.head, tokens) == 0.5
    falling = {2: 5.0, 4: 3.0}  # noise: more tokens never cost less
    assert costs.of(falling, 3) == costs.of(falling, 9) == 5.0
    assert costs.cycle(None, 2) == 1.0
    assert costs.cycle(LADDER[3][0], 2) == 5.0 + 3 * 0.5  # 6,3,2: 12 tokens, three passes


# explain


def test_explain(llama, inject):
    model = head_model(llama, "auto", draft_vocab=128)
    sentence = model.explain()
    assert "auto" in sentence and "\n" not in sentence
    assert Plan(make_costs, Experience()).explain() == "nothing has been planned yet"
    inject("rests")
    model.generate(make_prompts((3,)), max_new_tokens=1)  # done with the prompt's pass
    assert "cycles seen: none yet" in model.explain()
    states = set()
    for new in (2, 3, 4, 8, 12):
        model.generate(make_prompts((5,)), max_new_tokens=new)
        first, plain_line, seen, before = model.explain().splitlines()
        states.add(first)
        assert plain_line.startswith("plain cycle 1.00 ms; a cycle of the best tree (")
        pays, makes = (float(plain_line.split(word)[1].split()[0]) for word in ("tau ", "makes "))
        assert "lose" not in first or makes < pays
        assert "2: 40.04 ms" in before and "draft pass, by beams, 1: 0.10 ms" in before
    assert len(states) > 1 and "1 rows, plain decoding: speculation loses" in states
    assert "1 rows, drafting 60,7,10" in states and "60,7,10: " in seen and " tokens in " in seen
