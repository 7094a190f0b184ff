"""Attention masks, understood exactly: which queries see which keys, as a set of distances.

    attention(q, k, v, mask)  ->  attention(q, k, v, causal=True)              when visible(b, h, q, k) == (q - k >= 0)
                                  attention(q, k, v, causal=True, window=w)    ... == (0 <= q - k < w)
                                  attention(q, k, v, causal=False, window=w)   ... == (-w < q - k < w)
                                  attention(q, k, v)                           ... == True

The mask's element at symbolic indices is computed by walking the graph (passes/symbolic.py), so how a model writes its mask does
not matter. A mask that is not one of these forms, or that depends on data, stays an operand, and the rule says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, inf

from stemma.ir import Node, Size, SizeLike, ops, size
from stemma.passes.rewrite import NoMatch, rule
from stemma.passes.selftest import example
from stemma.passes.symbolic import AtLeastZero, Either, Elements, Every, Formula, NotUnderstood, aligned, either

HIDDEN = -1e30  # an added value at or below this makes exp() exactly 0 in every float type, whatever the score
Span = tuple[float, float]


@dataclass(frozen=True)
class Distances:
    """A set of distances (position of the query minus position of the key): spans of integers with both ends included."""

    spans: tuple[Span, ...]

    def __and__(self, other: Distances) -> Distances:
        both = [(max(a, c), min(b, d)) for a, b in self.spans for c, d in other.spans]
        return Distances(tuple(sorted(s for s in both if s[0] <= s[1])))

    def __or__(self, other: Distances) -> Distances:
        joined: list[Span] = []
        for lo, hi in sorted(self.spans + other.spans):
            if joined and lo <= joined[-1][1] + 1:
                joined[-1] = (joined[-1][0], max(hi, joined[-1][1]))
            else:
                joined.append((lo, hi))
        return Distances(tuple(joined))

    def within(self, lo: int, hi: int) -> Distances:
        """The same set among the distances lo..hi that occur, with ends beyond them moved to infinity."""
        kept = (self & Distances(((lo, hi),))).spans
        return Distances(tuple((-inf if a <= lo else a, inf if b >= hi else b) for a, b in kept))

    def __str__(self) -> str:
        return " or ".join(f"{a} <= query - key <= {b}" for a, b in self.spans) or "nothing visible"


EVERYTHING = Distances(((-inf, inf),))


def from_attributes(causal: bool, window: int | None) -> Distances:
    """The distances that attention's own attributes let through."""
    low = 0 if causal else -inf if window is None else 1 - window
    return Distances(((low, inf if window is None else window - 1),))


def to_attributes(distances: Distances) -> tuple[bool, int | None] | None:
    """`causal` and `window` for a set of distances; None when they cannot express it."""
    match distances.spans:
        case ((lo, hi),) if lo == 0:
            return True, None if hi == inf else int(hi) + 1
        case ((lo, hi),) if lo == -hi:
            return False, None if hi == inf else int(hi) + 1
    return None


def visible_distances(mask: Node, scores: tuple[SizeLike, ...]) -> Distances:
    """The distances that a mask operand lets through, exactly; `scores` is [batch, heads, queries, keys].

    Query positions count from keys - queries, as in `attention`. Raises NotUnderstood when the mask depends on data, on a position
    alone, on the batch or the head.
    """
    elements = Elements()
    index = tuple(elements.ranges.variable(s) for s in scores)
    own = aligned(mask, index)
    visible = elements.formula(mask, own) if mask.dtype == "bool" else _additive(elements, mask, own, scores)
    offset = scores[3] - scores[2]
    low, high = 1 - size.bounds(scores[2])[1], size.bounds(scores[3])[1] - 1
    return _distances(visible, index, offset).within(low, high)


def _additive(elements: Elements, mask: Node, index: tuple[SizeLike, ...], scores: tuple[SizeLike, ...]) -> Formula:
    visible: list[Formula] = []
    for guard, value in elements.cases(mask, index):
        if isinstance(value, Size) or (value != 0 and not value <= HIDDEN):
            raise NotUnderstood(f"it adds {value}, which neither leaves a score alone nor hides it")
        if value == 0:
            visible.append(guard)
        elif value != -inf and scores[2] is not scores[3] and scores[2] != scores[3]:
            raise NotUnderstood(f"it adds {value} instead of -inf, which differs in rows that see nothing")
    return either(*visible)


def _distances(formula: Formula, index: tuple[Size, ...], offset: SizeLike) -> Distances:
    """The set of distances where a formula holds, when it depends on query and key by their distance only."""
    match formula:
        case bool():
            return EVERYTHING if formula else Distances(())
        case Every(parts=parts):
            found = EVERYTHING
            for part in parts:
                found = found & _distances(part, index, offset)
            return found
        case Either(parts=parts):
            found = Distances(())
            for part in parts:
                found = found | _distances(part, index, offset)
            return found
        case AtLeastZero(value=value):
            return _atom(value, index, offset)


def _atom(value: Size, index: tuple[Size, ...], offset: SizeLike) -> Distances:
    """factor * distance + rest >= 0."""
    query, key = index[2], index[3]
    distance = size.dim("_distance", 0)
    line = size.substitute(value, {str(query): distance + key - offset})
    rest = size.substitute(line, {"_distance": 0})
    factor = size.substitute(line, {"_distance": 1}) - rest
    if not isinstance(rest, int) or not isinstance(factor, int) or line != distance * factor + rest:
        names = {str(v): n for v, n in zip(index, ("batch", "head", "query", "key"), strict=True)}
        text = str(value)
        for name, readable in names.items():
            text = text.replace(name, readable)
        raise NotUnderstood(f"a key is visible where {text} >= 0, which is no condition on query - key alone")
    bound = Fraction(-rest, factor)
    return Distances(((ceil(bound), inf),)) if factor > 0 else Distances(((-inf, floor(bound)),))


def _mask(causal: bool, window: int | None, additive: bool) -> dict[str, object]:
    """An example: attention over n tokens with a mask written out over positions."""
    q = example("q", "f32[b, 2, n, 4]")
    n = q.shape[2]
    distance = ops.reshape(ops.iota(size=n), shape=(n, 1)) - ops.reshape(ops.iota(size=n), shape=(1, n))
    mask = ops.eq(distance, distance)
    if causal:
        mask = ops.logical_and(mask, ops.ge(distance, 0))
    if window is not None:
        mask = ops.logical_and(mask, ops.lt(distance, window))
        mask = mask if causal else ops.logical_and(mask, ops.gt(distance, -window))
    if additive:
        mask = ops.where(mask, ops.constant(value=0.0, dtype="f32"), ops.constant(value=-3.4028234663852886e38, dtype="f32"))
    mask = ops.broadcast_to(ops.reshape(mask, shape=(1, 1, n, n)), shape=(q.shape[0], 1, n, n))
    k, v = (example(name, "f32[b, 1, n, 4]") for name in "kv")
    return dict(q=q, k=k, v=v, mask=mask, causal=False, window=None, scale=0.5, softcap=None)


@rule(
    lambda q, k, v, mask, causal, window, scale, softcap: ops.attention(
        q, k, v, mask, causal=causal, window=window, scale=scale, softcap=softcap
    ),
    cases=[_mask(*c) for c in ((True, None, False), (True, 3, True), (False, 2, False), (False, None, True))],
)
def attention_mask(
    q: Node, k: Node, v: Node, mask: Node, causal: bool, window: int | None, scale: float, softcap: float | None
) -> Node:
    """attention(q, k, v, mask) -> attention(q, k, v, causal=, window=), when the mask says exactly that"""
    try:
        seen = visible_distances(mask, (*q.shape[:3], k.shape[2]))
    except NotUnderstood as error:
        raise NoMatch(f"the mask stays an operand: {error}") from None
    seen = seen & from_attributes(causal, window)
    attributes = to_attributes(seen)
    if attributes is None:
        raise NoMatch(f"the mask stays an operand: no causal= and window= express {seen}")
    return ops.attention(q, k, v, causal=attributes[0], window=attributes[1], scale=scale, softcap=softcap)
