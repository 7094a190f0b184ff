"""Raising of attention: explicit chains become `attention`, with scale, soft cap, grouped heads and masks as attributes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from stemma.ir import Node, SizeLike, ops
from stemma.passes.masks import HIDDEN, attention_mask
from stemma.passes.pattern import Match, any_of, maybe_cast, optional, scalar
from stemma.passes.rewrite import NoMatch, Rule, RulePass, rule
from stemma.passes.selftest import example
from stemma.passes.simplify_views import double_transpose, transpose_that_moves_nothing

QKV = {"q": "f32[b, 2, n, 4]", "k": "f32[b, 2, m, 4]", "v": "f32[b, 2, m, 3]"}
N = example("q", QKV["q"]).shape


def _scores(q: Any, kt: Any, c: Any, d: Any, cap: Any, inverse: Any) -> Any:
    """Scaled and perhaps soft-capped products."""
    s = ops.matmul(q, kt)
    s = any_of(s * scalar(c), s / scalar(d), s)
    return any_of(ops.tanh(s / scalar(cap)) * scalar(cap), ops.tanh(s * scalar(inverse)) * scalar(cap), ops.tanh(s), s)


def _masked(s: Any, mask: Any, seen: Any, hidden: Any, fill: Any) -> Any:
    """Scores with hidden ones replaced, or a mask or bias added, or both."""
    chosen = any_of(ops.where(seen, s, scalar(fill, s)), ops.where(hidden, scalar(fill, s), s))
    biased = s + mask
    return any_of(
        biased, chosen, chosen + mask, ops.where(seen, biased, scalar(fill, s)), ops.where(hidden, scalar(fill, s), biased), s
    )


@rule(
    lambda q, kt, v, mask, seen, hidden, fill, c, d, cap, inverse: ops.matmul(
        maybe_cast(ops.softmax(_masked(_scores(q, kt, c, d, cap, inverse), mask, seen, hidden, fill), axis=3)), v
    ),
    cases=[
        {"q": "f32[b, 2, n, 4]", "kt": "f32[b, 2, 4, m]", "v": "f32[b, 2, m, 3]", "mask": "f32[n, m]", "seen": "bool[b, 1, n, m]",
         "hidden": "bool[b, 1, n, m]", "fill": -1e38, "c": 0.5, "d": 2.5, "cap": 3.0, "inverse": 1 / 3}
    ],
)  # fmt: skip
def explicit_attention(
    q: Node, kt: Node, v: Node, mask: Node | None, seen: Node | None, hidden: Node | None, fill: float | None, c: float | None,
    d: float | None, cap: float | None, inverse: float | None, match: Match,
) -> Node:  # fmt: skip
    """matmul(softmax(cap * tanh(scale * matmul(q, kt) / cap) + mask), v) -> attention(q, transpose(kt), v, mask, scale=, softcap=)

    Scale, soft cap and mask may be missing; the mask may be added, or chosen by where, or both.
    """
    if not q.tensor.rank == kt.tensor.rank == v.tensor.rank == 4:
        raise NoMatch("the products are not over [batch, heads, tokens, width]")
    if not q.shape[:2] == kt.shape[:2] == v.shape[:2]:
        raise NoMatch(f"{q!r}, {kt!r} and {v!r} do not have the same batch and heads")
    if inverse is not None and not math.isclose(inverse * (cap or 0.0), 1.0, rel_tol=1e-14):
        raise NoMatch(f"scores are multiplied by {inverse} before tanh and by {cap} after, which is no soft cap")
    if cap is None and any(n.op.name == "tanh" for n in match.nodes):
        cap = 1.0
    if fill is not None and not fill <= HIDDEN:
        raise NoMatch(f"hidden scores are set to {fill}, which does not hide them completely")
    scores = (*q.shape[:3], kt.shape[3])
    if fill is not None:
        zero, low = (ops.constant(value=value, dtype=q.dtype) for value in (0.0, fill))
        chosen = ops.where(seen, zero, low) if seen is not None else ops.where(hidden, low, zero)
        mask = chosen if mask is None else mask + chosen
    if mask is not None and mask.tensor.rank < 4:
        mask = ops.reshape(mask, shape=(*[1] * (4 - mask.tensor.rank), *mask.shape))
    if mask is not None and any(a not in (1, b) for a, b in zip(mask.shape, scores, strict=True)):
        raise NoMatch(f"the mask {mask!r} makes the scores larger")
    scale = c if c is not None else 1.0 / d if d is not None else 1.0
    k = ops.transpose(kt, axes=(0, 1, 3, 2))
    return ops.attention(q, k, v, mask, causal=False, scale=scale, softcap=cap)


@rule(
    lambda s, seen, fill, c, d: any_of(
        (s + ops.where(seen, scalar(0.0, s), scalar(fill, s))) * scalar(c),
        (s + ops.where(seen, scalar(0.0, s), scalar(fill, s))) / scalar(d),
    ),
    cases=[{"s": "f32[n, m]", "seen": "bool[m]", "fill": -1e38, "c": 0.5, "d": 3.0}],
)
def mask_after_scale(s: Node, seen: Node, fill: float, c: float | None, d: float | None) -> Node:
    """(s + where(seen, 0, fill)) * c -> s * c + where(seen, 0, fill * c), for a fill that hides completely; likewise / c"""
    scaled = fill * c if c is not None else fill / d if d is not None else fill
    if not scaled <= HIDDEN:
        raise NoMatch(f"{fill} scaled to {scaled} does not hide completely")
    zero, low = (ops.constant(value=value, dtype=s.dtype) for value in (0.0, scaled))
    return (s * c if c is not None else s / d) + ops.where(seen, zero, low)


def _attention(q: Any, k: Any, v: Any, mask: Any, causal: Any, window: Any, scale: Any, softcap: Any) -> Any:
    return ops.attention(q, k, v, optional(mask), causal=causal, window=window, scale=scale, softcap=softcap)


SETTINGS = {"causal": True, "window": 3, "scale": 0.5, "softcap": 4.0}


@rule(
    lambda q, k, v, mask, factor, causal, window, scale, softcap: any_of(
        _attention(q * scalar(factor), k, v, mask, causal, window, scale, softcap),
        _attention(q, k * scalar(factor), v, mask, causal, window, scale, softcap),
    ),
    cases=[
        QKV | SETTINGS | {"mask": mask, "factor": 0.125, "k": "f32[b, 2, n, 4]", "v": "f32[b, 2, n, 3]"}
        for mask in (None, "f32[b, 1, n, n]")
    ],
)
def attention_scale(
    q: Node, k: Node, v: Node, mask: Node | None, factor: float, causal: bool, window: int | None, scale: float,
    softcap: float | None,
) -> Node:  # fmt: skip
    """attention(q * c, k, v, scale=s), attention(q, k * c, v, scale=s) -> attention(q, k, v, scale=s * c)"""
    return ops.attention(q, k, v, mask, causal=causal, window=window, scale=scale * factor, softcap=softcap)


def _repeated(x: Any, apart: Any, wide: Any, joined: Any) -> Any:
    """The way models repeat key-value heads."""
    return ops.reshape(ops.broadcast_to(ops.reshape(x, shape=apart), shape=wide), shape=joined)


def _repetition(x: Node, apart: Any, wide: Any, joined: Any) -> None:
    batch, heads, length, width = x.shape if x.tensor.rank == 4 else (None,) * 4
    group = wide[2] if len(wide) == 5 else None
    if apart != (batch, heads, 1, length, width) or wide != (batch, heads, group, length, width):
        raise NoMatch(f"{x!r} is not repeated head by head")
    if not isinstance(heads, int) or not isinstance(group, int) or joined != (batch, heads * group, length, width):
        raise NoMatch(f"{x!r} is not repeated head by head")


def _grouped(x: str, width: int) -> dict[str, Any]:
    b, n = N[0], N[2]
    return {f"apart_{x}": (b, 3, 1, n, width), f"wide_{x}": (b, 3, 2, n, width), f"joined_{x}": (b, 6, n, width)}


@rule(
    lambda q, k, v, mask, apart_k, wide_k, joined_k, apart_v, wide_v, joined_v, causal, window, scale, softcap: _attention(
        q, _repeated(k, apart_k, wide_k, joined_k), _repeated(v, apart_v, wide_v, joined_v), mask, causal, window, scale, softcap
    ),
    cases=[
        SETTINGS | _grouped("k", 4) | _grouped("v", 5)
        | {"q": "f32[b, 6, n, 4]", "k": "f32[b, 3, n, 4]", "v": "f32[b, 3, n, 5]", "mask": mask}
        for mask in (None, "f32[b, 6, n, n]")
    ],
)  # fmt: skip
def grouped_heads(
    q: Node, k: Node, v: Node, mask: Node | None, apart_k: Any, wide_k: Any, joined_k: Any, apart_v: Any, wide_v: Any,
    joined_v: Any, causal: bool, window: int | None, scale: float, softcap: float | None,
) -> Node:  # fmt: skip
    """attention(q, repeat(k), repeat(v)) -> attention(q, k, v), when every key-value head is repeated in place (repeat_kv)"""
    _repetition(k, apart_k, wide_k, joined_k)
    _repetition(v, apart_v, wide_v, joined_v)
    return ops.attention(q, k, v, mask, causal=causal, window=window, scale=scale, softcap=softcap)


@rule(
    lambda q, k, v, mask, wide_k, wide_v, causal, window, scale, softcap: _attention(
        q, ops.broadcast_to(k, shape=wide_k), ops.broadcast_to(v, shape=wide_v), mask, causal, window, scale, softcap
    ),
    cases=[
        SETTINGS | {"q": "f32[b, 2, n, 4]", "k": "f32[b, 1, n, 4]", "v": "f32[b, 1, n, 4]", "mask": None, "wide_k": N, "wide_v": N}
    ],
)
def single_key_head(
    q: Node, k: Node, v: Node, mask: Node | None, wide_k: tuple[SizeLike, ...], causal: bool, window: int | None, scale: float,
    softcap: float | None,
) -> Node:  # fmt: skip
    """attention(q, broadcast_to(k), broadcast_to(v)) -> attention(q, k, v), when k and v have one head (multi-query attention)"""
    if k.tensor.rank != 4 or v.shape[:3] != k.shape[:3] or (k.shape[0], 1, k.shape[2]) != k.shape[:3] or wide_k[0] != k.shape[0]:
        raise NoMatch("k and v are not one head repeated")
    return ops.attention(q, k, v, mask, causal=causal, window=window, scale=scale, softcap=softcap)


@dataclass(frozen=True)
class RaiseAttention(RulePass):
    """Recover attention with its scale, soft cap and grouped heads, and understand its masks as causal= and window=."""

    name: ClassVar[str] = "raise_attention"
    rules: ClassVar[tuple[Rule, ...]] = (
        mask_after_scale, explicit_attention, attention_scale, grouped_heads, single_key_head, attention_mask, double_transpose,
        transpose_that_moves_nothing,
    )  # fmt: skip
