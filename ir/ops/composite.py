"""Composites: operations with a name of their own in models, each with a decomposition into primitives."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import dtype
from stemma.ir.node import INF, Node, Op
from stemma.ir.ops.core import cast, constant, iota, size_value
from stemma.ir.ops.elementwise import (
    add,
    broadcast,
    div,
    erf,
    exp,
    gt,
    le,
    logical_and,
    mul,
    neg,
    rsqrt,
    sigmoid,
    sub,
    tanh,
    where,
)  # fmt: skip
from stemma.ir.ops.linear import dequantize, matmul, plain
from stemma.ir.ops.reduce import reduce_max, reduce_sum
from stemma.ir.ops.shape import broadcast_to, concat, reshape, slice, take, transpose
from stemma.ir.size import SizeLike
from stemma.ir.types import Tensor, Type

ELEMENTWISE = frozenset({"elementwise"})


def _float(x: Tensor) -> Tensor:
    if not x.is_float:
        raise TypeMismatch("needs float elements")
    return x


def _inverse_extent(x: Node, axis: int) -> Node:
    """A scalar 1/n for the mean along an axis of constant size."""
    extent = x.shape[axis]
    if not isinstance(extent, int):
        raise TypeMismatch(f"the normalised axis has the symbolic size {extent}")
    return constant(value=1.0 / extent, dtype=x.dtype)


class Silu(Op):
    """silu(x) = x * sigmoid(x) (Elfwing et al. 2017), also called swish."""

    name = "silu"
    tags = ELEMENTWISE

    def infer(self, x: Tensor) -> Type:
        return _float(x)

    def evaluate(self, ctx: Any, x: Any) -> Any:
        with np.errstate(over="ignore"):
            return x / (1 + np.exp(-x))

    def decompose(self, x: Node) -> Node:
        return mul(x, sigmoid(x))


class Gelu(Op):
    """gelu(x) = x * Phi(x) (Hendrycks and Gimpel 2016); `approximate` is "none", "tanh" or "sigmoid" (x * sigmoid(1.702 x))."""

    name = "gelu"
    tags = ELEMENTWISE

    def infer(self, x: Tensor, *, approximate: str = "none") -> Type:
        if approximate not in ("none", "tanh", "sigmoid"):
            raise TypeMismatch(f"{approximate!r} is no gelu variant")
        return _float(x)

    def evaluate(self, ctx: Any, x: Any, *, approximate: str) -> Any:
        if approximate == "none":
            return 0.5 * x * (1 + erf.evaluate(ctx, x * np.sqrt(0.5)))
        if approximate == "tanh":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))
        return x / (1 + np.exp(-1.702 * x))

    def decompose(self, x: Node, *, approximate: str) -> Node:
        if approximate == "none":
            return x * 0.5 * (erf(x * float(np.sqrt(0.5))) + 1.0)
        if approximate == "tanh":
            return x * 0.5 * (tanh((x + x * x * x * 0.044715) * float(np.sqrt(2 / np.pi))) + 1.0)
        return x * sigmoid(x * 1.702)


class Gated(Op):
    """`gated(gate, up, activation=)`: activation(gate) * up, the inner part of a gated MLP (Shazeer 2020).

    `activation` is "silu", "gelu" or "gelu_tanh".
    """

    name = "gated"
    tags = ELEMENTWISE

    def infer(self, gate: Tensor, up: Tensor, *, activation: str) -> Type:
        if activation not in ("silu", "gelu", "gelu_tanh"):
            raise TypeMismatch(f"{activation!r} is no gated activation")
        if gate != up:
            raise TypeMismatch("gate and up must have one type")
        return _float(gate)

    def evaluate(self, ctx: Any, gate: Any, up: Any, *, activation: str) -> Any:
        if activation == "silu":
            return silu.evaluate(ctx, gate) * up
        return gelu.evaluate(ctx, gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up

    def decompose(self, gate: Node, up: Node, *, activation: str) -> Node:
        if activation == "silu":
            return mul(silu(gate), up)
        return mul(gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none"), up)


class Softmax(Op):
    """`softmax(x, axis=)`: exp(x - max) / sum, stable."""

    name = "softmax"

    def infer(self, x: Tensor, *, axis: int) -> Type:
        if not 0 <= axis < x.rank:
            raise TypeMismatch(f"axis {axis} is outside 0..{x.rank - 1}")
        return _float(x)

    def evaluate(self, ctx: Any, x: Any, *, axis: int) -> Any:
        e = np.exp(x - np.max(x, axis=axis, keepdims=True))
        return e / np.sum(e, axis=axis, keepdims=True)

    def decompose(self, x: Node, *, axis: int) -> Node:
        e = exp(sub(x, reduce_max(x, axes=(axis,), keepdims=True)))
        return div(e, reduce_sum(e, axes=(axis,), keepdims=True))

    def flops(self, type: Type, x: Tensor, **_: Any) -> SizeLike:
        return x.elements * 4


class RmsNorm(Op):
    """`rms_norm(x, weight=None, eps=)`: x / sqrt(mean(x**2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""

    name = "rms_norm"

    def infer(self, x: Tensor, weight: Tensor | None = None, *, eps: float) -> Type:
        if weight is not None and weight != Tensor(x.dtype, x.shape[-1:]):
            raise TypeMismatch(f"the weight must be {Tensor(x.dtype, x.shape[-1:])!r}")
        return _float(x)

    def evaluate(self, ctx: Any, x: Any, weight: Any = None, *, eps: float) -> Any:
        y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        return y if weight is None else y * weight

    def decompose(self, x: Node, weight: Node | None = None, *, eps: float) -> Node:
        last = x.tensor.rank - 1
        mean = mul(reduce_sum(mul(x, x), axes=(last,), keepdims=True), _inverse_extent(x, last))
        y = mul(x, rsqrt(mean + eps))
        return y if weight is None else mul(y, weight)

    def flops(self, type: Type, x: Tensor, weight: Tensor | None = None, **_: Any) -> SizeLike:
        return x.elements * 4


class LayerNorm(Op):
    """`layer_norm(x, weight=None, bias=None, eps=)` over the last axis (Ba et al. 2016); biased variance."""

    name = "layer_norm"

    def infer(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float) -> Type:
        for v in (weight, bias):
            if v is not None and v != Tensor(x.dtype, x.shape[-1:]):
                raise TypeMismatch(f"weight and bias must be {Tensor(x.dtype, x.shape[-1:])!r}")
        return _float(x)

    def evaluate(self, ctx: Any, x: Any, weight: Any = None, bias: Any = None, *, eps: float) -> Any:
        centred = x - np.mean(x, axis=-1, keepdims=True)
        y = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def decompose(self, x: Node, weight: Node | None = None, bias: Node | None = None, *, eps: float) -> Node:
        last = x.tensor.rank - 1
        scale = _inverse_extent(x, last)
        centred = sub(x, mul(reduce_sum(x, axes=(last,), keepdims=True), scale))
        variance = mul(reduce_sum(mul(centred, centred), axes=(last,), keepdims=True), scale)
        y = mul(centred, rsqrt(variance + eps))
        y = y if weight is None else mul(y, weight)
        return y if bias is None else add(y, bias)

    def flops(self, type: Type, x: Tensor, *_: Any, **__: Any) -> SizeLike:
        return x.elements * 6


class Rope(Op):
    """`rope(x, cos, sin)`: rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face models.

    x [.., D]; cos and sin [.., D] broadcast to x: x * cos + concat(-x[D/2:], x[:D/2]) * sin.
    """

    name = "rope"

    def infer(self, x: Tensor, cos: Tensor, sin: Tensor) -> Type:
        last = x.shape[-1]
        if not isinstance(last, int) or last % 2 or cos.shape[-1] != last or cos != sin:
            raise TypeMismatch("needs an even last axis, and cos and sin of one type with the same last axis")
        if broadcast(x.shape, cos.shape) != x.shape or cos.dtype != x.dtype:
            raise TypeMismatch("cos and sin do not broadcast to x")
        return _float(x)

    def evaluate(self, ctx: Any, x: Any, cos: Any, sin: Any) -> Any:
        half = x.shape[-1] // 2
        return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin

    def decompose(self, x: Node, cos: Node, sin: Node) -> Node:
        last, half = x.tensor.rank - 1, x.shape[-1] // 2
        low, high = (slice(x, axis=last, start=a, stop=a + half) for a in (0, half))
        return add(mul(x, cos), mul(concat(neg(high), low, axis=last), sin))

    def flops(self, type: Type, x: Tensor, *_: Any) -> SizeLike:
        return x.elements * 3


def _check_attention(q: Tensor, heads: SizeLike, kv_heads: SizeLike, window: int | None) -> None:
    if not (isinstance(heads, int) and isinstance(kv_heads, int)) or heads % kv_heads:
        raise TypeMismatch(f"{heads} query heads do not share {kv_heads} key-value heads evenly")
    if window is not None and window < 1:
        raise TypeMismatch(f"a window of {window} positions is empty")
    _float(q)


class Attention(Op):
    """`attention(q, k, v, mask=None, causal=, window=None, scale=, softcap=None)`: softmax(scale * q k^T) v.

    q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H is a multiple of Hk (grouped heads, Ainslie et al. 2023).
    causal: row t sees keys s <= t + S - T; window w: also s > t + S - T - w (0 or more keys before, the row itself included);
    not causal with a window: |s - t| < w. softcap c: scores become c * tanh(scores / c) (Gemma 2). mask: bool (True: visible) or
    additive float, broadcast to [B, H, T, S], applied after the cap.
    """

    name = "attention"

    def infer(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool, window: int | None = None,
        scale: float, softcap: float | None = None,
    ) -> Type:  # fmt: skip
        if not q.rank == k.rank == v.rank == 4 or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
            raise TypeMismatch("needs q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv]")
        if q.shape[0] != k.shape[0]:
            raise TypeMismatch("the batch sizes differ")
        _check_attention(q, q.shape[1], k.shape[1], window)
        scores = (*q.shape[:3], k.shape[2])
        if mask is not None and (mask.rank != 4 or broadcast(mask.shape, scores) != scores):
            raise TypeMismatch(f"the mask {mask.shape} does not broadcast to {scores}")
        if mask is not None and mask.dtype not in ("bool", q.dtype):
            raise TypeMismatch("the mask must be bool or of the type of q")
        return Tensor(q.dtype, (*q.shape[:3], v.shape[3]))

    def evaluate(
        self, ctx: Any, q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool, window: int | None, scale: float,
        softcap: float | None,
    ) -> Any:  # fmt: skip
        group = q.shape[1] // k.shape[1]
        k, v = (np.repeat(x, group, axis=1) for x in (k, v))
        scores = q @ np.swapaxes(k, 2, 3) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        t, s = q.shape[2], k.shape[2]
        distance = np.arange(t)[:, None] + (s - t) - np.arange(s)[None, :]
        visible = distance >= 0 if causal else np.ones_like(distance, bool)
        if window is not None:
            visible &= (distance < window) & (distance > -window)
        scores = np.where(visible, scores, -np.inf)
        if mask is not None:
            scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
        return softmax.evaluate(ctx, scores, axis=3) @ v

    def decompose(
        self, q: Node, k: Node, v: Node, mask: Node | None = None, *, causal: bool, window: int | None, scale: float,
        softcap: float | None,
    ) -> Node:  # fmt: skip
        batch, heads, t, _ = q.shape
        kv_heads, s = k.shape[1], k.shape[2]

        def repeat(x: Node) -> Node:
            if heads == kv_heads:
                return x
            b, h, length, width = x.shape
            group = heads // h
            grouped = broadcast_to(reshape(x, shape=(b, h, 1, length, width)), shape=(b, h, group, length, width))
            return reshape(grouped, shape=(b, heads, length, width))

        scores = matmul(q, transpose(repeat(k), axes=(0, 1, 3, 2))) * scale
        if softcap is not None:
            scores = tanh(scores * (1.0 / softcap)) * softcap
        row = reshape(iota(size=t), shape=(t, 1)) + constant(value=0, dtype="i64")
        offset = s - t
        if offset != 0:
            row = row + size_value(size=offset)
        distance = sub(row, reshape(iota(size=s), shape=(1, s)))
        zero = constant(value=0, dtype="i64")
        visible = le(zero, distance) if causal else None
        if window is not None:
            high, low = (constant(value=v, dtype="i64") for v in (window, -window))
            near = logical_and(gt(high, distance), gt(distance, low))
            visible = near if visible is None else logical_and(visible, near)
        hidden = constant(value=-INF, dtype=q.dtype)
        if visible is not None:
            scores = where(visible, scores, hidden)
        if mask is not None:
            scores = where(mask, scores, hidden) if mask.dtype == "bool" else add(scores, mask)
        return matmul(softmax(scores, axis=3), repeat(v))

    def flops(self, type: Type, q: Tensor, k: Tensor, v: Tensor, *_: Any, causal: bool, **__: Any) -> SizeLike:
        batch, heads, t, width = q.shape
        total = batch * heads * t * k.shape[2] * (width + v.shape[3]) * 2
        return total // 2 if causal else total


class CachedAttention(Op):
    """`cached_attention(q, k_cache, v_cache, table, sequence, positions, scale=, window=None, softcap=None)`.

    q [R, H, D], caches [Hk, slots, D] of any storage, table i32 [sequences, context], sequence and positions i32 [R] -> [R, H, Dv].
    Row r attends to the keys in slots table[sequence[r], j] for j in max(0, positions[r]-window+1) .. positions[r]: a paged cache
    (Kwon et al. 2023) with pages of one slot. A row's value does not depend on the other rows.
    """

    name = "cached_attention"

    def infer(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, sequence: Tensor, positions: Tensor, *,
        scale: float, window: int | None = None, softcap: float | None = None,
    ) -> Type:  # fmt: skip
        if not q.rank == k_cache.rank == v_cache.rank == 3 or q.shape[2] != k_cache.shape[2]:
            raise TypeMismatch("needs q [R, H, D] and caches [Hk, slots, D]")
        if k_cache.shape[:2] != v_cache.shape[:2] or table.rank != 2:
            raise TypeMismatch("the caches must have one shape, and the table two axes")
        if sequence != Tensor("i32", q.shape[:1]) or positions != sequence or table.dtype != "i32":
            raise TypeMismatch("sequence and positions must be i32 [R], the table i32")
        _check_attention(q, q.shape[1], k_cache.shape[0], window)
        return Tensor(q.dtype, (*q.shape[:2], v_cache.shape[2]))

    def evaluate(
        self, ctx: Any, q: Any, k_cache: Any, v_cache: Any, table: Any, sequence: Any, positions: Any, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Any:  # fmt: skip
        group = q.shape[1] // k_cache.shape[0]
        result = np.zeros((*q.shape[:2], v_cache.shape[2]), ctx.float)
        for r in range(len(q)):
            last = int(positions[r])
            first = 0 if window is None else max(0, last - window + 1)
            slots = table[int(sequence[r]), first : last + 1]
            k, v = (np.repeat(plain(c[:, slots]).astype(ctx.float), group, axis=0) for c in (k_cache, v_cache))
            scores = np.einsum("hd,hsd->hs", q[r], k) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            result[r] = np.einsum("hs,hsd->hd", softmax.evaluate(ctx, scores, axis=1), v)
        return result

    def decompose(
        self, q: Node, k_cache: Node, v_cache: Node, table: Node, sequence: Node, positions: Node, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Node:  # fmt: skip
        rows, heads, width = q.shape
        kv_heads, context = k_cache.shape[0], table.shape[1]
        slots = take(table, sequence, axis=0)  # [R, context]

        def gather(cache: Node) -> Node:  # [R, H, context, D]
            wide = dequantize(cache) if dtype(cache.dtype).kind == "quantized" else cast(cache, dtype=q.dtype)
            picked = transpose(take(wide, slots, axis=1), axes=(1, 0, 2, 3))
            last = picked.shape[3]
            grouped = broadcast_to(
                reshape(picked, shape=(rows, kv_heads, 1, context, last)),
                shape=(rows, kv_heads, heads // kv_heads, context, last),
            )
            return reshape(grouped, shape=(rows, heads, context, last))

        scores = matmul(reshape(q, shape=(rows, heads, 1, width)), transpose(gather(k_cache), axes=(0, 1, 3, 2))) * scale
        if softcap is not None:
            scores = tanh(scores * (1.0 / softcap)) * softcap
        column = iota(size=context, dtype="i32")
        row = reshape(positions, shape=(rows, 1, 1, 1))
        visible = le(column, row)
        if window is not None:
            visible = logical_and(visible, gt(column, sub(row, constant(value=window, dtype="i32"))))
        scores = where(visible, scores, constant(value=-INF, dtype=q.dtype))
        values = where(reshape(visible, shape=(rows, 1, context, 1)), gather(v_cache), constant(value=0.0, dtype=q.dtype))
        return reshape(matmul(softmax(scores, axis=3), values), shape=(rows, heads, v_cache.shape[2]))

    def flops(self, type: Type, q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, *_: Any, **__: Any) -> SizeLike:
        rows, heads, width = q.shape
        return rows * heads * table.shape[1] * (width + v_cache.shape[2]) * 2


silu, gelu, gated, softmax = Silu(), Gelu(), Gated(), Softmax()
rms_norm, layer_norm, rope = RmsNorm(), LayerNorm(), Rope()
attention, cached_attention = Attention(), CachedAttention()
