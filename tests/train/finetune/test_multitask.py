"""Several tasks in one step: each task's gradient is its own, whatever else is in the batch."""

import json
import math

import pytest
import torch
from finetune_helpers import (
    QUICK,
    TASKS,
    go,
    losses_of,
    rows_of,
    same,
    summary_of,
    task_records,
    write_lines,
)
from safetensors.torch import load_file

from configs.finetune_schema import LoraSection, MultitaskConfig, PolicyConfig, TaskConfig
from configs.load import load_config
from eagle.loading import WEIGHTS
from records import load_tokenizer
from train.finetune.assistant import write_example
from train.finetune.multitask import TaskCollator
from train.finetune.policy import HEADS, build_policy
from train.finetune.policy import TASKS as TASKS_FILE
from train.finetune.task_heads import TaskHeads, attach, ranking_loss, task_loss
from train.finetune.tasks import by_task, lines_of, measure_task, reliability, render_record, skill

TASK_LIST = [TaskConfig.model_validate(t) for t in TASKS]
ANSWER, KIND, SCORE, RANK = range(4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("tasks") / "rows.jsonl", task_records(48))


def policy(base, learned=False):
    cfg = PolicyConfig(base=str(base), compute="fp32")
    model = build_policy(cfg, LoraSection(r=4, dropout=0.0), 0)
    torch.manual_seed(1)
    attach(model, TaskHeads(TASK_LIST, 64, learned))
    with torch.no_grad():
        for n, p in model.named_parameters():
            # both begin at zero, and hide what is before them
            if "lora_B" in n or "task_heads.heads" in n:
                p.normal_(std=0.02)
    return model


def gradients(model, batch, counts=None):
    model.zero_grad()
    model(**batch, counts=counts)["loss"].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def rows(base):
    tokenizer = load_tokenizer(str(base))
    records = [render_record(r, TASK_LIST, tokenizer, 96) for r in task_records(48)]
    return [row for part in by_task(sum(records, [])) for row in part[:3]]


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "uncertainty"])
def test_each_task_has_its_own_gradient(base, rows, learned):
    """A mixed batch is the sum of one batch a task, and of two micro batches."""
    model, collate = policy(base, learned), TaskCollator(0, TASK_LIST)
    if learned:
        with torch.no_grad():
            variances = torch.tensor([0.3, -0.2, 0.5, 0.1])
            model.get_base_model().task_heads.log_variance.copy_(variances)
    found = gradients(model, collate(rows))
    alone = [gradients(model, collate(part)) for part in by_task(rows)]
    parts = [collate(rows[:4]), collate(rows[4:])]
    counts = parts[0]["here"] + parts[1]["here"]
    halves = [gradients(model, part, counts) for part in parts]
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, sum(g[name] for g in alone), atol=1e-5), name
        assert torch.allclose(gradient, sum(g[name] for g in halves), atol=1e-5), name
    # ranks and optimizers wait for the gradient of an absent task too
    absent = {n: g for n, g in alone[ANSWER].items() if "task_heads" in n}
    assert len(absent) == 5 + learned
    for name, gradient in absent.items():
        assert (gradient[[KIND, SCORE, RANK]] if "variance" in name else gradient).eq(0).all()


def test_a_head_reads_the_last_real_token(base, rows):
    model, collate = policy(base).eval(), TaskCollator(0, TASK_LIST)
    together = model(**collate(rows))["outputs"]
    assert together[KIND].dtype == torch.float32
    for n in (KIND, SCORE, RANK):  # alone, nothing is padded
        alone = [model(**collate([row]))["outputs"][n] for row in rows if row.task == n]
        assert torch.allclose(torch.cat(alone), together[n], atol=1e-4)


def test_without_a_task_the_model_is_what_it_was(base, rows):
    cfg = PolicyConfig(base=str(base), compute="fp32")
    model, plain = policy(base).eval(), build_policy(cfg, LoraSection(), 0).eval()
    ids, greedy = torch.arange(5, 25)[None], {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        a, b = (m.generate(input_ids=ids, **greedy) for m in (model, plain))
    assert torch.equal(a, b)


def test_losses_are_what_their_names_say():
    heads = TaskHeads(TASK_LIST, 8, False)
    group = torch.arange(2)
    logits, target = torch.randn(2, 3), torch.tensor([0.0, 2.0])
    chosen = logits.log_softmax(-1)[[0, 1], [0, 2]]
    assert torch.isclose(task_loss(heads, KIND, logits, target, group), -chosen.sum())
    heads.tasks = [t.model_copy(update={"loss": "focal"}) for t in TASK_LIST]
    focal = -((1 - chosen.exp()) ** 2 * chosen).sum()
    assert torch.isclose(task_loss(heads, KIND, logits, target, group), focal)
    heads.tasks, heads.mean[SCORE], heads.std[SCORE] = TASK_LIST, 2.0, 0.5
    output, target = torch.tensor([1.0, -1.0]), torch.tensor([2.5, 2.0])
    assert torch.isclose(task_loss(heads, SCORE, output, target, group), torch.tensor(1.0))
    assert heads.predict(SCORE, torch.tensor(1.0)) == 2.5


@pytest.mark.parametrize("name", ["logistic", "hinge"])
def test_ranking_compares_within_a_record(name):
    output = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7])
    target, group = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([4, 4, 4, 7, 7])

    def loss(margin):
        x = torch.tensor(margin)
        return float(torch.log1p(torch.exp(-x)) if name == "logistic" else torch.relu(1 - x))

    expected = (loss(0.5 - -1.0) + loss(0.5 - 2.0)) / 2 + loss(0.6)  # the tie gives no pair
    found = float(ranking_loss(output, target, group, name))
    assert found == pytest.approx(expected, rel=1e-5)


def test_learned_weights_are_kendalls():
    heads = TaskHeads(TASK_LIST, 8, learned=True)
    with torch.no_grad():
        heads.log_variance.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    sums, counts = torch.tensor([4.0, 3.0, 2.0, 0.0]), torch.tensor([2.0, 3.0, 1.0, 0.0])
    expected = 2.0 + 2 * (math.exp(-1) * 1 + 0.5) + 0.5 * (math.e * 2 - 0.5)
    assert float(heads.combine(sums, counts, counts).detach()) == pytest.approx(expected, rel=1e-6)


def test_metrics_of_each_type():
    scores = ([0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.4, 0.05], [0.6, 0.3, 0.1])
    pairs = {
        KIND: list(zip(scores, [0.0, 1.0, 2.0, 0.0], strict=True)),
        SCORE: [(1.0, 1.0), (2.0, 3.0), (4.0, 4.0)],
        RANK: [([3.0, 1.0, 2.0], [2, 0, 1]), ([1.0, 1.0], [0, 1])],
        ANSWER: [("the cat sat", "the cat sat down"), ("yes", "yes ")],
    }
    lines = {n: lines_of(TASK_LIST[n], found) for n, found in pairs.items()}
    assert lines[KIND][2]["prediction"] == "b" and lines[KIND][2]["label"] == "c"
    found = {n: measure_task(TASK_LIST[n], given) for n, given in lines.items()}
    assert found[KIND]["accuracy"] == 0.75 and found[KIND]["auroc"] == pytest.approx(2 / 3)
    assert found[SCORE]["mae"] == pytest.approx(1 / 3) and found[SCORE]["mae_of_median"] == 1
    assert found[RANK]["pairwise_accuracy"] == 0.75 and 0.7 < found[RANK]["ndcg"] <= 1
    assert found[ANSWER] == {"exact_match": 0.5, "rouge_l": pytest.approx((6 / 7 + 1) / 2)}
    assert measure_task(TASK_LIST[ANSWER], []) == {}
    assert "pearson" not in measure_task(TASK_LIST[SCORE], lines[SCORE][:1])


def test_reliability_is_the_geometric_mean_of_skills_beyond_chance():
    found = {
        "answer": {"exact_match": 0.5},
        "kind": {"accuracy": 2 / 3},
        "score": {"mae": 0.5, "mae_of_median": 1.0},
        "rank": {"ndcg": 0.8},
    }
    skills = [skill(t, found[t.name]) for t in TASK_LIST]
    assert skills == pytest.approx([0.5, 0.5, 0.5, 0.8])
    weights = [1, 2, 0.5, 1]
    expected = math.exp(sum(w * math.log(s) for w, s in zip(weights, skills, strict=True)) / 4.5)
    assert reliability(TASK_LIST, found) == pytest.approx(expected)
    found["kind"] = {"accuracy": 0.2}  # worse than chance: as nothing, and not as zero for all
    assert skill(TASK_LIST[KIND], found["kind"]) == 0
    assert 0 < reliability(TASK_LIST, found) < expected
    assert reliability(TASK_LIST, {**found, "rank": {}}) is None


# runs


def test_a_run_leaves_heads_predictions_and_metrics_and_resumes_exactly(base, data, tmp_path):
    train = {"max_steps": 4, "batch_size": 6, "save_every": 2, "save_total_limit": 9}
    more = {"balance": {"weights": "uncertainty", "max_generations": 3}, "train": train}
    more["data"] = {"eval_path": str(data)}
    output = go("multitask", base, data, tmp_path / "run", **more)
    adapter = output / "adapter"
    assert {WEIGHTS, HEADS, TASKS_FILE, "eagle.json"} <= {p.name for p in adapter.iterdir()}
    saved = json.loads((adapter / TASKS_FILE).read_text())
    assert [t["name"] for t in saved] == [t.name for t in TASK_LIST]
    heads = load_file(adapter / HEADS)
    assert heads["heads.1.weight"].shape == (3, 64) and heads["std"][SCORE] < 1
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    counted = {n: sum(line["task"] == t.name for line in lines) for n, t in enumerate(TASK_LIST)}
    records = [json.loads(line) for line in data.read_text().splitlines()]
    assert counted[KIND] == sum(r.get("kind") is not None for r in records)
    assert counted[SCORE] == sum(r.get("score") is not None for r in records)
    assert counted[ANSWER] == 3 and counted[RANK] == 12
    assert all({"task", "type", "prediction", "label"} <= line.keys() for line in lines)
    measured = {"loss", "kind/accuracy", "score/mae", "rank/ndcg", "answer/rouge_l"}
    for evaluation in rows_of(output, evaluations=True):
        assert {f"eval_{name}" for name in measured} <= evaluation.keys()
    assert {"kind/weight", "score/weight"} <= rows_of(output)[-1].keys()
    assert summary_of(output)["data"]["labels"]["answer"] == 12

    train["resume"] = str(output / "checkpoints" / "checkpoint-2")
    again = go("multitask", base, data, tmp_path / "again", **more)
    assert all(same(again / "adapter", adapter, name) for name in (WEIGHTS, HEADS))
    assert losses_of(again) == losses_of(output)[2:]


@pytest.mark.slow
def test_real_tasks_are_learned(tmp_path):
    """The embedded model in NF4 learns how easy docstrings read, and to summarise code, in one
    adapter.
    """
    files = []
    for split, limit in (("train", 48), ("eval", 20)):
        lines = write_example("tasks", split, tmp_path)[0].read_text().splitlines()
        records = [json.loads(line) for line in lines]
        read = [r for r in records if r.get("readability") and len(r["text"]) < 90]
        written = [r for r in records if "summary" in r and len(r["code"]) < 160]
        files.append(write_lines(tmp_path / f"{split}.jsonl", read[:limit] + written[: limit // 2]))
    preset = load_config(MultitaskConfig, "writing_assistant", folder="finetune")
    names = ("summary_generation", "readability")
    more = {"tasks": [t.model_dump() for t in preset.tasks if t.name in names], "lora": {"r": 8}}
    more |= {"data": {"eval_path": str(files[1])}, "balance": {"max_generations": 0}}
    train = {**QUICK, "batch_size": 12, "lr": 3e-3}
    output = go("multitask", None, files[0], tmp_path / "run", train=train, **more)
    before, after = (summary_of(output)[k] for k in ("heldout_before", "heldout_after"))
    assert after["readability/loss"] < before["readability/loss"]
    assert after["readability/pearson"] > 0.2  # before, every prediction is the mean
    assert after["summary_generation/loss"] < before["summary_generation/loss"] - 0.1
