"""Rules that simplify arithmetic and logic of single elements, and put equal expressions into one form."""

from __future__ import annotations

import math

from stemma.ir import OPS, Node, SizeLike, dtype, evaluate_constant, ops
from stemma.ir.ops.elementwise import broadcast
from stemma.passes.pattern import COMMUTATIVE, Match, any_of, scalar
from stemma.passes.rewrite import NoMatch, rule
from stemma.passes.selftest import example

X = {"x": "f32[n, 4]"}
POSITIVE = ops.abs(example("a", "f32[n, 4]")) + 0.5
FOLDED = frozenset(n for n, op in OPS.items() if "elementwise" in op.tags)


def _number(value: float, name: str = "f32") -> Node:
    return ops.constant(value=value, dtype=name)


@rule(lambda x: any_of(x + 0, x - 0, x * 1, x / 1), cases=[X])
def neutral(x: Node) -> Node:
    """x + 0, x - 0, x * 1, x / 1 -> x"""
    return x


@rule(lambda x: ops.neg(ops.neg(x)), cases=[X])
def double_negation(x: Node) -> Node:
    """neg(neg(x)) -> x"""
    return x


@rule(lambda x: ops.logical_not(ops.logical_not(x)), cases=[{"x": "bool[n]"}])
def double_not(x: Node) -> Node:
    """logical_not(logical_not(x)) -> x"""
    return x


@rule(lambda x: any_of(ops.logical_and(x, True), ops.logical_or(x, False)), cases=[{"x": "bool[n]"}])
def neutral_logic(x: Node) -> Node:
    """logical_and(x, True), logical_or(x, False) -> x"""
    return x


@rule(lambda x: x, roots=COMMUTATIVE, cases=[{"x": ops.mul(_number(2.0), example("a", "f32[n]"))}])
def constant_to_the_right(x: Node) -> Node:
    """add(c, x) -> add(x, c), and the other commutative operations"""
    a, b = x.inputs
    if a.op.name != "constant" or b.op.name == "constant":
        raise NoMatch("the constant is not on the left")
    return x.op(b, a)


@rule(lambda x, y: ops.gt(x, y), cases=[{"x": "f32[n]", "y": "f32[n]"}])
def greater(x: Node, y: Node) -> Node:
    """gt(x, y) -> lt(y, x)"""
    return ops.lt(y, x)


@rule(lambda x, y: ops.ge(x, y), cases=[{"x": "i64[n]", "y": "i64[m, 1]"}])
def greater_or_equal(x: Node, y: Node) -> Node:
    """ge(x, y) -> le(y, x)"""
    return ops.le(y, x)


@rule(
    lambda x: x, roots=FOLDED,
    cases=[{"x": ops.sqrt(_number(2.0))}, {"x": ops.lt(_number(1, "i64"), _number(2, "i64"))},
           {"x": ops.cast(_number(0.1), dtype="bf16")}, {"x": ops.cast(ops.size_value(size=3), dtype="f32")}],
)  # fmt: skip
def fold_scalars(x: Node) -> Node:
    """exp(2.0) -> 7.389..., and every other elementwise operation on constants"""
    if not all(i.op.name == "constant" or (i.op.name == "size_value" and isinstance(i.attrs["size"], int)) for i in x.inputs):
        raise NoMatch("an operand is not a scalar constant")
    value = evaluate_constant(x, None, float).item()
    return ops.constant(value=value, dtype=x.dtype)


@rule(lambda c, x: ops.where(c, x, x), cases=[{"c": "bool[n, 1]", "x": "f32[n, 4]"}])
def same_branches(c: Node, x: Node) -> Node:
    """where(c, x, x) -> x, when the condition adds no axes"""
    if broadcast(c.shape, x.shape) != x.shape:
        raise NoMatch("the condition has a larger shape")
    return x


@rule(lambda x, n: ops.pow(x, scalar(n)), cases=[{"x": POSITIVE, "n": n} for n in (1.0, 2.0, 3.0, 0.5, -0.5, -1.0)])
def small_power(x: Node, n: float) -> Node:
    """pow(x, 2) -> x * x, pow(x, 3) -> x * x * x; likewise 1, 1/2 (sqrt), -1/2 (rsqrt) and -1 (reciprocal)"""
    if n in (1, 2, 3):
        return x if n == 1 else x * x if n == 2 else x * x * x
    known = {0.5: ops.sqrt, -0.5: ops.rsqrt, -1.0: ops.reciprocal}
    if n not in known:
        raise NoMatch(f"the exponent {n} has no simpler form")
    return known[n](x)


@rule(lambda x: any_of(ops.reciprocal(ops.sqrt(x)), ops.div(scalar(1), ops.sqrt(x))), cases=[{"x": POSITIVE}])
def inverse_root(x: Node) -> Node:
    """reciprocal(sqrt(x)), 1 / sqrt(x) -> rsqrt(x)"""
    return ops.rsqrt(x)


@rule(lambda x, y: x / ops.sqrt(y), cases=[{"x": "f32[n, 4]", "y": POSITIVE}])
def division_by_root(x: Node, y: Node) -> Node:
    """x / sqrt(y) -> x * rsqrt(y)"""
    return x * ops.rsqrt(y)


@rule(lambda x, c: x / scalar(c), cases=[{"x": "f32[n, 4]", "c": c} for c in (8.0, -0.25)])
def division_by_power_of_two(x: Node, c: float) -> Node:
    """x / c -> x * (1 / c), when that is exact: c is a power of two"""
    if math.frexp(abs(c))[0] != 0.5:
        raise NoMatch(f"{c} is not a power of two, so the product would round differently")
    return x * (1.0 / c)


@rule(
    lambda c, shape, i: ops.cumsum(ops.broadcast_to(scalar(c, example("a", "i64[n]")), shape=shape), axis=i),
    cases=[{"c": c, "shape": (2, example("a", "i64[n]").shape[0], 3), "i": 1} for c in (1, -2)],
)
def cumsum_of_constant(c: float, shape: tuple[SizeLike, ...], i: int, match: Match) -> Node:
    """cumsum(broadcast_to(c)) -> (iota + 1) * c: positions counted by a mask of ones"""
    if c != int(c):
        raise NoMatch("a running sum of fractions rounds at every step")
    counted = (ops.iota(size=shape[i], dtype=match.root.dtype) + 1) * c
    return ops.broadcast_to(ops.reshape(counted, shape=(shape[i], *[1] * (len(shape) - i - 1))), shape=shape)


def _exact(narrow: str, wide: str) -> bool:
    """Whether every value of one element type is a value of another."""
    a, b = dtype(narrow), dtype(wide)
    if a.kind == "bool" or narrow == wide:
        return True
    if a.kind == b.kind == "float":
        return b.bits > a.bits
    return a.kind == b.kind == "int" and b.bits > a.bits and (b.name != "u8") and (a.name != "u8" or b.bits > 8)


@rule(lambda x: x, roots=("cast",), cases=[{"x": ops.cast(example("a", "f32[n]"), dtype="f32")}])
def same_cast(x: Node) -> Node:
    """cast(x, dtype=x.dtype) -> x"""
    if x.dtype != x.inputs[0].dtype:
        raise NoMatch("the cast changes the element type")
    return x.inputs[0]


@rule(
    lambda x, a, b: ops.cast(ops.cast(x, dtype=a), dtype=b),
    cases=[
        {"x": x, "a": a, "b": b} for x, a, b in (("bf16[n]", "f32", "bf16"), ("i32[n]", "i64", "f32"), ("bool[n]", "i64", "f32"))
    ],
)
def double_cast(x: Node, a: str, b: str) -> Node:
    """cast(cast(x, a), b) -> cast(x, b), when the cast to a is exact"""
    if not _exact(x.dtype, a):
        raise NoMatch(f"{x.dtype} does not fit in {a}")
    return ops.cast(x, dtype=b)


ARITHMETIC = (
    neutral, double_negation, double_not, neutral_logic, constant_to_the_right, greater, greater_or_equal, fold_scalars,
    same_branches, small_power, inverse_root, division_by_root, division_by_power_of_two, cumsum_of_constant, same_cast,
    double_cast,
)  # fmt: skip
