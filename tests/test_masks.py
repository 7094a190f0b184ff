"""Attention masks are understood exactly: against brute force, and refused with the reason where they are something else."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Function, Node, Tensor, dim, interpret, ops
from stemma.passes import PassContext, explain
from stemma.passes.masks import EVERYTHING, Distances, attention_mask, from_attributes, to_attributes, visible_distances
from stemma.passes.raise_attention import RaiseAttention
from stemma.passes.symbolic import NotUnderstood
from tests.helpers import module

pytestmark = pytest.mark.quick
B, T = dim("batch", 1, 64), dim("tokens", 1, 100)
SCORES = (B, 4, T, T)
LOWEST = -3.4028234663852886e38


def iota(*shape: object) -> Node:
    """0, 1, ... along the only axis of `shape` that is not 1."""
    return ops.reshape(ops.iota(size=next(s for s in shape if s != 1)), shape=shape)


Q, K = iota(T, 1), iota(1, T)  # positions of queries and keys


def number(value: float, dtype: str = "f32") -> Node:
    return ops.constant(value=value, dtype=dtype)


def four(mask: Node) -> Node:
    return ops.reshape(mask, shape=(*[1] * (4 - mask.tensor.rank), *mask.shape))


def attention(mask: Node, **attrs: object) -> Node:
    q, k, v = (ops.param(name=n, type=Tensor("f32", (B, h, T, 8))) for n, h in (("q", 4), ("k", 2), ("v", 2)))
    return ops.attention(q, k, v, four(mask), **{"causal": False, "scale": 0.5, **attrs})


def raised(mask: Node, **attrs: object) -> Node:
    return RaiseAttention().run(module(y=attention(mask, **attrs)), PassContext())["forward"].results[0]


CAUSAL = ops.le(K, Q)


def packed() -> Node:
    """The packed-sequence mask of transformers: positions that do not follow each other start a sequence; here none do."""
    positions = ops.broadcast_to(iota(1, T), shape=(B, T))
    before = ops.slice(positions, axis=1, start=0, stop=1) - 1
    joined = ops.concat(before, positions, axis=1)
    steps = ops.slice(joined, axis=1, start=1, stop=T + 1) - ops.slice(joined, axis=1, start=0, stop=T)
    sequence = ops.cumsum(ops.cast(ops.ne(steps, 1), dtype="i64"), axis=1)
    flat = ops.reshape(sequence, shape=(B * T,))
    row = iota(B, 1, 1, 1) * ops.size_value(size=T)
    same = ops.eq(*(ops.take(flat, row + iota(*shape), axis=0) for shape in ((1, 1, T, 1), (1, 1, 1, T))))
    return ops.logical_and(same, four(CAUSAL))


def wide(mask: Node) -> Node:
    return ops.broadcast_to(four(mask), shape=(B, 1, T, T))


def added(mask: Node, low: float = LOWEST) -> Node:
    return ops.where(mask, number(0.0), number(low))


UNDERSTOOD: dict[str, tuple[Node, bool, int | None]] = {
    "causal": (CAUSAL, True, None),
    "turned around": (ops.ge(Q, K), True, None),
    "not later": (ops.logical_not(ops.gt(K, Q)), True, None),
    "broadcast": (wide(CAUSAL), True, None),
    "tril of ones": (ops.ne(ops.where(CAUSAL, number(1, "i64"), number(0, "i64")), 0), True, None),
    "added": (added(CAUSAL), True, None),
    "added infinity": (added(wide(CAUSAL), -inf), True, None),
    "one minus mask": ((number(1.0) - ops.cast(CAUSAL, dtype="f32")) * LOWEST, True, None),
    "triu of lowest": (ops.where(ops.gt(K, Q), number(LOWEST), number(0.0)), True, None),
    "window": (ops.logical_and(CAUSAL, ops.gt(K, Q - 8)), True, 8),
    "window, other side": (ops.logical_and(ops.lt(Q - K, 8), CAUSAL), True, 8),
    "window hidden": (ops.logical_not(ops.logical_or(ops.gt(K, Q), ops.le(K, Q - 8))), True, 8),
    "window longer than any text": (ops.logical_and(CAUSAL, ops.gt(K, Q - 4096)), True, None),
    "both sides": (ops.logical_and(ops.lt(Q - K, 8), ops.lt(K - Q, 8)), False, 8),
    "everything": (ops.ge(Q + K, 0), False, None),
    "constant": (ops.broadcast_to(number(True, "bool"), shape=(1, 1, T, T)), False, None),
    "positions from 5": (ops.le(K + 5, Q + 5), True, None),
    "transposed": (ops.transpose(ops.le(ops.reshape(Q, shape=(T, 1)), K), axes=(1, 0)), True, None),
    "packed": (packed(), True, None),
    "32-bit positions": (ops.le(ops.cast(K, dtype="i32"), ops.cast(Q, dtype="i32")), True, None),
    "float positions": (ops.le(ops.cast(K, dtype="f32"), ops.cast(Q, dtype="f32")), True, None),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_masks_become_attributes(name: str) -> None:
    mask, causal, window = UNDERSTOOD[name]
    new = raised(mask)
    assert new is attention_without_mask(causal, window)


def attention_without_mask(causal: bool, window: int | None) -> Node:
    old = attention(CAUSAL)
    return ops.attention(*old.inputs[:3], causal=causal, window=window, scale=0.5)


def test_a_mask_narrows_what_attention_does_already() -> None:
    assert raised(ops.gt(K, Q - 8), causal=True) is attention_without_mask(True, 8)
    assert raised(CAUSAL, window=4) is attention_without_mask(True, 4)


PADDING = ops.param(name="attention_mask", type=Tensor("i64", (B, T)))
REFUSED: dict[str, tuple[Node, str]] = {
    "data": (
        ops.logical_and(ops.ne(ops.reshape(PADDING, shape=(B, 1, 1, T)), 0), four(CAUSAL)),
        "depends on the input 'attention_mask'",
    ),
    "stored": (
        ops.ne(ops.weight(name="bias", type=Tensor("u8", (1, 1, 1, 1))), ops.constant(value=0, dtype="u8")),
        "depends on the weight 'bias'",
    ),
    "strictly earlier": (ops.lt(K, Q), "no causal= and window= express 1 <= query - key <= inf"),
    "hole": (
        ops.logical_or(ops.logical_and(CAUSAL, ops.gt(K, Q - 4)), ops.le(K, Q - 9)),
        "0 <= query - key <= 3 or 9 <= query - key <= inf",
    ),
    "first keys": (ops.lt(K, 3), "is no condition on query - key alone"),
    "slope": (ops.le(K * 2, Q), "is no condition on query - key alone"),
    "per batch": (ops.le(K, Q + iota(B, 1, 1, 1)), "is no condition on query - key alone"),
    "chunks": (ops.eq(ops.floordiv(Q, 4), ops.floordiv(K, 4)), "has no simple form"),
    "soft": (added(CAUSAL, -10000.0), "adds -10000, which neither leaves a score alone nor hides it"),
    "bias": (ops.cast(K - Q, dtype="f32"), "neither leaves a score alone nor hides it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_stay_and_the_reason_is_given(name: str) -> None:
    mask, reason = REFUSED[name]
    start = module(y=attention(mask))
    assert RaiseAttention().run(start, PassContext()) is start
    (match,) = explain(attention_mask, start)
    assert not match.fires and "the mask stays an operand" in match.reason and reason in match.reason


def test_rows_that_see_nothing_keep_their_finite_mask() -> None:
    """With more queries than keys, a finite lowest value gives a mean over all keys, -inf gives NaN: not the same."""
    s = dim("keys", 1, 100)
    causal = ops.le(iota(1, s), iota(T, 1) + ops.size_value(size=s - T))
    with pytest.raises(NotUnderstood, match="rows that see nothing"):
        visible_distances(four(added(causal)), (B, 4, T, s))
    assert to_attributes(visible_distances(four(causal), (B, 4, T, s))) == (True, None)
    assert to_attributes(visible_distances(four(added(causal, -inf)), (B, 4, T, s))) == (True, None)


POSITION = st.sampled_from([Q, K, Q - K, K - Q])
COMPARISON = st.sampled_from([ops.lt, ops.le, ops.gt, ops.ge, ops.eq, ops.ne])


@st.composite
def masks(draw: st.DrawFn, depth: int = 2) -> Node:
    """Random boolean expressions over positions."""
    if depth == 0 or draw(st.booleans()):
        left, right = draw(POSITION), draw(st.one_of(POSITION, st.integers(-6, 6)))
        return draw(COMPARISON)(left, right)
    parts = [draw(masks(depth=depth - 1)) for _ in range(2)]
    match draw(st.integers(0, 3)):
        case 0:
            return ops.logical_not(parts[0])
        case 1:
            return ops.logical_and(*parts)
        case 2:
            return ops.logical_or(*parts)
        case _:
            return ops.ne(ops.cast(ops.where(parts[0], ops.cast(parts[1], dtype="i64"), number(1, "i64")), dtype="i32"), 0)


@settings(max_examples=40, deadline=None)
@given(masks())
def test_what_is_understood_equals_brute_force(mask: Node) -> None:
    try:
        found = visible_distances(four(mask), SCORES)
    except NotUnderstood:
        return
    for n in (1, 8):
        shown = ops.broadcast_to(mask, shape=(T, T))
        table = interpret(Function("mask", (), {"mask": shown}), {}, sizes={"tokens": n})["mask"]
        distance = np.arange(n)[:, None] - np.arange(n)[None, :]
        expected = np.zeros((n, n), bool)
        for lo, hi in found.spans:
            expected |= (distance >= lo) & (distance <= hi)
        np.testing.assert_array_equal(table, expected)


SPANS: st.SearchStrategy[Distances] = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5))).map(
    lambda items: _union([Distances(((a, a + n),)) for a, n in items])
)


def _union(sets: list[Distances]) -> Distances:
    result = Distances(())
    for each in sets:
        result = result | each
    return result


def members(distances: Distances) -> set[int]:
    return {d for d in range(-20, 21) if any(lo <= d <= hi for lo, hi in distances.spans)}


@settings(max_examples=50, deadline=None)
@given(SPANS, SPANS)
def test_sets_of_distances(a: Distances, b: Distances) -> None:
    assert members(a | b) == members(a) | members(b)
    assert members(a & b) == members(a) & members(b)
    assert (a & EVERYTHING) == a == (a | a)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_attributes_and_distances_are_inverse(causal: bool, window: int | None) -> None:
    attributes = to_attributes(from_attributes(causal, window))
    assert attributes is not None and from_attributes(*attributes) == from_attributes(causal, window)
