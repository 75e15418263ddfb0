"""Text and task metrics against values worked out by hand."""

import math
import sys

import pytest

from eagle.errors import EagleError
from eagle.scoring import words
from inference.evaluation.metrics import ANSWER, repetition, task_report, with_references
from inference.evaluation.metrics import perplexity as measured


@pytest.mark.parametrize(
    "prediction, reference, value",
    [
        ("the cat sat", "the cat sat on", 2 * 3 / 7),  # 3 in common, of 3 and of 4
        ("größer Übel", "größer Übel", 1.0),
        ("x = 1", "x == 1", 2 * 3 / 7),
        ("True", "true", 0.0),
        ("今天天气很好。", "今天天气不好。", 6 / 7),
    ],
)
def test_rouge_l(prediction, reference, value):
    assert with_references([prediction], [reference])["rouge_l"] == pytest.approx(value)


def test_texts_with_references():
    found = with_references(["the cat sat", "a b"], ["the cat sat on", " a b\n"])
    assert found["rouge_l"] == pytest.approx((2 * 3 / 7 + 1) / 2)
    assert found["exact_match"] == 0.5 and 0.5 < found["chrf"] < 1.0
    for text, value in (("same", 1.0), ("xyz", 0.0)):
        assert set(with_references([text], ["same"]).values()) == {value}
    assert words("हिन्दी में") == ["हिन्दी", "में"]  # vowel signs stay with their letters
    assert words("ไทย ok") == ["ไ", "ท", "ย", "ok"]
    assert words("a[i]+=1") == ["a", "[", "i", "]", "+", "=", "1"]


def test_repetition():
    found = repetition(["a b a b", "x y", ""])
    assert found["1"] == pytest.approx((0.5 + 0) / 2)  # the empty text has no words
    assert found["2"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["3"] == 0.0 and found["4"] == 0.0
    assert repetition([""])["1"] is None


def test_perplexity_is_that_of_the_models_own_logits(llama):
    import torch
    from engine_helpers import VOCAB

    from eagle.model import EaModel

    class Bytes:
        def __call__(self, text, **_):
            return type("Ids", (), {"input_ids": [ord(c) % VOCAB for c in text]})

    model = EaModel(llama, tokenizer=Bytes())
    losses = []
    for text, context in (("hello", ""), ("abcabc", "say: ")):
        ids = torch.tensor([[ord(c) % VOCAB for c in context + text]])
        with llama.stock() as stock:
            logits = stock(ids).logits.log_softmax(-1)
        start = max(len(context), 1)
        losses += [-logits[0, i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
    # nothing to predict, and more than the model's positions: counted, not cut
    found = measured(model, ["hello", "abcabc", "x", "y" * 300], ["", "say: ", "", ""])
    assert (found["tokens"], found["skipped"]) == (len(losses), 2) == (4 + 6, 2)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert measured(model, ["x"], [""])["perplexity"] is None


def rows(kind, pairs, task="t", **more):
    line = {"task": task, "type": kind, **more}
    return [ANSWER.validate_python({**line, "prediction": p, "label": y}) for p, y in pairs]


def report(kind, pairs):
    return task_report(rows(kind, pairs))["tasks"]["t"]


def test_classification():
    pairs = [("a", "a"), ("a", "a"), ("b", "a"), ("b", "b"), (None, "b"), ("junk", "a")]
    entry = report("classification", pairs)
    assert entry["accuracy"] == pytest.approx(3 / 6) and entry["unanswered"] == 1
    f1_a, f1_b = 2 * 2 / (2 + 4), 2 * 1 / (2 + 2)  # 2·hits / (predicted + there)
    assert entry["macro_f1"] == pytest.approx((f1_a + f1_b) / 2)
    # hits 3 of 6; there (4, 2, 0), predicted (2, 2, 2): (3·6 - 12) / sqrt((36 - 12)(36 - 20))
    assert entry["mcc"] == pytest.approx(6 / math.sqrt(24 * 16))
    assert entry["auroc"] is None


def test_auroc_of_two_and_of_three_labels():
    def auroc(table):
        answers = [rows("classification", [("a", y)], scores=s)[0] for s, y in table]
        return task_report(answers)["tasks"]["t"]["auroc"]

    scores = [(0.1, "n"), (0.4, "y"), (0.35, "n"), (0.8, "y"), (0.4, "n")]
    # of 6 pairs 5 are in order and one is a tie
    assert auroc([({"n": 1 - s, "y": s}, label) for s, label in scores]) == pytest.approx(5.5 / 6)
    logits = [({"a": 5, "b": 1, "c": 2}, "a"), ({"a": 1, "b": 9, "c": 2}, "b")]
    logits.append(({"a": 2, "b": 3, "c": 9}, "c"))
    assert auroc(logits) == 1.0
    with pytest.raises(EagleError, match="without a score for 'b'"):
        auroc([*logits, ({"a": 1}, "a")])


def test_regression():
    entry = report("regression", [(1.0, 2.0), (2.0, 4.0), (3, 5.0), (None, 7)])
    assert entry["mae"] == pytest.approx(5 / 3) and entry["unanswered"] == 1
    assert entry["spearman"] == pytest.approx(1.0, abs=1e-5)  # the library adds an epsilon
    assert entry["pearson"] == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    constant = task_report(rows("regression", [(1, 2), (1, 3)]))
    assert constant["tasks"]["t"]["spearman"] is None and constant["mean_primary"] is None
    assert report("regression", [(None, 2)])["mae"] is None


def test_ranking():
    """By hand: 2 of 3 pairs and a tie; the best candidate first, or second."""
    pairs = [([0.5, 0.1, 0.4], [2, 1, 0]), ([0.0, 0.0], [1, 3]), (None, [0, 1])]
    entry = report("ranking", pairs)
    assert entry["pairwise_accuracy"] == pytest.approx((2 / 3 + 0.5) / 2)
    first = (2 + 1 / 2) / (2 + 1 / math.log2(3))  # gains 2, 0, 1 against 2, 1, 0
    assert 0.9 < first < entry["ndcg"] + 0.5 and entry["unanswered"] == 1
    assert report("ranking", [(None, [0, 1])])["pairwise_accuracy"] is None


def test_generation_and_the_mean_over_tasks():
    answers = rows("generation", [("a b", "a b"), (None, "c")], "write")
    answers += rows("classification", [("x", "x"), ("y", "y")], "sort")
    found = task_report(answers)
    assert found["tasks"]["write"]["rouge_l"] == 0.5 == found["tasks"]["write"]["exact_match"]
    assert found["tasks"]["sort"]["mcc"] == pytest.approx(1.0)
    assert found["mean_primary"] == pytest.approx(0.75)
    mixed = rows("generation", [("a", "a")]) + rows("classification", [("a", "a")])
    with pytest.raises(EagleError, match="'t' has rows of types"):
        task_report(mixed)


NO_ANSWERS = {
    "choice": [(1, 1)],
    "regression": [("1", 1), (1, float("nan")), (1, None)],
    "ranking": [(1, [0, 1]), ([1], [0, 1]), ([1, 2], [1, 1])],
    "generation": [(1, "x")],
}


def test_rows_that_are_no_answers():
    for kind, pairs in NO_ANSWERS.items():
        for pair in pairs:
            with pytest.raises(ValueError):
                rows(kind, [pair])
    for changes in ({"scores": {"b": 1}}, {"prediction": ...}):
        line = {"task": "t", "type": "classification", "label": "a", "prediction": "a"} | changes
        with pytest.raises(ValueError):
            ANSWER.validate_python({k: v for k, v in line.items() if v is not ...})


def test_missing_libraries_are_named(monkeypatch):
    for name in ("sacrebleu.metrics", "torchmetrics.functional"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(EagleError, match=r"eagle-heads\[eval\]"),
        ):
            patch.setitem(sys.modules, name, None)
            report("regression", [(1, 2)])
