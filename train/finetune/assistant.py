"""The example data: five tasks of a scientific-writing assistant, summaries, cards and preferences,
made of the docstrings of the standard library that ship with the package.

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
from records.sources import shipped

VERSION = 1  # raise when the records change: old files are then not found
CODE_LIMIT, TEXT_LIMIT = 500, 240  # characters
DRAWS = 3  # rankings of each test, against others
ERRORS = ("none", "spelling", "repetition", "order")
OPPOSITES = (
    "true/false first/last all/no before/after left/right minimum/maximum open/close start/end "
    "add/remove is/is_not with/without valid/invalid same/different input/output greater/less "
    "can/cannot should/should_not read/write"
)
ANTONYMS: dict[str, str] = {}
for _a, _b in (pair.replace("_", " ").split("/") for pair in OPPOSITES.split()):
    ANTONYMS |= {_a: _b, _b: _a}
SIGNATURE = re.compile(r"`((?:async )?def .*?)`")
PHRASES = re.compile(
    "Write the Python function|Implement|in Python. It should do this:|Please write this as"
)


def shipped_file(cfg: Any, kind: str, split: str) -> Path:
    """The records of a kind (of MAKERS) and split (train or eval), as a JSONL file in the cache."""
    digest = hashlib.sha256(str(VERSION).encode())
    for name in ("instruction", "chat"):
        for part in ("train", "eval"):
            digest.update(_shipped(name, part).read_bytes())
    folder = cache_root(cfg).parent / "assistant" / digest.hexdigest()[:16]
    path = folder / _name(kind, split)
    if not path.exists():
        write_all(folder)
    return path


def write_all(out: Path) -> dict[str, int]:
    """Every file into `out`; the number of records of each."""
    counts = {}
    for split in ("train", "eval"):
        functions, sentences = read_shipped(split)
        for kind, make in MAKERS.items():
            records = make(functions, sentences, random.Random(f"{kind}-{split}"))
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            atomic_write_text(out / _name(kind, split), text)
            counts[_name(kind, split)] = len(records)
    return counts


def _name(kind: str, split: str) -> str:
    return f"{kind}.jsonl" if split == "train" else f"heldout_{kind}.jsonl"


def _shipped(name: str, split: str) -> Path:
    path = shipped(name, split)
    if path is None:
        raise EagleError(
            f"the shipped {name} data set is missing: give data.path (--data FILE), or build it "
            "with 'python -m tools.embedded'"
        )
    return path


def _read(name: str, split: str) -> list[dict]:
    lines = _shipped(name, split).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_shipped(split: str) -> tuple[list[dict], list[dict]]:
    """Functions {signature, summary, code, source} and sentences {name, text, source}."""
    functions, sentences = [], []
    for record in _read("instruction", split):
        found = SIGNATURE.search(record["instruction"])
        if found is not None:
            text = PHRASES.sub(" ", record["instruction"].replace(found[0], " "))
            code = record["output"].removeprefix("```python\n").removesuffix("\n```")
            values = (found[1], " ".join(text.split()), code, record["source"])
            names = ("signature", "summary", "code", "source")
            functions.append(dict(zip(names, values, strict=True)))
    for record in _read("chat", split):
        question, answer = (record["messages"][n]["content"] for n in (0, 1))
        if 20 <= len(answer) <= TEXT_LIMIT:
            name = question.split("`")[1]
            sentences.append({"name": name, "text": answer, "source": record["source"]})
    return functions, sentences


def short(functions: list[dict]) -> list[dict]:
    return [f for f in functions if len(f["code"]) <= CODE_LIMIT]


def task_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    records = [r for s in sentences for r in (judged(s, rng), compared(s, rng)) if r is not None]
    records += [{k: f[k] for k in ("code", "summary", "source")} for f in short(functions)]
    tests = [f for f in short(functions) if "test" in f["source"]]
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
        word, cut = words[n], rng.randrange(1, len(words[n]) - 2)
        swapped = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
        words[n] = swapped if swapped != word else word[:cut] + word[cut + 1 :]
        return " ".join(words)
    if len(words) < 4:
        return None
    n = rng.randrange(0, len(words) - 2)
    if kind == "repetition":
        return " ".join([*words[: n + 1], *words[n:]])
    if words[n].lower() == words[n + 1].lower():
        return None
    words[n : n + 2] = words[n + 1], words[n]
    return " ".join(words)


def compared(sentence: dict, rng: random.Random) -> dict | None:
    """Two statements and whether they agree; None where nothing can be turned around."""
    words = sentence["text"].split(" ")
    places = [n for n, word in enumerate(words) if word.lower() in ANTONYMS]
    if not places:
        return None
    n, agree = rng.choice(places), rng.random() < 0.5
    if not agree:
        words[n] = ANTONYMS[words[n].lower()]
    return {
        "premise": sentence["text"],
        "statement": " ".join(words),
        "consistent": agree,
        "source": sentence["source"],
    }


def chat(question: str, answer: str, source: str) -> dict:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": r, "content": text} for r, text in turns], "source": source}


def summary_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    ask = "Summarise this code in one sentence.\n\n"
    return [chat(ask + f["code"], f["summary"], f["source"]) for f in short(functions)]


def card_records(functions: list[dict], sentences: list[dict], rng: random.Random) -> list[dict]:
    """Chats that ask for a function's card as JSON."""
    ask, made = "Describe this function as JSON.\n\n", [(f, card(f)) for f in short(functions)]
    return [
        chat(ask + f["code"], json.dumps(found, ensure_ascii=False), f["source"])
        for f, found in made
        if found is not None
    ]


def card(function: dict) -> dict | None:
    """Its name, its parameters (not *args), the names it calls in order, its summary; None for what
    is no function."""
    try:
        body = ast.parse(textwrap.dedent(function["code"])).body
    except SyntaxError:
        return None
    if not body or not isinstance(body[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    node = body[0]
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
    vowels = (re.findall(r"[aeiouy]+", word.lower().removesuffix("e")) for word in words)
    syllables = sum(max(1, len(found)) for found in vowels)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(max(ease, -50.0), 120.0)


MAKERS = {
    "tasks": task_records,
    "summaries": summary_records,
    "cards": card_records,
    "preferences": preference_records,
}
