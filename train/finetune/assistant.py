"""The example data: five tasks of a scientific-writing assistant, cards and preferences, made of
the docstrings of the standard library that ship with the package.

    summary_generation  a piece of code -> the first paragraph of its docstring
    experiment_design   a claim (a test's docstring) and three tests: which of them examines it
    error_detection     a sentence, as written or with one error put into it
    logic_consistency   two statements: the second says the same, or one word of it is turned around
    readability         a sentence -> its Flesch reading ease, over 100
    cards               a function -> JSON: its name, arguments, calls, and docstring's beginning

The text is real and the labels are facts about it. Files stay apart as in the shipped sets: what is
held out there is held out here.
"""

from __future__ import annotations

import ast
import json
import random
import re
import textwrap
from pathlib import Path

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.sources import read_records, shipped

CODE_LIMIT, TEXT_LIMIT = 500, 240  # characters
DRAWS = 3  # rankings of each test, against others
ERRORS = ("none", "spelling", "repetition", "order")
OPPOSITES = (
    "true/false first/last all/no before/after left/right minimum/maximum open/close start/end "
    "add/remove is/is_not with/without valid/invalid same/different input/output greater/less "
    "can/cannot should/should_not read/write"
)
PAIRS = [pair.replace("_", " ").split("/") for pair in OPPOSITES.split()]
ANTONYMS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
SIGNATURE = re.compile(r"`((?:async )?def .*?)`")
PHRASES = re.compile(
    "Write the Python function|Implement|in Python. It should do this:|Please write this as"
)


def write_example(kind: str, split: str, out: Path) -> tuple[Path, int]:
    """The records of a kind (of MAKERS) and split as a file in `out`, and how many there are."""
    records = MAKERS[kind](*read_shipped(split), random.Random(f"{kind}-{split}"))
    path = out / f"{'' if split == 'train' else 'heldout_'}{kind}.jsonl"
    atomic_write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path, len(records)


def read_shipped(split: str) -> tuple[list[dict], list[dict]]:
    """Functions {summary, code, source} and sentences {name, text, source}."""
    paths = [shipped(name, split) for name in ("instruction", "chat")]
    if None in paths:
        raise EagleError("the shipped data sets are missing: give --data FILE")
    asked, told = ([record.value for record in read_records(path)] for path in paths)
    functions, sentences = [], []
    for record in asked:
        if found := SIGNATURE.search(record["instruction"]):
            text = PHRASES.sub(" ", record["instruction"].replace(found[0], " "))
            code = record["output"].removeprefix("```python\n").removesuffix("\n```")
            function = {"code": code, "summary": " ".join(text.split()), "source": record["source"]}
            functions += [function] if len(code) <= CODE_LIMIT else []
    for record in told:
        question, answer = (record["messages"][n]["content"] for n in (0, 1))
        if 20 <= len(answer) <= TEXT_LIMIT:
            name = question.split("`")[1]
            sentences.append({"name": name, "text": answer, "source": record["source"]})
    return functions, sentences


def task_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    records = []
    for s in sentences:
        made = (judged(s["text"], rng), compared(s["text"], rng))
        records += [{**record, "source": s["source"]} for record in made if record]
    records += functions
    tests = [f for f in functions if "test" in f["source"]]
    for test in tests * DRAWS:
        others = rng.sample([t for t in tests if t["summary"] != test["summary"]], 2)
        shown = rng.sample([test, *others], 3)
        codes, relevance = [e["code"] for e in shown], [int(e is test) for e in shown]
        record = {"claim": test["summary"], "experiments": codes, "relevance": relevance}
        records.append({**record, "source": test["source"]})
    rng.shuffle(records)
    return records


def judged(text: str, rng: random.Random) -> dict:
    """A sentence with the error it has; the readability of a broken one is not known."""
    kind = rng.choice(ERRORS)
    broken = put_error(text, kind, rng)
    if kind == "none" or broken is None:
        score = round(reading_ease(text) / 100, 4)
        return {"text": text, "error": "none", "readability": score}
    return {"text": broken, "error": kind, "readability": None}


def put_error(text: str, kind: str, rng: random.Random) -> str | None:
    """The text with one error of a kind; None where it has no place for it."""
    words = text.split(" ")
    if kind == "spelling":
        places = [n for n, w in enumerate(words) if len(w) >= 5 and w.isalpha()]
        if not places:
            return None
        n = rng.choice(places)
        word, cut = words[n], rng.randrange(1, len(words[n]) - 2)
        swapped = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
        words[n] = swapped if swapped != word else word[:cut] + word[cut + 1 :]
    elif kind != "none":
        if len(words) < 4:
            return None
        n = rng.randrange(0, len(words) - 2)
        one, two = words[n : n + 2]
        if kind == "order" and one.lower() == two.lower():
            return None
        words[n : n + 2] = [one, one, two] if kind == "repetition" else [two, one]
    return " ".join(words)


def compared(text: str, rng: random.Random) -> dict | None:
    """Two statements and whether they agree; None where nothing can be turned around."""
    words = text.split(" ")
    places = [n for n, word in enumerate(words) if word.lower() in ANTONYMS]
    if not places:
        return None
    n, agree = rng.choice(places), rng.random() < 0.5
    if not agree:
        words[n] = ANTONYMS[words[n].lower()]
    return {"premise": text, "statement": " ".join(words), "consistent": agree}


def card_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    """Chats that ask for a function's card as JSON."""
    records = []
    for function in functions:
        if found := card(function):
            ask = f"Describe this function as JSON.\n\n{function['code']}"
            turns = {"user": ask, "assistant": json.dumps(found, ensure_ascii=False)}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
            records.append({"messages": messages, "source": function["source"]})
    return records


def card(function: dict) -> dict | None:
    """Its name, its parameters (not *args), the names it calls in order, its summary; None for what
    is no function."""
    try:
        [node] = ast.parse(textwrap.dedent(function["code"])).body[:1]
    except (SyntaxError, ValueError):
        return None
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    called = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    called.sort(key=lambda func: (func.end_lineno, func.end_col_offset))
    names = [getattr(func, "id", getattr(func, "attr", None)) for func in called]
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return {
        "name": node.name,
        "arguments": [a.arg for a in given],
        "calls": list(dict.fromkeys(name for name in names if name is not None)),
        "summary": function["summary"],
    }


def preference_records(_: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    """A correct answer before the same with an error in it."""
    records = []
    for sentence in sentences:
        question, right = f"What does `{sentence['name']}` do?", sentence["text"]
        if (broken := put_error(right, rng.choice(ERRORS[1:]), rng)) is not None:
            records.append({"prompt": question, "chosen": right, "rejected": broken})
    return records


def reading_ease(text: str) -> float:
    """Flesch (1948): 206.835 - 1.015 words/sentences - 84.6 syllables/words, held to -50 … 120."""
    words = re.findall(r"[A-Za-z]+", text) or ["a"]
    sentences = max(1, len(re.findall(r"[.!?](?:\s|$)", text)))
    vowels = (re.findall(r"[aeiouy]+", word.lower().removesuffix("e")) for word in words)
    syllables = sum(max(1, len(found)) for found in vowels)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(max(ease, -50.0), 120.0)


MAKERS = {"tasks": task_records, "cards": card_records, "preferences": preference_records}
