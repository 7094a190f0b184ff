"""Sizes of a manifest: integers, or text in Python syntax over the names of dimensions (`"rows"`, `"2*tokens + 1"`)."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

SizeFunction = Callable[[Mapping[str, int]], int]
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: int.__add__,
    ast.Sub: int.__sub__,
    ast.Mult: int.__mul__,
    ast.FloorDiv: int.__floordiv__,
}


def compile_size(text: int | str, names: frozenset[str]) -> SizeFunction:
    """A function from the values of dimensions to the value of a size. ValueError for anything but size arithmetic."""
    if isinstance(text, int):
        return _constant(text)
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"{text!r} is not a size") from error
    return _compile(tree, names)


def _constant(value: int) -> SizeFunction:
    return lambda values: value


def _variable(name: str) -> SizeFunction:
    return lambda values: values[name]


def _binary(apply: Callable[[int, int], int], a: SizeFunction, b: SizeFunction) -> SizeFunction:
    return lambda values: apply(a(values), b(values))


def _compile(node: ast.expr, names: frozenset[str]) -> SizeFunction:
    match node:
        case ast.Constant(value=int(value)):
            return _constant(value)
        case ast.Name(id=name) if name in names:
            return _variable(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _binary(int.__mul__, _constant(-1), _compile(operand, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _binary(_BINARY[type(op)], _compile(left, names), _compile(right, names))
        case ast.Call(func=ast.Name(id="min" | "max" as kind), args=[left, right], keywords=[]):
            return _binary(min if kind == "min" else max, _compile(left, names), _compile(right, names))
    raise ValueError(f"{ast.unparse(node)!r} is not size arithmetic over {', '.join(sorted(names)) or 'no names'}")
