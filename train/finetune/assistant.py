"""The example data: five tasks of a scientific-writing assistant, summaries, cards and preferences,
made of the docstrings of the standard library that ship with the package.

    summary_generation   a piece of code -> the first paragraph of its docstring
    experiment_design    a claim (a test's docstring) and three tests: which of them examines it
    error_detection      a sentence, as written or with one error put into it
    logic_consistency    two statements: the second says the same, or one word of it is turned
      around
    readability          a sentence -> its Flesch reading ease, over 100
    cards                a function -> JSON: its name, arguments, what it calls, and its docstring's
      first paragraph

The text is real and the labels are facts about it. Files stay apart as in the shipped sets: what is
held out there is held out here. Knows records and files; knows nothing of tokens or models.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import textwrap
from pathlib import Path
from typing import Any

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.cache import cache_root
from records.shipped import shipped

VERSION = 1  # raise when the records change: old files are then not found
CODE_LIMIT, TEXT_LIMIT = 500, 240  # characters
DRAWS = 3  # rankings of each test, against others
ERRORS = ("none", "spelling", "repetition", "order")
ANTONYMS = dict(
    pair
    for a, b in [
        ("true", "false"),
        ("first", "last"),
        ("all", "no"),
        ("before", "after"),
        ("left", "right"),
        ("minimum", "maximum"),
        ("open", "close"),
        ("start", "end"),
        ("add", "remove"),
        ("is", "is not"),
        ("with", "without"),
        ("valid", "invalid"),
        ("same", "different"),
        ("input", "output"),
        ("greater", "less"),
        ("can", "cannot"),
        ("should", "should not"),
        ("read", "write"),
    ]
    for pair in ((a, b), (b, a))
)
SIGNATURE = re.compile(r"`((?:async )?def .*?)`")


def shipped_tasks(cfg: Any, split: str) -> Path:
    """The task records of a split (train or eval) as a JSONL file."""
    return _file(cfg, "tasks", split)


def shipped_summaries(cfg: Any, split: str) -> Path:
    """Chats that ask for a summary of code."""
    return _file(cfg, "summaries", split)


def shipped_preferences(cfg: Any, split: str) -> Path:
    return _file(cfg, "preferences", split)


def write_all(out: Path) -> dict[str, int]:
    """Every file into `out`; the number of records of each."""
    counts = {}
    for split in ("train", "eval"):
        functions, sentences = read_shipped(split)
        for kind, make in MAKERS.items():
            records = make(functions, sentences, random.Random(f"{kind}-{split}"))
            name = f"{kind}.jsonl" if split == "train" else f"heldout_{kind}.jsonl"
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            atomic_write_text(out / name, text)
            counts[name] = len(records)
    return counts


def _file(cfg: Any, kind: str, split: str) -> Path:
    digest = hashlib.sha256(str(VERSION).encode())
    for name in ("instruction", "chat"):
        for part in ("train", "eval"):
            digest.update(_shipped(name, part).read_bytes())
    folder = cache_root(cfg).parent / "assistant" / digest.hexdigest()[:16]
    path = folder / (f"{kind}.jsonl" if split == "train" else f"heldout_{kind}.jsonl")
    if not path.exists():
        write_all(folder)
    return path


def _shipped(name: str, split: str) -> Path:
    path = shipped(name, split)
    if path is None:
        raise EagleError(
            f"the shipped {name} data set is missing: give data.path (--data FILE), or build it with "
            "'python -m tools.embedded'"
        )
    return path


def read_shipped(split: str) -> tuple[list[dict], list[dict]]:
    """Functions {signature, summary, code, source} and sentences {name, text, source}."""
    functions, sentences = [], []
    for line in _shipped("instruction", split).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found = SIGNATURE.search(record["instruction"])
        if found is None:
            continue
        text = record["instruction"].replace(found[0], " ")
        for phrase in (
            "Write the Python function",
            "Implement",
            "in Python. It should do this:",
            "Please write this as",
        ):
            text = text.replace(phrase, " ")
        code = record["output"].removeprefix("```python\n").removesuffix("\n```")
        functions.append(
            {
                "signature": found[1],
                "summary": " ".join(text.split()),
                "code": code,
                "source": record["source"],
            }
        )
    for line in _shipped("chat", split).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question, answer = (record["messages"][n]["content"] for n in (0, 1))
        name = question.split("`")[1]
        if 20 <= len(answer) <= TEXT_LIMIT:
            sentences.append({"name": name, "text": answer, "source": record["source"]})
    return functions, sentences


def task_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    records = [r for s in sentences for r in (judged(s, rng), compared(s, rng)) if r is not None]
    short = [f for f in functions if len(f["code"]) <= CODE_LIMIT]
    records += [{"code": f["code"], "summary": f["summary"], "source": f["source"]} for f in short]
    tests = [f for f in short if "test" in f["source"]]
    for test in tests * DRAWS:
        others = rng.sample([t for t in tests if t["summary"] != test["summary"]], 2)
        experiments = [test, *others]
        rng.shuffle(experiments)
        records.append(
            {
                "claim": test["summary"],
                "experiments": [e["code"] for e in experiments],
                "relevance": [int(e is test) for e in experiments],
                "source": test["source"],
            }
        )
    rng.shuffle(records)
    return records


def judged(sentence: dict, rng: random.Random) -> dict:
    """A sentence with the error it has; the readability of a broken one is not known."""
    kind = rng.choice(ERRORS)
    text = put_error(sentence["text"], kind, rng)
    if text is None:
        kind, text = "none", sentence["text"]
    score = round(reading_ease(text) / 100, 4) if kind == "none" else None
    return {"text": text, "error": kind, "readability": score, "source": sentence["source"]}


def put_error(text: str, kind: str, rng: random.Random) -> str | None:
    """The text with one error of a kind; None where it has no place for it."""
    words = text.split(" ")
    if kind == "none":
        return text
    if kind == "spelling":
        places = [n for n, w in enumerate(words) if len(w) >= 5 and w.isalpha()]
        if not places:
            return None
        n = rng.choice(places)
        cut = rng.randrange(1, len(words[n]) - 2)
        word = words[n]
        swapped = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
        if swapped == word:
            swapped = word[:cut] + word[cut + 1 :]
        return " ".join([*words[:n], swapped, *words[n + 1 :]])
    if len(words) < 4:
        return None
    n = rng.randrange(0, len(words) - 2)
    if kind == "repetition":
        return " ".join([*words[: n + 1], *words[n:]])
    if words[n].lower() == words[n + 1].lower():
        return None
    return " ".join([*words[:n], words[n + 1], words[n], *words[n + 2 :]])


def compared(sentence: dict, rng: random.Random) -> dict | None:
    """Two statements and whether they agree; None for a sentence in which nothing can be turned
    around.
    """
    words = sentence["text"].split(" ")
    places = [n for n, word in enumerate(words) if word.lower() in ANTONYMS]
    if not places:
        return None
    n, agree = rng.choice(places), rng.random() < 0.5
    statement = words if agree else [*words[:n], ANTONYMS[words[n].lower()], *words[n + 1 :]]
    return {
        "premise": sentence["text"],
        "statement": " ".join(statement),
        "consistent": agree,
        "source": sentence["source"],
    }


def summary_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Summarise this code in one sentence.\n\n{f['code']}"},
                {"role": "assistant", "content": f["summary"]},
            ],
            "source": f["source"],
        }
        for f in functions
        if len(f["code"]) <= CODE_LIMIT
    ]


def card_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    """Chats that ask for a function's card as JSON."""
    records = []
    for function in functions:
        found = card(function) if len(function["code"]) <= CODE_LIMIT else None
        if found is not None:
            question = f"Describe this function as JSON.\n\n{function['code']}"
            records.append(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": json.dumps(found, ensure_ascii=False)},
                    ],
                    "source": function["source"],
                }
            )
    return records


def card(function: dict) -> dict | None:
    """Its name, its parameters (not *args), the names it calls in order, its summary; None for what
    is no function."""
    try:
        body = ast.parse(textwrap.dedent(function["code"])).body
    except SyntaxError:
        return None
    if not body or not isinstance(body[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    node, calls = body[0], {}
    for call in sorted(
        (n for n in ast.walk(node) if isinstance(n, ast.Call)),
        key=lambda n: (n.func.end_lineno, n.func.end_col_offset),
    ):
        name = getattr(call.func, "id", getattr(call.func, "attr", None))
        if name is not None:
            calls[name] = True
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return {
        "name": node.name,
        "arguments": [a.arg for a in given],
        "calls": list(calls),
        "summary": function["summary"],
    }


def preference_records(
    functions: list[dict], sentences: list[dict], rng: random.Random
) -> list[dict]:
    """Half: a correct answer before one with an error in it. Half: of what was retrieved, the right
    passage before a wrong one."""
    records = []
    for sentence in sentences:
        question = f"What does `{sentence['name']}` do?"
        if rng.random() < 0.5:
            broken = put_error(sentence["text"], rng.choice(ERRORS[1:]), rng)
            if broken is not None:
                records.append({"prompt": question, "chosen": sentence["text"], "rejected": broken})
            continue
        others = [s for s in rng.sample(sentences, 4) if s["text"] != sentence["text"]][:2]
        passages = [f"{s['name']}: {s['text']}" for s in (sentence, *others)]
        rng.shuffle(passages)
        records.append(
            {
                "query": question,
                "retrieval_result": passages,
                "chosen": {"text": sentence["text"]},
                "rejected": {"text": others[0]["text"]},
            }
        )
    return records


def reading_ease(text: str) -> float:
    """Flesch (1948): 206.835 - 1.015 words/sentences - 84.6 syllables/words, held to -50 … 120."""
    words = re.findall(r"[A-Za-z]+", text) or ["a"]
    sentences = max(1, len(re.findall(r"[.!?](?:\s|$)", text)))
    syllables = sum(
        max(1, len(re.findall(r"[aeiouy]+", w.lower().removesuffix("e")))) for w in words
    )
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(max(ease, -50.0), 120.0)


MAKERS = {
    "tasks": task_records,
    "summaries": summary_records,
    "cards": card_records,
    "preferences": preference_records,
}
