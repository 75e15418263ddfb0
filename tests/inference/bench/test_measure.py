"""Which cases a sweep has, what each engine is asked, and what is counted."""

import torch
from engine_helpers import ScriptedDrafter, head_model, make_prompts, make_target, plain

from eagle.decode import Timings
from eagle.model import EaModel
from eagle.request import Request, Row
from inference.bench import measure
from inference.bench.cases import Case, Sweep, with_context
from inference.bench.measure import Lap, Run, loops, measure_group

OPTIONS = dict(max_new_tokens=8, top_p=0.0, top_k=0, seed=0)


def test_a_sweep_measures_each_engine_once_for_what_matters_to_it():
    sweep = Sweep(
        ["hf", "vanilla_compiled", "eagle", "eagle_auto"],
        trees=["8,4,2", "16,4,4"],
        capacities=[64, 128],
        temperatures=[0.0, 0.8],
        context_lengths=[32],
        forced_acceptance=2,
    )
    greedy, sampled = sweep.groups()
    common, slots = dict(context_length=32), (64, 128)
    forced = dict(forced_acceptance=2, **common)
    assert greedy == [
        Case("hf", **common),
        *(Case("vanilla_compiled", capacity=c, **common) for c in slots),
        *(Case("eagle", tree=t, capacity=c, **forced) for t in ("8,4,2", "16,4,4") for c in slots),
        *(Case("eagle_auto", tree="auto", capacity=c, **forced) for c in slots),
    ]
    assert {case.temperature for case in sampled} == {0.8} and len(sampled) == len(greedy)
    # stock prompt lookup takes one row
    sweep = Sweep(["hf", "hf_prompt_lookup"], batch_sizes=[1, 4])
    assert [len(group) for group in sweep.groups()] == [2, 1]
    assert Sweep(["hf_prompt_lookup"], batch_sizes=[4]).groups() == []


def test_contexts_have_their_length_and_keep_their_end():
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert with_context(prompts, None) == prompts
    assert with_context(prompts, 2) == [[2, 3], [4, 5], [8, 9]]
    # what is missing comes from the prompts before, round and round
    assert with_context(prompts, 6) == [[7, 8, 9, 1, 2, 3], [9, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]
    assert [len(p) for p in with_context(prompts, 50)] == [50] * 3


def test_engines_stop_and_count_alike():
    """With an end token in the texts all engines count the same tokens, the end token included."""
    target = make_target("llama")
    prompts = make_prompts((5, 8, 3))
    eos = plain(target, prompts, max_new_tokens=12)[1][6]
    target.model.generation_config.eos_token_id = eos
    model, options = head_model(target), {**OPTIONS, "max_new_tokens": 12}
    for size in (1, 3):
        engines = ["hf", "hf_prompt_lookup", "vanilla", "eagle"]
        (group,) = Sweep(engines, [size], ["16,4,4"]).groups()
        runs = measure_group(model, prompts, group, options, 1)
        for run in runs:
            assert run.outputs == runs[0].outputs
            assert sum(run.batch_tokens) == sum(map(len, run.outputs)) < 36
        assert any(output[-1] == eos for output in runs[0].outputs)


class On:
    """A model of which only the device is asked."""

    def __init__(self, device):
        self.target = type("Target", (), {"device": torch.device(device)})


def test_batches_repeats_and_order(monkeypatch):
    """Every case runs on every batch as often as asked, in an order that changes; medians add
    up."""
    order = []

    def pretend(case, model, batch, options, synchronised=False):
        order.append((case.engine, options["max_new_tokens"]))
        outputs = [[7] * options["max_new_tokens"] for _ in batch]
        seconds = (3.0, 5.0, 1.0)[len(order) % 3]
        return Lap(seconds, outputs, peak_bytes=1000 - len(order))

    monkeypatch.setattr(measure, "run_case", pretend)
    group = [Case(engine, 2) for engine in ("hf", "vanilla", "eagle")]
    runs = measure_group(On("cpu"), [[1]] * 5, group, {**OPTIONS, "max_new_tokens": 20}, 3)
    warm, timed = order[:3], order[3:]
    assert [tokens for _, tokens in warm] == [16] * 3  # a warm-up is short
    assert len(timed) == 3 * 3 * 3 and {tokens for _, tokens in timed} == {20}
    turns = [tuple(engine for engine, _ in timed[i : i + 3]) for i in range(0, 27, 3)]
    assert all(sorted(turn) == ["eagle", "hf", "vanilla"] for turn in turns)
    assert {turn[0] for turn in turns} == {"hf", "vanilla", "eagle"}  # nobody is always first
    assert len(set(turns)) > 3  # nor always behind the same other
    for run in runs:
        assert run.batch_tokens == [40, 40, 20] and [len(s) for s in run.batch_seconds] == [3] * 3
        assert run.tokens_per_second == 100 / sum(sorted(s)[1] for s in run.batch_seconds)
    # the first turn of the first batch, after three warm-ups, needed the most
    assert sorted(run.peak_bytes for run in runs) == [994, 995, 996]


def test_on_a_gpu_phases_come_from_a_run_of_their_own(monkeypatch):
    """Waiting for the device after each phase costs time, which the throughput must not pay."""
    calls = []

    def pretend(case, model, batch, options, synchronised=False):
        calls.append((case.engine, synchronised))
        phases = Timings(**dict.fromkeys(measure.PHASES, 7.0 if synchronised else 1.0))
        return Lap(9.0 if synchronised else 2.0, [[1]], [Row(Request([1]), 1)], phases)

    monkeypatch.setattr(measure, "run_case", pretend)
    monkeypatch.setattr(measure, "warm_up", lambda *_: None)
    _, run = measure_group(On("cuda"), [[1]], [Case("hf"), Case("eagle")], OPTIONS, 2)
    assert sorted(calls) == [("eagle", False)] * 2 + [("eagle", True)] + [("hf", False)] * 2
    assert run.batch_seconds == [[2.0, 2.0]] and set(run.phases.values()) == {7.0}


def test_tau_and_rates_of_a_perfect_drafter(llama):
    prompts = make_prompts((5, 9))
    answers = plain(llama, prompts, max_new_tokens=19)
    model = EaModel(llama, drafter=ScriptedDrafter(answers, True, "16,4,4"))
    rows = model.generate(prompts, max_new_tokens=19).rows
    run = Run(Case("eagle", 2), [38], [[3.0, 2.0, 1.0]], answers, rows, cycles=3)
    run.phases.update(prefill=0.5, draft=0.3, verify=0.6, commit=0.03)
    row = run.to_json()
    assert row["tau"] == 6.0 and row["acceptance_by_depth"] == [1.0] * 5
    assert row["tokens_per_second"] == 19.0 and row["seconds"] == 2.0
    assert (row["draft_ms"], row["verify_ms"], row["commit_ms"]) == (100.0, 200.0, 10.0)
    assert row["cycle_ms"] == 310.0 and row["prefill_ms"] == 500.0
    one = Run(Case("eagle"), [1], [[1.0]], [[1]], [Row(Request([1]), 1)])
    assert one.to_json()["tau"] == 0.0  # no cycle was needed


def test_looping():
    start = list(range(30))
    assert loops([7] * 24) and loops(start + [1, 2, 3] * 8)
    for tokens in ([], [7] * 23, start + [1, 2, 3] * 7, list(range(25)) * 4, [5] * 40 + start[:10]):
        assert not loops(tokens)
