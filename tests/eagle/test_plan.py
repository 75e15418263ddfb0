"""tree="auto": lossless whatever it decides, and its decisions against what is best for known
costs."""

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
from eagle.decode import Batch, decode
from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.model import EaModel
from eagle.plan import CANDIDATES, WIDEST, Experience, Plan, size_of
from eagle.request import Request, Row, Stopping

NEW = 40
SAMPLING = ({}, {"temperature": 1.2, "top_p": 0.95, "seed": 21})
SHAPES = [shape for shape, _ in CANDIDATES]


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
    """inject(behaviour): costs as if measured; tries and pauses are short. Returns what happened,
    cycle by cycle: the shape drafted, or None."""

    def use(behaviour):
        make = BEHAVIOURS[behaviour] if isinstance(behaviour, str) else behaviour
        monkeypatch.setattr(
            eagle.model, "CostTable", lambda *facts: lambda rows, context: make(rows)
        )
        for name, value in (("TRIAL", 2), ("PAUSE", 5), ("LOSS", 1e9), ("AGAIN", 6)):
            monkeypatch.setattr(eagle.plan, name, value)
        if behaviour == "any":
            rng = random.Random(4)

            def begin(plan, rows):
                plan._meet(rows)
                plan.place = rng.randrange(-1, len(CANDIDATES))
                return None if plan.place < 0 else SHAPES[plan.place]

            monkeypatch.setattr(Plan, "begin", begin)
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
        assert any(shapes) and (None in shapes) == (behaviour in ("rests", "any"))


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
    assert set(rests[:-1]) == {5} and len(rests) >= 5
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
    assert checked and (None in shapes) == (behaviour in ("rests", "any"))


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
    not."""

    def __init__(self, drafts, put_off):
        self.drafts, self.put_off, self.cycle = drafts, put_off, 0

    def rests(self, rows):
        return self.put_off and not self.drafts(self.cycle)

    def begin(self, rows):
        self.cycle += 1
        return SHAPES[4] if self.drafts(self.cycle - 1) else None

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
    for batch in (prompts[:1], prompts[1:]):
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
    """A plan at work. `cycles`: shape and milliseconds of each, and the tokens that its rows gain
    in the mean, so that what is judged is the choice and not the luck."""

    def __init__(self, rows, *args, seed=0):
        self.rows, self.costs, self.cycles = rows, make_costs(size_of(rows), *args), []
        self.rng = np.random.default_rng(seed)
        self.plan = Plan(lambda rows: self.costs, Experience())

    def run(self, cycles, p):
        for _ in range(cycles):
            shape = self.plan.begin(self.rows)
            chances = reached(shape, p) if shape else []
            if shape:
                luck = self.rng.random((self.rows, 1)) < np.array(chances)
                self.plan.end(luck.sum(1).tolist())
            ms = self.costs[str(shape) if shape else "plain"]
            self.cycles.append((shape, ms, self.rows * (1 + sum(chances))))
        return self

    def rate(self, since=0, until=None):
        some = self.cycles[since:until]
        return sum(gained for _, _, gained in some) / sum(ms for _, ms, _ in some)

    def drafted(self, since=0, until=None):
        """The share of cycles."""
        some = self.cycles[since:until]
        return sum(shape is not None for shape, _, _ in some) / len(some)

    def plain_rate(self):
        return self.rows / self.costs["plain"]

    def best_rate(self, p):
        rates = [self.rows * (1 + sum(reached(s, p))) / self.costs[str(s)] for s in SHAPES]
        return max(self.plain_rate(), *rates)


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
    if best < 1.1 * work.plain_rate():  # too little to be told from luck
        best = work.plain_rate()
    assert work.rate(500) > 0.93 * best


def test_the_dearer_nodes_are_the_smaller_the_trees():
    def size(node):
        cycles = Simulation(1, 1.0, node, 0.05, 1.0).run(900, 0.75).cycles[400:]
        return np.mean([shape.num_nodes for shape, _, _ in cycles if shape])

    sizes = [size(node) for node in (0.001, 0.02, 0.08, 0.2)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 30 and sizes[-1] < 8


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("unit", [0.02, 100.0])
@pytest.mark.parametrize("base, node, draft, p", [(2.0, 0.05, 0.3, 0.6), (4.0, 0.1, 1.0, 0.9)])
def test_trying_in_vain_costs_little(rows, unit, base, node, draft, p):
    """Whatever a cycle takes: a fiftieth of a millisecond or a tenth of a second."""
    work = Simulation(rows, unit * base, unit * node, unit * draft, unit).run(4000, p)
    assert work.best_rate(p) == work.plain_rate()
    assert work.rate() > 0.96 * work.plain_rate()
    assert 0 < work.drafted(1500) < 0.05  # it does try again


@pytest.mark.parametrize("rows, args", [(1, (2.0, 0.05, 0.2, 1.0)), (4, (1.5, 0.02, 0.1, 1.0))])
def test_it_follows_what_is_accepted(rows, args):
    work = Simulation(rows, *args)
    for p, cycles in ((0.2, 2000), (0.9, 3000), (0.2, 3000)):
        work.run(cycles, p)
    assert work.drafted(500, 2000) < 0.1
    assert work.drafted(4000, 5000) > 0.9
    assert work.rate(4000, 5000) > 0.9 * work.best_rate(0.9)
    assert work.drafted(7000) < 0.1


def test_costs_are_asked_for_once_a_size():
    sizes = [size_of(rows) for rows in range(1, 26)]
    assert sizes == [1, 2, 3, 4] + [6] * 2 + [8] * 2 + [12] * 4 + [16] * 4 + [24] * 8 + [32]
    asked = []
    plan = Plan(lambda rows: asked.append(rows) or make_costs(rows), Experience())
    for rows in (3, 3, 5, 6, 1, 6, 5):
        plan.begin(rows)
        plan.end([1] * rows)
    assert asked == [3, 6, 1, 6]


def test_explain(llama, inject):
    model = head_model(llama, "auto", draft_vocab=128)
    assert "auto" in model.explain() and "\n" not in model.explain()
    assert Plan(make_costs, Experience()).explain() == "nothing has been planned yet"
    inject("rests")
    states = set()
    for new in (2, 3, 4, 8, 12):
        model.generate(make_prompts((5,)), max_new_tokens=new)
        first, plain_line, *trees = model.explain().splitlines()
        states.add(first)
        assert plain_line.startswith("plain cycle 1.00 ms; a cycle of the best tree (")
        assert len(trees) == len(SHAPES) and trees[-1].strip().startswith("60,7,10: ")
    assert len(states) > 1 and "1 rows, plain decoding: speculation loses" in states
