"""Several tasks in one step: each task's gradient is its own, whatever else is in the batch."""

import json
import math

import pytest
import torch
from finetune_helpers import (
    TASKS,
    config,
    go,
    losses_of,
    rows_of,
    summary_of,
    task_records,
    write_lines,
)
from safetensors.torch import load_file

from configs.finetune_schema import LoraSection, MultitaskConfig, PolicyConfig, TaskConfig
from configs.load import load_config
from eagle.errors import EagleError
from eagle.loading import WEIGHTS
from train.finetune.adapter import HEADS
from train.finetune.adapter import TASKS as TASKS_FILE
from train.finetune.assistant import shipped_file
from train.finetune.multitask import TaskCollator
from train.finetune.policy import build_policy
from train.finetune.rows import read_rows
from train.finetune.task_heads import TaskHeads, attach, ranking_loss, task_loss
from train.finetune.task_metrics import lines_of, measure_task, reliability, skill
from train.finetune.tasks import by_kind, render_record

TASK_LIST = [TaskConfig.model_validate(t) for t in TASKS]
ANSWER, KIND, SCORE, RANK = range(4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("tasks") / "rows.jsonl", task_records(48))


def policy(base, learned=False):
    cfg = PolicyConfig(base=str(base), compute="fp32")
    model = build_policy(cfg, LoraSection(r=4, dropout=0.0), 0, None)
    torch.manual_seed(1)
    heads = TaskHeads(TASK_LIST, 64, learned)
    attach(model, heads)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if (
                "lora_B" in n or "task_heads.heads" in n
            ):  # both begin at zero, and hide what is before them
                p.normal_(std=0.02)
    return model


def gradients(model, batch, counts=None):
    model.zero_grad()
    model(**batch, counts=counts)["loss"].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def rows(base, data):
    from records import load_tokenizer

    tokenizer = load_tokenizer(str(base))
    found, _ = read_rows([data], lambda r: render_record(r, TASK_LIST, tokenizer, 96), 0, None)
    return [row for kind in by_kind(found) for row in kind[:3]]


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "uncertainty"])
def test_gradients_are_those_of_each_task_alone(base, rows, learned):
    """A mixed batch with missing labels, against one batch a task with every other label taken
    out.
    """
    model, collate = policy(base, learned), TaskCollator(0, TASK_LIST)
    if learned:
        with torch.no_grad():
            model.get_base_model().task_heads.log_variance.copy_(
                torch.tensor([0.3, -0.2, 0.5, 0.1])
            )
    together = collate(rows)
    assert (together["here"] > 0).all() and torch.isnan(together["targets"]).any()
    found = gradients(model, together)
    expected = {n: torch.zeros_like(g) for n, g in found.items()}
    for n in range(len(TASK_LIST)):
        if n == ANSWER:
            alone = [row for row in rows if row.task == ANSWER]
        else:
            alone = [only(row, n) for row in rows if row.task < 0 and has(row, n)]
        for name, gradient in gradients(model, collate(alone)).items():
            expected[name] += gradient
    for name in found:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    assert sum(g.abs().max() > 0 for g in found.values()) == len(found)


def has(row, n):
    return not math.isnan(row.targets[0][n])


def only(row, n):
    from dataclasses import replace

    kept = [[t if m == n else math.nan for m, t in enumerate(ts)] for ts in row.targets]
    return replace(row, targets=kept)


def test_micro_batches_add_up_to_the_step(base, rows):
    model, collate = policy(base, learned=True), TaskCollator(0, TASK_LIST)
    whole = gradients(model, collate(rows))
    parts = [collate(rows[:4]), collate(rows[4:])]
    counts = parts[0]["here"] + parts[1]["here"]
    halves = [gradients(model, part, counts) for part in parts]
    for name in whole:
        assert torch.allclose(whole[name], halves[0][name] + halves[1][name], atol=1e-5), name


def test_an_absent_task_has_a_gradient_of_zero(base, rows):
    """Ranks and optimizers wait for every weight."""
    model = policy(base, learned=True)
    found = gradients(model, TaskCollator(0, TASK_LIST)([r for r in rows if r.task == ANSWER]))
    heads = {n: g for n, g in found.items() if "task_heads" in n}
    assert len(heads) == 6
    untouched = {n: g for n, g in heads.items() if "log_variance" not in n}
    assert all((g == 0).all() for g in untouched.values())
    variance = next(g for n, g in heads.items() if "log_variance" in n)
    assert variance[ANSWER] != 0 and (variance[[KIND, SCORE, RANK]] == 0).all()


def test_a_head_reads_the_last_real_token(base, rows):
    model, collate = policy(base).eval(), TaskCollator(0, TASK_LIST)
    read = [row for row in rows if row.task < 0]
    together = model(**collate(read))["outputs"]
    assert together[KIND].dtype == torch.float32
    place = 0
    for row in read:  # alone, nothing is padded
        alone = model(**collate([row]))["outputs"]
        for n in (KIND, SCORE, RANK):
            size = len(row.sequences)
            assert torch.allclose(alone[n], together[n][place : place + size], atol=1e-4)
        place += len(row.sequences)


def test_without_a_task_the_model_is_what_it_was(base, rows):
    model, plain = (
        policy(base).eval(),
        build_policy(
            PolicyConfig(base=str(base), compute="fp32"), LoraSection(r=4, dropout=0.0), 0, None
        ).eval(),
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        a, b = (
            m.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for m in (model, plain)
        )
    assert torch.equal(a, b)


def test_losses_are_what_their_names_say():
    heads = TaskHeads(TASK_LIST, 8, False)
    group, nan = torch.arange(3), math.nan
    logits, target = torch.randn(3, 3), torch.tensor([0.0, nan, 2.0])
    chosen = logits.log_softmax(-1)[[0, 2], [0, 2]]
    assert torch.isclose(task_loss(heads, KIND, logits, target, group), -chosen.sum())
    heads.tasks = [
        t.model_copy(update={"loss": "focal"}) if t.name == "kind" else t for t in TASK_LIST
    ]
    focal = -((1 - chosen.exp()) ** 2 * chosen).sum()
    assert torch.isclose(task_loss(heads, KIND, logits, target, group), focal)
    heads.mean[SCORE], heads.std[SCORE] = 2.0, 0.5
    output, target = torch.tensor([1.0, 5.0, -1.0]), torch.tensor([2.5, nan, 2.0])
    assert torch.isclose(task_loss(heads, SCORE, output, target, group), torch.tensor(1.0))
    assert heads.destandardise(SCORE, torch.tensor(1.0)) == 2.5
    nothing = task_loss(heads, SCORE, output, torch.full((3,), nan), group)
    assert nothing == 0 and torch.isfinite(nothing)


@pytest.mark.parametrize("name", ["logistic", "hinge"])
def test_ranking_compares_within_a_record(name):
    output = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7])
    target, group = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([4, 4, 4, 7, 7])

    def loss(margin):
        x = torch.tensor(margin)
        return float(torch.log1p(torch.exp(-x)) if name == "logistic" else torch.relu(1 - x))

    first = (loss(0.5 - -1.0) + loss(0.5 - 2.0)) / 2  # the tie gives no pair
    assert float(ranking_loss(output, target, group, name)) == pytest.approx(
        first + loss(0.6), rel=1e-5
    )


def test_learned_weights_are_kendalls():
    heads = TaskHeads(TASK_LIST, 8, learned=True)
    with torch.no_grad():
        heads.log_variance.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    sums, counts = torch.tensor([4.0, 3.0, 2.0, 0.0]), torch.tensor([2.0, 3.0, 1.0, 0.0])
    expected = 2.0 + 2 * (math.exp(-1) * 1 + 0.5) + 0.5 * (math.e * 2 - 0.5)
    assert float(heads.combine(sums, counts, counts).detach()) == pytest.approx(expected, rel=1e-6)


# metrics


def test_metrics_of_each_type():
    kind = lines_of(
        TASK_LIST[KIND],
        [
            ([0.7, 0.2, 0.1], 0.0),
            ([0.1, 0.8, 0.1], 1.0),
            ([0.2, 0.4, 0.05], 2.0),
            ([0.6, 0.3, 0.1], 0.0),
        ],
    )
    assert kind[2]["prediction"] == "b" and kind[2]["label"] == "c"
    found = measure_task(TASK_LIST[KIND], kind)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert 0 < found["mcc"] < 1 and found["auroc"] == pytest.approx((1 + 1 + 0) / 3)
    assert "auroc" not in measure_task(TASK_LIST[KIND], kind[:2])

    score = lines_of(TASK_LIST[SCORE], [(1.0, 1.0), (2.0, 3.0), (4.0, 4.0)])
    found = measure_task(TASK_LIST[SCORE], score)
    assert found["mae"] == pytest.approx(1 / 3) and found["spearman"] == pytest.approx(1, abs=1e-4)
    assert found["mae_of_median"] == pytest.approx(1) and 0.9 < found["pearson"] < 1
    assert "pearson" not in measure_task(TASK_LIST[SCORE], score[:1])

    rank = lines_of(TASK_LIST[RANK], [([3.0, 1.0, 2.0], [2, 0, 1]), ([1.0, 1.0], [0, 1])])
    found = measure_task(TASK_LIST[RANK], rank)
    assert found["pairwise_accuracy"] == pytest.approx(0.75) and 0.7 < found["ndcg"] <= 1

    text = lines_of(TASK_LIST[ANSWER], [("the cat sat", "the cat sat down"), ("yes", "yes ")])
    found = measure_task(TASK_LIST[ANSWER], text)
    assert found["exact_match"] == 0.5 and found["rouge_l"] == pytest.approx((6 / 7 + 1) / 2)
    assert measure_task(TASK_LIST[ANSWER], []) == {}


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


def test_a_run_leaves_heads_predictions_and_metrics(base, data, tmp_path):
    output = go(
        "multitask",
        base,
        data,
        tmp_path / "run",
        data={"eval_path": str(data)},
        train={"max_steps": 4, "batch_size": 6, "save_every": 2, "save_total_limit": 9},
        balance={"weights": "uncertainty", "max_generations": 3},
    )
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
    for evaluation in rows_of(output, evaluations=True):
        assert {
            "eval_loss",
            "eval_kind/accuracy",
            "eval_score/mae",
            "eval_rank/ndcg",
            "eval_answer/rouge_l",
        } <= evaluation.keys()
    assert {"kind/weight", "score/weight"} <= rows_of(output)[-1].keys()
    assert summary_of(output)["data"]["labels"]["answer"] == 12

    again = go(
        "multitask",
        base,
        data,
        tmp_path / "again",
        data={"eval_path": str(data)},
        train={
            "max_steps": 4,
            "batch_size": 6,
            "resume": str(output / "checkpoints" / "checkpoint-2"),
        },
        balance={"weights": "uncertainty", "max_generations": 3},
    )
    for name in (WEIGHTS, HEADS):
        a, b = load_file(again / "adapter" / name), load_file(adapter / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses_of(again) == losses_of(output)[2:]


def test_a_task_without_data_is_refused(base, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": f"{n}", "kind": "a"} for n in range(9)])
    with pytest.raises(EagleError, match="no training record has a label for answer, score, rank"):
        go("multitask", base, path, tmp_path / "run", data={"heldout_fraction": 0.3})


@pytest.mark.slow
def test_real_tasks_are_learned(tmp_path):
    """The embedded model in NF4 learns how easy docstrings read, and to summarise code, in one
    adapter.
    """
    cfg, files = config("multitask", None, None, tmp_path / "run"), []
    for split, limit in (("train", 48), ("eval", 20)):
        records = [
            json.loads(x) for x in shipped_file(cfg.data, "tasks", split).read_text().splitlines()
        ]
        read = [r for r in records if r.get("readability") and len(r["text"]) < 90]
        written = [r for r in records if "summary" in r and len(r["code"]) < 160]
        files.append(write_lines(tmp_path / f"{split}.jsonl", read[:limit] + written[: limit // 2]))
    preset = load_config(MultitaskConfig, "writing_assistant", folder="finetune")
    names = ("summary_generation", "readability")
    output = go(
        "multitask",
        None,
        files[0],
        tmp_path / "run",
        lora={"r": 8},
        tasks=[t.model_dump() for t in preset.tasks if t.name in names],
        data={"eval_path": str(files[1])},
        balance={"max_generations": 0},
        train={
            "max_steps": 6,
            "batch_size": 12,
            "lr": 3e-3,
            "grad_clip": 1.0,
            "gradient_checkpointing": False,
        },
    )
    before, after = (summary_of(output)[k] for k in ("heldout_before", "heldout_after"))
    assert after["readability/loss"] < before["readability/loss"]
    assert after["readability/pearson"] > 0.2  # before, every prediction is the mean
    assert after["summary_generation/loss"] < before["summary_generation/loss"] - 0.1
