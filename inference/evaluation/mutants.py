"""Programs with one mistake put in: tests that are worth something reject every one of them.

Knows Python's syntax tree; knows nothing of problems or tests. (Mutation testing: DeMillo et al.,
1978.)
"""

from __future__ import annotations

import ast
import copy
import warnings

OPPOSITE = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}


def mutants(code: str, limit: int | None = None) -> list[str]:
    """Each is `code` with one operator turned around or one whole number raised by one; at most
    `limit`, spread over the program. Code that does not parse, as of Python 2, has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return []
    sites = [i for i, node in enumerate(ast.walk(tree)) if changeable(node)]
    if limit is not None and len(sites) > limit:
        sites = [sites[i * len(sites) // limit] for i in range(limit)]
    found = []
    for site in sites:
        changed = copy.deepcopy(tree)
        change(list(ast.walk(changed))[site])
        found.append(ast.unparse(changed) + "\n")
    return found


def changeable(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in OPPOSITE
    return type(getattr(node, "op", None)) in OPPOSITE


def change(node: ast.AST) -> None:
    if isinstance(node, ast.Constant):
        node.value += 1
    elif isinstance(node, ast.Compare):
        node.ops[0] = OPPOSITE[type(node.ops[0])]()
    else:
        node.op = OPPOSITE[type(node.op)]()
