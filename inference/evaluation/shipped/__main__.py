"""Make `problems.jsonl`: the shipped problems in the TACO schema, with tests from reference
implementations.

    python -m inference.evaluation.shipped --out FILE.jsonl

The same file comes out every time; the tests check that the shipped one is it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from configs import cli

from . import PROBLEMS
from .calls import CALLS
from .source import Source
from .stdin import STDIN

TESTS = 24  # a problem, unless there are fewer different cases


def build(*, out: str = str(PROBLEMS)) -> None:
    """Write the problem set to --out."""
    from inference.generate import write_text

    rows = [row(source) for source in (*STDIN, *CALLS)]
    write_text(Path(out), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    tests = sum(len(json.loads(r["input_output"])["inputs"]) for r in rows)
    print(f"{len(rows)} problems, {tests} tests: {out}")


def row(source: Source) -> dict:
    """A TACO row. `task_id` and `judge` are ours: TACO counts rows, and does not say how to
    compare.
    """
    mark = {"policy": source.policy, "special": source.special}
    judge = {k: v for k, v in mark.items() if v}
    return {
        "task_id": source.name,
        "question": source.question,
        "starter_code": source.starter,
        "solutions": json.dumps(list(source.solutions)),
        "input_output": json.dumps(tests(source)),
        "difficulty": source.difficulty,
        "raw_tags": repr(list(source.tags)),
        "name": source.name,
        "source": "eagle-heads",
        "tags": repr(list(source.tags)),
        "skill_types": repr(list(source.skills)),
        "url": "",
        "Expected Auxiliary Space": None,
        "time_limit": source.time_limit,
        "date": None,
        "picture_num": "0",
        "memory_limit": "256.0 megabytes",
        "Expected Time Complexity": None,
        "judge": json.dumps(judge) if judge else None,
    }


def tests(source: Source) -> dict:
    """`input_output`: the cases chosen by hand, then random ones that are not there yet."""
    rng = random.Random(source.name)
    cases = list(source.cases)
    for _ in range(20 * TESTS):
        if len(cases) >= TESTS:
            break
        case = source.more(rng)
        if case not in cases:
            cases.append(case)
    if source.call_based:
        name = source.starter.removeprefix("def ").partition("(")[0]
        # as in TACO, the arguments are a list and the result stands in a list of one
        outputs = [[source.answer(*case)] for case in cases]
        return {"inputs": [list(case) for case in cases], "outputs": outputs, "fn_name": name}
    return {
        "inputs": [source.show(*case) for case in cases],
        "outputs": [source.answer(*case) for case in cases],
    }


if __name__ == "__main__":
    cli.main(build, name="python -m inference.evaluation.shipped")
