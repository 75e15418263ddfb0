"""Which cases a sweep has, what each engine is asked, and what is counted."""

import pytest
import torch
from engine_helpers import ScriptedDrafter, head_model, make_prompts, make_target, plain

from eagle.model import EaModel
from eagle.request import Request, Row
from inference import measure
from inference.bench.cases import Case, Sweep, with_context
from inference.bench.measure import Run, looping_share, measure_group

OPTIONS = dict(max_new_tokens=8, top_p=0.0, top_k=0, seed=0)


def quiet(text):
    pass


def test_one_combination_is_one_group_a_batch_size():
    groups = Sweep(["hf", "vanilla", "eagle"], batch_sizes=[1, 4], trees=["16,4,4"]).groups()
    assert groups == [
        [Case("hf", size), Case("vanilla", size), Case("eagle", size, tree="16,4,4")]
        for size in (1, 4)
    ]


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
    common = dict(context_length=32)
    assert greedy == [
        Case("hf", **common),
        *(Case("vanilla_compiled", capacity=c, **common) for c in (64, 128)),
        *(
            Case("eagle", tree=t, capacity=c, forced_acceptance=2, **common)
            for t in ("8,4,2", "16,4,4")
            for c in (64, 128)
        ),
        *(
            Case("eagle_auto", tree="auto", capacity=c, forced_acceptance=2, **common)
            for c in (64, 128)
        ),
    ]
    assert {case.temperature for case in sampled} == {0.8} and len(sampled) == len(greedy)


def test_prompt_lookup_takes_one_row():
    sweep = Sweep(["hf", "hf_prompt_lookup"], batch_sizes=[1, 4])
    assert [[case.engine for case in group] for group in sweep.groups()] == [
        ["hf", "hf_prompt_lookup"],
        ["hf"],
    ]
    (note,) = sweep.notes()
    assert "hf_prompt_lookup" in note and "batch size 4" in note
    assert Sweep(["hf_prompt_lookup"]).notes() == [] == Sweep(["hf"], batch_sizes=[4]).notes()
    assert Sweep(["hf_prompt_lookup"], batch_sizes=[4]).groups() == []


@pytest.mark.parametrize(
    "case, options",
    [
        (Case("vanilla"), {"draft": False}),
        (Case("vanilla_compiled", capacity=64), {"draft": False, "compile": "max", "capacity": 64}),
        (Case("eagle", tree="16,4,4"), {"draft": True, "tree": "16,4,4"}),
        (
            Case("eagle", tree="8,4,2", temperature=0.5),
            {"draft": True, "tree": "8,4,2", "temperature": 0.5},
        ),
        (
            Case("eagle_auto", tree="auto", forced_acceptance=0),
            {"draft": True, "compile": "max", "tree": "auto", "forced_acceptance": 0},
        ),
    ],
    ids=lambda value: value.engine if isinstance(value, Case) else "",
)
def test_what_an_engine_is_asked(case, options):
    assert case.options == {"temperature": 0.0, "compile": "off", **options}


def test_contexts_have_their_length_and_keep_their_end():
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert with_context(prompts, None) == prompts
    assert with_context(prompts, 2) == [[2, 3], [4, 5], [8, 9]]
    # what is missing comes from the prompts before, round and round
    assert with_context(prompts, 6) == [[7, 8, 9, 1, 2, 3], [9, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]
    assert [len(p) for p in with_context(prompts, 50)] == [50] * 3
    assert prompts == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_engines_stop_and_count_alike():
    """With an end token in the texts all engines count the same tokens, the end token included."""
    target = make_target("llama")
    prompts = make_prompts((5, 8, 3))
    eos = plain(target, prompts, max_new_tokens=12)[1][6]
    target.model.generation_config.eos_token_id = eos
    model, options = head_model(target), {**OPTIONS, "max_new_tokens": 12}
    for size in (1, 3):
        (group,) = Sweep(
            ["hf", "hf_prompt_lookup", "vanilla", "eagle"], [size], ["16,4,4"]
        ).groups()
        runs = measure_group(model, prompts, group, options, 1, quiet)
        assert len(runs) == (4 if size == 1 else 3)
        for run in runs:
            assert run.outputs == runs[0].outputs
            assert run.new_tokens == sum(map(len, run.outputs)) < 36
        assert any(output[-1] == eos for output in runs[0].outputs)


def test_batches_repeats_and_order(monkeypatch):
    """Every case runs on every batch as often as asked, in an order that changes; medians add
    up.
    """
    order = []

    def pretend(case, model, batch, options, synchronised=False):
        order.append((case.engine, len(batch), options["max_new_tokens"]))
        outputs = [[7] * options["max_new_tokens"] for _ in batch]
        return measure.Lap(
            {1: 5.0, 2: 1.0, 0: 3.0}[len(order) % 3], outputs, peak_bytes=1000 - len(order)
        )

    monkeypatch.setattr(measure, "run_case", pretend)

    class Model:
        class target:
            device = torch.device("cpu")

    group = [Case(engine, 2) for engine in ("hf", "vanilla", "eagle")]
    options = {**OPTIONS, "max_new_tokens": 20}
    runs = measure_group(Model, [[1]] * 5, group, options, 3, quiet)
    warm, timed = order[:3], order[3:]
    assert [tokens for _, _, tokens in warm] == [16] * 3  # a warm-up is short
    assert len(timed) == 3 * 3 * 3 and {tokens for _, _, tokens in timed} == {20}
    turns = [[engine for engine, _, _ in timed[i : i + 3]] for i in range(0, len(timed), 3)]
    assert all(sorted(turn) == ["eagle", "hf", "vanilla"] for turn in turns)
    assert {turn[0] for turn in turns} == {"hf", "vanilla", "eagle"}  # nobody is always first
    assert len({tuple(turn) for turn in turns}) > 3  # nor always behind the same other
    for run in runs:
        assert run.batch_tokens == [40, 40, 20] and [len(s) for s in run.batch_seconds] == [3] * 3
        assert run.seconds == sum(sorted(s)[1] for s in run.batch_seconds)
        assert run.tokens_per_second == 100 / run.seconds
    # the first turn of the first batch, after three warm-ups, needed the most
    assert sorted(run.peak_bytes for run in runs) == [994, 995, 996]


def test_on_a_gpu_phases_come_from_a_run_of_their_own(monkeypatch):
    """Waiting for the device after each phase costs time, which the throughput must not pay."""
    calls = []

    def pretend(case, model, batch, options, synchronised=False):
        calls.append((case.engine, synchronised))
        phases = dict.fromkeys(measure.PHASES, 7.0 if synchronised else 1.0)
        return measure.Lap(9.0 if synchronised else 2.0, [[1]], [Row(Request([1]), 1)], phases)

    monkeypatch.setattr(measure, "run_case", pretend)

    class Model:
        class target:
            device = torch.device("cuda")

    runs = {case: Run(case) for case in (Case("hf"), Case("eagle"))}
    measure.measure_batch(Model, [[1]], runs, OPTIONS, 2, 0)
    assert sorted(calls) == [("eagle", False)] * 2 + [("eagle", True)] + [("hf", False)] * 2
    run = runs[Case("eagle")]
    assert run.batch_seconds == [[2.0, 2.0]] and set(run.phases.values()) == {7.0}


def test_a_compiled_engine_is_warmed_up_at_every_number_of_rows_to_the_end(monkeypatch):
    seen = []
    monkeypatch.setattr(
        measure, "run_case", lambda case, model, batch, options: seen.append((batch, options))
    )
    batches = [[[1], [2]], [[1, 1, 1], [2]], [[3]]]
    measure.warm_up(None, Case("eagle_auto", 2, tree="auto"), batches, OPTIONS)
    assert [batch for batch, _ in seen] == batches  # it measures costs by context: all of them
    seen.clear()
    measure.warm_up(None, Case("eagle_compiled", 2), batches, {**OPTIONS, "max_new_tokens": 99})
    assert sorted(seen, key=lambda s: len(s[0])) == [
        (batch, {**OPTIONS, "max_new_tokens": 99}) for batch in ([[3]], [[1, 1, 1], [2]])
    ]


def test_tau_and_rates_of_a_perfect_drafter(llama):
    prompts = make_prompts((5, 9))
    answers = plain(llama, prompts, max_new_tokens=19)
    result = EaModel(llama, drafter=ScriptedDrafter(answers, True, "16,4,4")).generate(
        prompts, max_new_tokens=19
    )
    run = Run(Case("eagle", 2), [38], [[3.0, 2.0, 1.0]], answers, result.rows, cycles=3)
    run.phases.update(prefill=0.5, draft=0.3, verify=0.6, commit=0.03)
    row = run.to_json()
    assert row["tau"] == 6.0 and row["acceptance_by_depth"] == [1.0] * 5
    assert row["tokens_per_second"] == 19.0 and row["seconds"] == 2.0
    assert (row["draft_ms"], row["verify_ms"], row["commit_ms"]) == (100.0, 200.0, 10.0)
    assert row["cycle_ms"] == 310.0 and row["prefill_ms"] == 500.0
    one = Run(Case("eagle"), [1], [[1.0]], [[1]], [Row(Request([1]), 1)])
    assert one.to_json()["tau"] == 0.0  # no cycle was needed


@pytest.mark.parametrize(
    "tokens, loops",
    [
        ([7] * 24, True),
        ([7] * 23, False),
        (list(range(50)), False),
        (list(range(30)) + [1, 2, 3] * 8, True),
        (list(range(30)) + [1, 2, 3] * 7, False),
        (list(range(24)) * 3, True),
        (list(range(25)) * 4, False),
        (list(range(20)) * 2, False),
        ([5] * 40 + list(range(10)), False),
        ([], False),
    ],
)
def test_looping(tokens, loops):
    assert looping_share([tokens]) == float(loops)


def test_looping_share_is_a_share():
    assert looping_share([[1] * 30, list(range(30)), [2] * 30, []]) == 0.5
    assert looping_share([]) == 0.0
