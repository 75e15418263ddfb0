"""Two processes learn what one learns from batches of twice the size: every method, with ZeRO and
without.
"""

import pytest
from finetune_helpers import (
    config,
    go,
    instructions,
    losses_of,
    rows_of,
    run_ranks,
    summary_of,
    task_records,
    text,
    write_lines,
)
from safetensors.torch import load_file

from eagle.loading import WEIGHTS
from train.finetune.__main__ import run
from train.finetune.adapter import HEADS

KEYS = {
    "sft": ("eval_loss", "eval_token_accuracy"),
    "dpo": ("eval_loss", "eval_reward_margin"),
    "multitask": ("eval_loss", "eval_score/mae", "eval_kind/accuracy", "eval_rank/ndcg"),
}
# stage 3 last: transformers keeps it for every model that the process loads afterwards
KINDS = [("sft", 2), ("dpo", None), ("dpo", 2), ("multitask", None), ("multitask", 2), ("sft", 3)]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """(method, name) -> the output of a run; `one` is one process, the others are two."""
    import random

    folder, rng = tmp_path_factory.mktemp("ranks"), random.Random(0)
    files = {
        "sft": instructions(folder / "rows.jsonl"),
        "multitask": write_lines(folder / "tasks.jsonl", task_records(48)),
        "dpo": write_lines(
            folder / "pairs.jsonl",
            [
                {"prompt": f"say {text(rng, 3)}", "chosen": text(rng, 4), "rejected": text(rng, 3)}
                for _ in range(40)
            ],
        ),
    }
    tuned = go("sft", base, files["sft"], folder / "tuned", train={"max_steps": 2, "lr": 1e-2})

    def of(method, name, batch_size, **train):
        more = {
            "sft": {"lora": {"dropout": 0.0}},
            "dpo": {"data": {"heldout_fraction": 0.2}},
            "multitask": {
                "data": {"eval_path": str(files["multitask"])},
                "balance": {"weights": "uncertainty", "max_generations": 4},
            },
        }[method]
        model = {"compute": "fp32"} | ({"adapter": str(tuned)} if method == "dpo" else {})
        train = {"max_steps": 3, "batch_size": batch_size, **train}
        return method, config(
            method,
            base,
            files[method],
            folder / f"{method}-{name}",
            model=model,
            train=train,
            **more,
        )

    methods = {"sft": 2, "dpo": 2, "multitask": 1}
    for method, size in methods.items():
        assert run(*of(method, "one", 2 * size), quiet=True) == 0
    kinds = [(m, methods[m], {"zero": z}) for m, z in KINDS]
    run_ranks([of(m, f"zero{z['zero']}", size, **z) for m, size, z in kinds], folder, 2)
    return lambda method, name: folder / f"{method}-{name}"


@pytest.mark.slow
@pytest.mark.parametrize("method, zero", KINDS)
def test_two_ranks_equal_one(runs, method, zero):
    ours, one = runs(method, f"zero{zero}"), runs(method, "one")
    assert losses_of(ours) == pytest.approx(losses_of(one), rel=1e-4)
    for key in KEYS[method]:
        mine, theirs = (rows_of(run, evaluations=True)[-1][key] for run in (ours, one))
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4), key
    for file in (WEIGHTS, HEADS) if method == "multitask" else (WEIGHTS,):
        a, b = (load_file(run / "adapter" / file) for run in (ours, one))
        assert a.keys() == b.keys()
        # a step of Adam is as long where the gradient is all rounding
        assert max((a[k].float() - b[k].float()).abs().mean().item() for k in b) < 3e-4
    assert summary_of(ours)["trainable_parameters"] == summary_of(one)["trainable_parameters"]


@pytest.mark.slow
def test_a_step_had_a_task_that_was_absent(runs):
    seen = [{k for k in row if k.endswith("/loss")} for row in rows_of(runs("multitask", "one"))]
    assert any(len(tasks) < 4 for tasks in seen)
