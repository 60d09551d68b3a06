"""Small faults in Python code: swapped operators, other constants, lost returns and statements."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass

_PAIRS = (
    (ast.Lt, ast.LtE),
    (ast.Lt, ast.GtE),
    (ast.Gt, ast.GtE),
    (ast.Gt, ast.LtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.And, ast.Or),
    (ast.Add, ast.Sub),
    (ast.UAdd, ast.USub),
    (ast.Mult, ast.FloorDiv),
    (ast.Div, ast.Mult),
    (ast.Mod, ast.FloorDiv),
    (ast.BitAnd, ast.BitOr),
    (ast.LShift, ast.RShift),
    (ast.Break, ast.Continue),
)
"""What takes each other's place."""
_UNTOUCHED_FIELDS = {"annotation", "returns", "decorator_list", "type_comment"}
_UNTOUCHED_NODES = (ast.JoinedStr, ast.Assert)
"""Texts of messages, and what only tells a type checker something."""


@dataclass(frozen=True)
class Mutant:
    """A file's code with one fault: where it is, what it changes, and all code with it."""

    line: int
    change: str
    code: str


@dataclass(frozen=True)
class Fault:
    """A node of a syntax tree, its place in its parent, and what replaces it there."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    replacement: ast.AST

    def mutant(self, tree: ast.AST) -> Mutant:
        """Return the code of ``tree`` with this fault; the tree itself stays as it was."""
        whole = self.node if isinstance(self.node, ast.stmt | ast.expr) else self.parent
        before = _first_line(whole)
        self._put(self.replacement)
        after = _first_line(self.replacement if whole is self.node else whole)
        code = ast.unparse(ast.fix_missing_locations(tree))
        self._put(self.node)
        return Mutant(getattr(whole, "lineno", 0), f"{before} -> {after}", code)

    def _put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def drawn(code: str, name: str, seed: int, most: int) -> list[Mutant]:
    """Draw at most ``most`` mutants of a file's code, by the seed and the file's name."""
    tree = ast.parse(code)
    found = list(faults(tree))
    random_ = random.Random(f"{seed}:{name}")
    return [fault.mutant(tree) for fault in random_.sample(found, min(most, len(found)))]


def faults(parent: ast.AST) -> Iterator[Fault]:
    """Yield every fault that can be planted below a node, in the order of the code."""
    for field, value in ast.iter_fields(parent):
        if field in _UNTOUCHED_FIELDS:
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _is_untouched(node):
                continue
            for replacement in _replacements(node, field):
                yield Fault(parent, field, index, node, replacement)
            yield from faults(node)


def _is_untouched(node: ast.AST) -> bool:
    """Tell whether a node says nothing of behaviour: a docstring, a message, a line of the log."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="logger")))):
            return True
    return isinstance(node, _UNTOUCHED_NODES)


def _replacements(node: ast.AST, field: str) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place in the ``field`` of its parent."""
    for pair in _PAIRS:
        if type(node) in pair:
            yield pair[pair.index(type(node)) - 1]()
    match node:
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case (
            ast.Expr()
            | ast.AugAssign()
            | ast.Raise()
            | ast.Delete()
            | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
        ):
            yield ast.Pass()
        case ast.Name() | ast.Call() | ast.Attribute() if field == "test":
            yield ast.UnaryOp(ast.Not(), node)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]
