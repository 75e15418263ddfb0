"""Two processes learn what one learns from batches of twice the size: every method, with ZeRO and
without.
"""

import random

import pytest
from engine_helpers import assert_quiet
from finetune_helpers import config, losses_of, rows_of, summary_of, task_records, text, write_lines
from head_helpers import ROOT, run_python
from safetensors.torch import load_file

from eagle.loading import WEIGHTS
from train.finetune.__main__ import run
from train.finetune.policy import HEADS

RANKS = """
import json, sys
from train.finetune.__main__ import run
from finetune_helpers import CONFIGS
for line in open(sys.argv[1]):
    method, values = json.loads(line)
    assert run(method, CONFIGS[method].model_validate(values), quiet=True) == 0
"""
KEYS = {
    "sft": ("eval_loss", "eval_token_accuracy"),
    "dpo": ("eval_loss", "eval_reward_margin"),
    "multitask": ("eval_loss", "eval_score/mae", "eval_kind/accuracy", "eval_rank/ndcg"),
}
SIZES = {"sft": 2, "dpo": 2, "multitask": 1}
# without DeepSpeed first, stage 3 last: what was switched on stays on in a process
KINDS = [("multitask", None), ("dpo", None), ("sft", 2), ("dpo", 2), ("multitask", 2), ("sft", 3)]


@pytest.fixture(scope="module")
def runs(base, data, whole, tmp_path_factory):
    """(method, name) -> the output of a run; `one` is one process, the others are two."""
    folder, rng = tmp_path_factory.mktemp("ranks"), random.Random(0)
    sides = {"prompt": 3, "chosen": 4, "rejected": 3}
    pairs = [{name: text(rng, n) for name, n in sides.items()} for _ in range(40)]
    tasks = write_lines(folder / "tasks.jsonl", task_records(48))
    files = {"sft": data, "multitask": tasks, "dpo": write_lines(folder / "pairs.jsonl", pairs)}
    more = {
        "sft": {},
        "dpo": {"data": {"heldout_fraction": 0.2}},
        "multitask": {
            "data": {"eval_path": str(tasks)},
            "balance": {"weights": "uncertainty", "max_generations": 4},
        },
    }

    def of(method, name, batch_size, **train):
        model = {"compute": "fp32", "adapter": str(whole) if method == "dpo" else None}
        train = {"max_steps": 3, "batch_size": batch_size, **train}
        output = folder / f"{method}-{name}"
        return config(method, base, files[method], output, model=model, train=train, **more[method])

    for method, size in SIZES.items():
        assert run(method, of(method, "one", 2 * size), quiet=True) == 0
    two = [(m, of(m, f"zero{z}", SIZES[m], zero=z).model_dump(mode="json")) for m, z in KINDS]
    listed = write_lines(folder / "configs.jsonl", two)
    (folder / "ranks.py").write_text(RANKS)
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    rooms = ("", "tests/eagle", "tests/train", "tests/train/finetune")
    paths = ":".join(str(ROOT / room) for room in rooms)
    assert_quiet(run_python(*launcher, folder / "ranks.py", listed, PYTHONPATH=paths))
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
    if method == "multitask":
        # a rank that only writes and one that only predicts: gradients met in the same order
        mine, theirs = ([row["grad_norm"] for row in rows_of(run)] for run in (ours, one))
        assert mine == pytest.approx(theirs, rel=1e-4)
        # a step had a task that was absent
        seen = [{k for k in row if k.endswith("/loss")} for row in rows_of(one)]
        assert any(len(tasks) < 4 for tasks in seen)
