"""The embedded model's corpus: the Python standard library of the running interpreter.

Knows files, docstrings and text; knows nothing of tokens, models or training.

The split is by file and by rule, so that it is the same on every machine and every Python version:
a file is held out when the first four bytes of sha256(relative path) are below 5% of their range.
What was held out of the shipped model is also written down, in `eagle/embedded/heldout.txt`.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELDOUT_SHARE = 0.05
# tables of numbers, generated files and deliberately broken sources teach nothing about code
SKIP_PARTS = {
    "site-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "cjkencodings",
    "lib-dynload",
}
SKIP_STEMS = ("bad_", "badsyntax_", "_sysconfigdata")


@dataclass(frozen=True)
class SourceFile:
    path: str  # relative to the standard library, "/" separated
    text: str


@dataclass(frozen=True)
class Function:
    """One documented function or class method, as text."""

    path: str
    qualname: str  # "module.Class.method"
    signature: str  # "def name(args):" on one line
    summary: str  # first paragraph of the docstring, on one line
    source: str  # dedented, without its docstring


def is_heldout(path: str) -> bool:
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def stdlib_files(root: str | Path | None = None) -> list[SourceFile]:
    """Every parsable source file under `root` (the standard library), sorted, exact copies once."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of Python sources; pass --root DIR")
    files, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root)
        if SKIP_PARTS & set(rel.parts) or path.stem.startswith(SKIP_STEMS):
            continue
        try:
            text = path.read_text("utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # test fixtures of the interpreter that are broken on purpose
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        files.append(SourceFile(rel.as_posix(), text))
    if not files:
        raise FileNotFoundError(f"no Python source under {root}; pass --root DIR")
    return files


def split(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """(train, held out)."""
    return ([f for f in files if not is_heldout(f.path)], [f for f in files if is_heldout(f.path)])


def functions(file: SourceFile) -> Iterator[Function]:
    """Documented functions and methods of a file, of a size a small model can write."""
    lines = file.text.splitlines()
    module = file.path[:-3].replace("/", ".").removesuffix(".__init__")

    def visit(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}.{child.name}")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found = describe(child, prefix)
                if found is not None:
                    yield found

    def describe(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Function | None:
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2 or not node.end_lineno:
            return None
        summary = " ".join(doc.split("\n\n")[0].split())
        first, last = node.body[0], node.body[1]
        head = lines[node.lineno - 1 : first.lineno - 1]
        body = lines[first.end_lineno : node.end_lineno]
        source = textwrap.dedent("\n".join(head + body)).strip("\n")
        if (
            not (20 <= len(summary) <= 400 and 40 <= len(source) <= 1400)
            or last.lineno <= first.lineno
        ):
            return None
        prefix_kw = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        signature = f"{prefix_kw} {node.name}({ast.unparse(node.args)}):"
        return Function(file.path, f"{prefix}.{node.name}", signature, summary, source)

    yield from visit(ast.parse(file.text), module)


def code_windows(file: SourceFile, rng: random.Random, size: int = 1400) -> Iterator[str]:
    """The file in consecutive windows of whole lines, about `size` characters each."""
    window, length, limit = [], 0, size * rng.uniform(0.5, 1.0)
    for line in file.text.splitlines(keepends=True):
        if length + len(line) > limit and length > 200:
            yield "".join(window)
            window, length, limit = [], 0, size * rng.uniform(0.5, 1.0)
        window.append(line[:400])
        length += min(len(line), 400)
    if length > 200:
        yield "".join(window)


def fim_record(file: SourceFile, window: str, rng: random.Random) -> dict:
    """One fill-in-the-middle record: half the middles are whole lines, half start and end
    anywhere.
    """
    if rng.random() < 0.5:
        lines = window.splitlines(keepends=True)
        start = rng.randrange(0, max(1, len(lines) - 1))
        stop = min(len(lines), start + rng.randint(1, 8))
        prefix, middle = "".join(lines[:start]), "".join(lines[start:stop])
        suffix = "".join(lines[stop:])
    else:
        start, stop = sorted(rng.sample(range(1, len(window)), 2))
        stop = min(stop, start + 400)
        prefix, middle, suffix = window[:start], window[start:stop], window[stop:]
    return {"prefix": prefix, "middle": middle, "suffix": suffix, "source": file.path}


WRITE = (
    "Write the Python function `{signature}` {summary}",
    "Implement `{signature}` in Python. It should do this: {summary}",
    "{summary} Please write this as `{signature}`",
)
EXPLAIN = ("What does `{name}` do?", "Explain `{name}`.", "What is `{name}` for?")
SIGNATURE = ("What is its signature?", "How do I call it?", "Show me the definition line.")


def instruction_record(fn: Function, rng: random.Random) -> dict:
    """Docstring to code."""
    ask = rng.choice(WRITE).format(signature=fn.signature.rstrip(":"), summary=fn.summary)
    return {
        "instruction": ask,
        "input": "",
        "output": f"```python\n{fn.source}\n```",
        "source": fn.path,
    }


def chat_record(fn: Function, rng: random.Random) -> dict:
    """Question and answer over a docstring, one to three turns."""
    name = fn.qualname.removeprefix("test.")
    turns = [(rng.choice(EXPLAIN).format(name=name), fn.summary)]
    if rng.random() < 0.6:
        turns.append((rng.choice(SIGNATURE), f"It is defined as `{fn.signature}`"))
    if rng.random() < 0.4:
        turns.append(("Show me the code.", f"```python\n{fn.source}\n```"))
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages, "source": fn.path}
