"""The embedded model's corpus: the Python standard library of the running interpreter.

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
from pathlib import Path
from typing import NamedTuple

from eagle.errors import EagleError
from records.fim import cut_spans
from records.rows import RowError

HELDOUT_SHARE = 0.05
# tables of numbers, generated files and deliberately broken sources teach nothing about code
SKIP_PARTS = set("site-packages __pycache__ encodings pydoc_data cjkencodings lib-dynload".split())
SKIP_STEMS = ("bad_", "badsyntax_", "_sysconfigdata")
KINDS = ("code", "fim", "instruction", "chat")
WINDOW = 1000  # characters of code in a record
WRITE = (
    "Write the Python function `{signature}` {summary}",
    "Implement `{signature}` in Python. It should do this: {summary}",
    "{summary} Please write this as `{signature}`",
)
EXPLAIN = ("What does `{name}` do?", "Explain `{name}`.", "What is `{name}` for?")
SIGNATURE = ("What is its signature?", "How do I call it?", "Show me the definition line.")


class SourceFile(NamedTuple):
    path: str  # relative to the standard library, "/" separated
    text: str


class Function(NamedTuple):
    """One documented function or class method, as text."""

    path: str
    name: str  # "module.Class.method"
    signature: str  # "def name(args):" on one line
    summary: str  # first paragraph of the docstring, on one line
    code: str  # dedented, without its docstring, in a fence


def is_heldout(path: str) -> bool:
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def stdlib_files(root: str | Path | None = None) -> list[SourceFile]:
    """Every parsable source file under `root` (the standard library), sorted, exact copies once."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files: dict[str, SourceFile] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP_PARTS & set(name.parts) or path.stem.startswith(SKIP_STEMS):
            continue
        try:
            text = path.read_text("utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # test fixtures of the interpreter that are broken on purpose
        if len(text) >= 200:
            files.setdefault(text, SourceFile(name.as_posix(), text))
    if not files:
        raise EagleError(f"no Python source under {root}; give --root DIR")
    return list(files.values())


def split(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """(train, held out)."""
    return ([f for f in files if not is_heldout(f.path)], [f for f in files if is_heldout(f.path)])


def functions(file: SourceFile) -> Iterator[Function]:
    """Documented functions and methods of a file, of a size a small model can write."""
    lines = file.text.splitlines()

    def visit(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}.{child.name}")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from describe(child, prefix)

    def describe(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Iterator[Function]:
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2:
            return
        summary = " ".join(doc.split("\n\n")[0].split())
        first, second = node.body[:2]
        head = lines[node.lineno - 1 : first.lineno - 1]
        source = "\n".join(head + lines[first.end_lineno : node.end_lineno])
        source = textwrap.dedent(source).strip("\n")
        fits = 20 <= len(summary) <= 400 and 40 <= len(source) <= WINDOW
        if fits and second.lineno > first.lineno:
            keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            signature = f"{keyword} {node.name}({ast.unparse(node.args)}):"
            name = f"{prefix}.{node.name}".removeprefix("test.")
            yield Function(file.path, name, signature, summary, f"```python\n{source}\n```")

    module = file.path[:-3].replace("/", ".").removesuffix(".__init__")
    yield from visit(ast.parse(file.text), module)


def code_windows(file: SourceFile, rng: random.Random, size: int = WINDOW) -> Iterator[str]:
    """The file in consecutive windows of whole lines, about `size` characters each."""
    window, length, limit = [], 0, size * rng.uniform(0.5, 1.0)
    for line in [*file.text.splitlines(keepends=True), None]:
        if length > 200 and (line is None or length + len(line) > limit):
            yield "".join(window)
            window, length, limit = [], 0, size * rng.uniform(0.5, 1.0)
        window.append((line or "")[:400])
        length += len(window[-1])


def record(kind: str, source: tuple | Function, rng: random.Random) -> dict:
    """source: (file, window) of code and fim; else a function, docstring to code or, in one to
    three turns, question and answer over it."""
    if kind in ("code", "fim"):
        file, window = source
        if kind == "code":
            return {"text": window, "source": file.path}
        ((prefix, middle, suffix),) = cut_spans(window, 1, rng)
        return {"prefix": prefix, "middle": middle, "suffix": suffix, "source": file.path}
    if kind == "instruction":
        ask = rng.choice(WRITE)
        ask = ask.format(signature=source.signature.rstrip(":"), summary=source.summary)
        return {"instruction": ask, "input": "", "output": source.code, "source": source.path}
    turns = [rng.choice(EXPLAIN).format(name=source.name), source.summary]
    if rng.random() < 0.6:
        turns += [rng.choice(SIGNATURE), f"It is defined as `{source.signature}`"]
    if rng.random() < 0.4:
        turns += ["Show me the code.", source.code]
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"messages": messages, "source": source.path}


def records(files: list[SourceFile], kind: str, rng: random.Random) -> Iterator[dict]:
    """All records of a kind in a random order. Tests of the interpreter are a third as likely as
    its library."""
    files = [f for f in files if not f.path.startswith("test/") or rng.random() < 0.3]
    if kind in ("code", "fim"):
        pool = [(f, window) for f in files for window in code_windows(f, rng)]
    else:
        pool = [fn for f in files for fn in functions(f)]
    rng.shuffle(pool)
    for source in pool:
        try:
            yield record(kind, source, rng)
        except RowError:  # a window without a span
            continue


def prompt_of(record: dict, rng: random.Random) -> dict:
    """A record less its answer: what is asked of a model."""
    kept = {k: v for k, v in record.items() if k not in ("middle", "output", "input")}
    if "text" in record:
        lines = kept.pop("text").splitlines(keepends=True)
        kept["prompt"] = "".join(lines[: rng.randint(1, len(lines))])
    elif "messages" in record:
        turns = len(record["messages"]) // 2
        kept["messages"] = record["messages"][: 2 * rng.randrange(turns) + 1]
    return kept
