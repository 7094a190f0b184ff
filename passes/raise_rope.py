"""Raising of rotary position embeddings in the half-split layout of Hugging Face models (rotate_half)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from stemma.ir import Node, ops
from stemma.passes.rewrite import NoMatch, Rule, RulePass, rule

TABLES = {"cos": "f32[1, n, 4]", "sin": "f32[1, n, 4]"}


def _rotate_half(x: Any, axis: Any, low: Any, half: Any, end: Any) -> Any:
    high = ops.slice(x, axis=axis, start=half, stop=end)
    return ops.concat(ops.neg(high), ops.slice(x, axis=axis, start=low, stop=half), axis=axis)


def _checked(x: Node, cos: Node, sin: Node, axis: int, low: int, half: int, end: int) -> None:
    if axis != x.tensor.rank - 1:
        raise NoMatch(f"the halves are split along axis {axis}, not along the last one")
    if half - low != end - half:
        raise NoMatch(f"the parts {low}:{half} and {half}:{end} have different sizes")
    if cos.type != sin.type or cos.shape[-1] != end - low or cos.tensor.rank > x.tensor.rank:
        raise NoMatch(f"the tables {cos!r} and {sin!r} do not fit {end - low} elements")
    for s, t in zip(cos.shape[::-1], x.shape[::-1][: cos.tensor.rank], strict=True):
        if s not in (1, t) and s is not cos.shape[-1]:
            raise NoMatch(f"the tables {cos!r} do not broadcast to {x!r}")


@rule(
    lambda x, cos, sin, axis, half, end: x * cos + _rotate_half(x, axis, 0, half, end) * sin,
    cases=[TABLES | {"x": "f32[b, n, 4]", "axis": 2, "half": 2, "end": 4}],
)
def rope(x: Node, cos: Node, sin: Node, axis: int, half: int, end: int) -> Node:
    """x * cos + concat(-x[D/2:], x[:D/2]) * sin -> rope(x, cos, sin)"""
    _checked(x, cos, sin, axis, 0, half, end)
    if end != x.shape[-1]:
        raise NoMatch("the rotated part is not the whole of x")
    return ops.rope(x, cos, sin)


@rule(
    lambda x, cos, sin, axis, low, half, end: (
        ops.slice(x, axis=axis, start=low, stop=end) * cos + _rotate_half(x, axis, low, half, end) * sin
    ),
    cases=[TABLES | {"x": "f32[b, n, 7]", "axis": 2, "low": low, "half": low + 2, "end": low + 4} for low in (0, 2)],
)
def partial_rope(x: Node, cos: Node, sin: Node, axis: int, low: int, half: int, end: int) -> Node:
    """The same on a slice of x (slices of slices have been joined) -> rope(slice(x), cos, sin)"""
    _checked(x, cos, sin, axis, low, half, end)
    return ops.rope(ops.slice(x, axis=axis, start=low, stop=end), cos, sin)


@dataclass(frozen=True)
class RaiseRope(RulePass):
    """Recover rotary position embeddings; in partial ones the rest of the head stays slice and concat."""

    name: ClassVar[str] = "raise_rope"
    rules: ClassVar[tuple[Rule, ...]] = (rope, partial_rope)
