"""Lowerings of ATen reductions, products, convolutions, normalisations and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from stemma.frontend.aten import (
    Call,
    Number,
    Unsupported,
    axes,
    axis,
    constant,
    filled,
    lower,
    mean_scale,
    part,
    reshape,
    to,
    transpose,
)  # fmt: skip
from stemma.frontend.aten_elementwise import absolute
from stemma.ir import Node, SizeLike, ops, size

Dims = int | Sequence[int] | None


def _reduce(op: Any, x: Node, over: Sequence[int], keepdim: bool) -> Node:
    return op(x, axes=tuple(over), keepdims=keepdim) if over else x


@lower("aten.sum.dim_IntList", "aten.sum.default")
def sum(call: Call, x: Node, dim: Dims = None, keepdim: bool = False, **_: Any) -> Node:
    return _reduce(ops.reduce_sum, to(x, call.dtype), axes(dim, x.tensor.rank), keepdim)


@lower("aten.mean.dim", "aten.mean.default")
def mean(call: Call, x: Node, dim: Dims = None, keepdim: bool = False, **_: Any) -> Node:
    x, over = to(x, call.dtype), axes(dim, x.tensor.rank)
    return _reduce(ops.reduce_sum, x, over, keepdim) * mean_scale(x, over)


def _variance(call: Call, x: Node, dim: Dims, correction: Number | None, keepdim: bool) -> tuple[Node, Node]:
    over = axes(dim, x.tensor.rank)
    count = size.product([x.shape[i] for i in over])
    if not isinstance(count, int):
        raise Unsupported("a variance over an axis of symbolic size")
    average = _reduce(ops.reduce_sum, x, over, True) * (1.0 / count)
    centred = x - average
    degrees = max(0.0, count - (1 if correction is None else correction))
    if degrees == 0:
        raise Unsupported("a variance of too few elements for its correction")
    variance = _reduce(ops.reduce_sum, centred * centred, over, keepdim) * (1.0 / degrees)
    return variance, average if keepdim else reshape(average, variance.shape)


@lower("aten.var.correction", "aten.var.dim")
def var(call: Call, x: Node, dim: Dims = None, unbiased: bool = True, keepdim: bool = False, **named: Any) -> Node:
    return _variance(call, x, dim, named.get("correction", int(unbiased)), keepdim)[0]


@lower("aten.std.correction", "aten.std.dim")
def std(call: Call, x: Node, dim: Dims = None, unbiased: bool = True, keepdim: bool = False, **named: Any) -> Node:
    return ops.sqrt(var(call, x, dim, unbiased, keepdim, **named))


@lower("aten.var_mean.correction")
def var_mean(call: Call, x: Node, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False) -> list[Node]:
    return list(_variance(call, x, dim, correction, keepdim))


def _extreme(name: str, op: Any, flip: bool) -> None:
    @lower(f"aten.a{name}.default", f"aten.{name}.default")
    def over_axes(call: Call, x: Node, dim: Dims = None, keepdim: bool = False) -> Node:
        return _reduce(op, x, axes(dim, x.tensor.rank), keepdim)

    def position(x: Node, dim: int | None, keepdim: bool) -> Node:
        if dim is None:
            x, dim = reshape(x, (x.tensor.elements,)), 0
        return ops.argmax(-x if flip else x, axis=axis(dim, x.tensor.rank), keepdims=keepdim)

    @lower(f"aten.{name}.dim")
    def values_and_positions(call: Call, x: Node, dim: int, keepdim: bool = False) -> list[Node]:
        return [_reduce(op, x, axes(dim, x.tensor.rank), keepdim), position(x, dim, keepdim)]

    @lower(f"aten.arg{name}.default")
    def positions(call: Call, x: Node, dim: int | None = None, keepdim: bool = False) -> Node:
        return position(x, dim, keepdim)


_extreme("max", ops.reduce_max, flip=False)
_extreme("min", ops.reduce_min, flip=True)


@lower("aten.topk.default")
def topk(call: Call, x: Node, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Node]:
    """The k largest in order, one maximum after the other: for the few experts of a router, not for long lists."""
    dim = axis(dim, x.tensor.rank)
    if not isinstance(k, int) or not 1 <= k <= 16 or not x.tensor.is_float:
        raise Unsupported("topk is lowered for 1 to 16 floats only")
    rest, values, positions = x if largest else -x, [], []
    index = reshape(ops.iota(size=x.shape[dim]), [s if i == dim else 1 for i, s in enumerate(x.shape)])
    for _ in range(k):
        positions.append(ops.argmax(rest, axis=dim, keepdims=True))
        values.append(ops.reduce_max(rest, axes=(dim,), keepdims=True))
        rest = ops.where(ops.eq(index, positions[-1]), constant(-math.inf, x.dtype), rest)
    found = values[0] if k == 1 else ops.concat(*values, axis=dim)
    return [found if largest else -found, positions[0] if k == 1 else ops.concat(*positions, axis=dim)]


def _quantifier(name: str, op: Any) -> None:
    @lower(f"aten.{name}.default", f"aten.{name}.dim", f"aten.{name}.dims")
    def function(call: Call, x: Node, dim: Dims = None, keepdim: bool = False) -> Node:
        return _reduce(op, to(x, "bool"), axes(dim, x.tensor.rank), keepdim)


_quantifier("any", ops.reduce_max)
_quantifier("all", ops.reduce_min)


@lower("aten.linalg_vector_norm.default")
def vector_norm(call: Call, x: Node, ord: Number = 2, dim: Dims = None, keepdim: bool = False, **_: Any) -> Node:
    x, over = to(x, call.dtype), axes(dim, x.tensor.rank)
    if ord == 2:
        return ops.sqrt(_reduce(ops.reduce_sum, x * x, over, keepdim))
    if ord == 1:
        return _reduce(ops.reduce_sum, ops.abs(x), over, keepdim)
    if ord == math.inf:
        return _reduce(ops.reduce_max, absolute(call, x), over, keepdim)
    raise Unsupported(f"a vector norm of the order {ord}; 1, 2 and infinity are lowered")


@lower("aten.cumsum.default")
def cumsum(call: Call, x: Node, dim: int, **_: Any) -> Node:
    return ops.cumsum(to(x, call.dtype), axis=axis(dim, x.tensor.rank)) if x.tensor.rank else to(x, call.dtype)


@lower("aten.softmax.int", "aten._softmax.default")
def softmax(call: Call, x: Node, dim: int, *_: Any, **__: Any) -> Node:
    return ops.softmax(to(x, call.dtype), axis=axis(dim, x.tensor.rank))


@lower("aten.log_softmax.int", "aten._log_softmax.default")
def log_softmax(call: Call, x: Node, dim: int, *_: Any, **__: Any) -> Node:
    x, over = to(x, call.dtype), (axis(dim, x.tensor.rank),)
    shifted = x - ops.reduce_max(x, axes=over, keepdims=True)
    return shifted - ops.log(ops.reduce_sum(ops.exp(shifted), axes=over, keepdims=True))


@lower("aten.embedding.default")
def embedding(call: Call, weight: Node, ids: Node, *_: Any) -> Node:
    return ops.embedding(weight, ids)


@lower("aten.linear.default")
def linear(call: Call, x: Node, weight: Node, bias: Node | None = None) -> Node:
    if weight.tensor.rank == 1:
        raise Unsupported("a linear with a one-dimensional weight")
    rows = reshape(x, (1, x.shape[0])) if x.tensor.rank == 1 else x
    return reshape(ops.linear(rows, weight, bias), call.out.shape)


@lower("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default")
def matmul(call: Call, a: Node, b: Node) -> Node:
    if a.tensor.rank == 1:
        a = reshape(a, (1, *a.shape))
    if b.tensor.rank == 1:
        b = reshape(b, (*b.shape, 1))
    return reshape(ops.matmul(a, b), call.out.shape)


@lower("aten.addmm.default")
def addmm(call: Call, bias: Node, a: Node, b: Node, *, beta: Number = 1, alpha: Number = 1) -> Node:
    if alpha == beta == 1 and bias.shape == b.shape[1:]:
        return ops.linear(a, transpose(b, (1, 0)), bias)
    return baddbmm(call, bias, a, b, beta=beta, alpha=alpha)


@lower("aten.baddbmm.default")
def baddbmm(call: Call, bias: Node, a: Node, b: Node, *, beta: Number = 1, alpha: Number = 1) -> Node:
    product = ops.matmul(a, b) if alpha == 1 else ops.matmul(a, b) * float(alpha)
    if beta == 0:
        return product
    return (bias if beta == 1 else bias * float(beta)) + product


def _spread(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * count if len(values) == 1 else values)


@lower("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def conv(
    call: Call, x: Node, weight: Node, bias: Node | None = None, stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1,
) -> Node:  # fmt: skip
    space = weight.tensor.rank - 2
    batched = x if x.tensor.rank == weight.tensor.rank else reshape(x, (1, *x.shape))
    result = ops.conv(
        batched, weight, bias, stride=_spread(stride, space), padding=_spread(padding, space),
        dilation=_spread(dilation, space), groups=groups,
    )  # fmt: skip
    return reshape(result, call.out.shape)


@lower("aten.convolution.default")
def convolution(
    call: Call, x: Node, weight: Node, bias: Node | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Node:  # fmt: skip
    if transposed:
        raise Unsupported("a transposed convolution")
    return conv(call, x, weight, bias, stride, padding, dilation, groups)


def _per_channel(x: Node, rank: int) -> Node:
    return reshape(x, (x.shape[0], *[1] * (rank - 2)))


@lower("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(
    call: Call, x: Node, weight: Node | None, bias: Node | None, mean: Node | None, variance: Node | None, *rest: Any
) -> Any:
    training, (_, eps) = (rest[0], rest[1:3]) if call.name == "aten.batch_norm.default" else (False, rest[:2])
    if training or mean is None or variance is None:
        raise Unsupported("batch normalisation over the statistics of the batch; call module.eval() first")
    scale = ops.rsqrt(variance + float(eps))
    scale = scale if weight is None else scale * weight
    shift = -(mean * scale) if bias is None else bias - mean * scale
    y = x * _per_channel(scale, x.tensor.rank) + _per_channel(shift, x.tensor.rank)
    return y if call.name == "aten.batch_norm.default" else [y, *_unused(call)]


def _unused(call: Call) -> list[Node]:
    """Zeros for the results after the first: statistics, which only training reads."""
    return [filled(0, result) for result in call.results[1:]]


def _norm_inputs(x: Node, shape: Ints, *parameters: Node | None) -> tuple[Node, list[Node | None]]:
    """Several normalised axes flattened into one, as the IR's norms take it."""
    flat = size.product(shape)
    return reshape(x, (*x.shape[: x.tensor.rank - len(shape)], flat)), [p and reshape(p, (flat,)) for p in parameters]


Ints = Sequence[SizeLike]


@lower("aten.layer_norm.default", "aten.native_layer_norm.default")
def layer_norm(
    call: Call, x: Node, shape: Ints, weight: Node | None = None, bias: Node | None = None, eps: float = 1e-5, *_: Any
) -> Any:
    rows, (scale, shift) = _norm_inputs(x, shape, weight, bias)
    if scale is None and shift is not None:
        y = reshape(ops.layer_norm(rows, eps=eps) + shift, x.shape)
    else:
        y = reshape(ops.layer_norm(rows, scale, shift, eps=eps), x.shape)
    return y if call.name == "aten.layer_norm.default" else [y, *_unused(call)]


@lower("aten.rms_norm.default")
def rms_norm(call: Call, x: Node, shape: Ints, weight: Node | None = None, eps: float | None = None) -> Node:
    rows, (scale,) = _norm_inputs(x, shape, weight)
    return reshape(ops.rms_norm(rows, scale, eps=torch.finfo(torch.float32).eps if eps is None else eps), x.shape)


@lower("aten.group_norm.default")
def group_norm(
    call: Call, x: Node, groups: int, weight: Node | None = None, bias: Node | None = None, eps: float = 1e-5, *_: Any
) -> Node:
    batch, channels, *space = x.shape
    width = size.floordiv(channels * size.product(space), groups)
    y = reshape(ops.layer_norm(reshape(x, (batch, groups, width)), eps=eps), x.shape)
    y = y if weight is None else y * _per_channel(weight, x.tensor.rank)
    return y if bias is None else y + _per_channel(bias, x.tensor.rank)


@lower("aten.scaled_dot_product_attention.default")
def attention(
    call: Call, q: Node, k: Node, v: Node, mask: Node | None = None, dropout: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Node:  # fmt: skip
    if dropout > 0:
        raise Unsupported("attention with dropout; call module.eval() first")
    if scale is None:
        if not isinstance(q.shape[-1], int):
            raise Unsupported("attention with a head size that is symbolic")
        scale = 1 / math.sqrt(q.shape[-1])
    if q.tensor.rank < 4:  # [T, D] or [B, T, D]: one head
        if mask is not None and mask.tensor.rank == 3:
            mask = reshape(mask, (mask.shape[0], 1, *mask.shape[1:]))
        q, k, v = (reshape(x, (*([1] if x.tensor.rank == 2 else x.shape[:1]), 1, *x.shape[-2:])) for x in (q, k, v))
    if q.tensor.rank > 4 or k.shape[0] != q.shape[0]:
        raise Unsupported("attention over more than one batch axis, or with a broadcast batch")
    if mask is not None and mask.tensor.rank < 4:
        mask = reshape(mask, (*[1] * (4 - mask.tensor.rank), *mask.shape))
    if is_causal and q.shape[2] != k.shape[2]:
        # ATen aligns the triangle with the first key, the IR with the last.
        row, column = ops.iota(size=q.shape[2]), ops.iota(size=k.shape[2])
        triangle = ops.le(column, reshape(row, (q.shape[2], 1)))
        mask, is_causal = reshape(triangle, (1, 1, q.shape[2], k.shape[2])), False
    y = ops.attention(q, k, v, mask, causal=is_causal, scale=float(scale))
    return reshape(y, call.out.shape)


def _windows(x: Node, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], out: Sequence[SizeLike]) -> list[Node]:
    """For each offset inside the kernel, the elements that all windows have there."""
    parts = [x]
    for i, (k, s, d, n) in enumerate(zip(kernel, stride, dilation, out, strict=True)):
        dim = x.tensor.rank - len(kernel) + i
        parts = [part(p, dim, j * d, n, s) for p in parts for j in range(k)]
    return parts


def _padded(x: Node, padding: Sequence[int], value: float) -> Node:
    amounts = (0,) * (x.tensor.rank - len(padding)) + tuple(padding)
    return ops.pad(x, low=amounts, high=amounts, value=value) if any(padding) else x


def _pool_setting(kernel: Any, stride: Any, padding: Any, ceil: bool, space: int) -> list[tuple[int, ...]]:
    if ceil:
        raise Unsupported("pooling with ceil_mode")
    kernel = _spread(kernel, space)
    return [kernel, _spread(stride, space) if stride else kernel, _spread(padding, space)]


def _max_pool(space: int) -> None:
    @lower(f"aten.max_pool{space}d.default")
    def max_pool(
        call: Call, x: Node, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Node:
        sizes, steps, pads = _pool_setting(kernel, stride, padding, ceil_mode, space)
        y, *others = _windows(
            _padded(x, pads, -math.inf), sizes, steps, _spread(dilation, space), call.out.shape[-space:]
        )  # fmt: skip
        for other in others:
            y = ops.maximum(y, other)
        return y


def _avg_pool(space: int) -> None:
    @lower(f"aten.avg_pool{space}d.default")
    def avg_pool(
        call: Call, x: Node, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Node:  # fmt: skip
        sizes, steps, pads = _pool_setting(kernel, stride, padding, ceil_mode, space)
        if any(pads) and not count_include_pad:
            raise Unsupported("average pooling that leaves its padding out of the count")
        y, *others = _windows(_padded(x, pads, 0.0), sizes, steps, (1,) * space, call.out.shape[-space:])
        for other in others:
            y = y + other
        return y * (1.0 / (divisor_override or math.prod(sizes)))

    @lower(f"aten.adaptive_avg_pool{space}d.default", *([f"aten._adaptive_avg_pool{space}d.default"] if space > 1 else []))
    def adaptive_avg_pool(call: Call, x: Node, target: Any) -> Node:
        lead, apart, over = x.shape[: x.tensor.rank - space], [], []
        for extent, n in zip(x.shape[-space:], call.out.shape[-space:], strict=True):
            if not (isinstance(extent, int) and isinstance(n, int)) or extent % n:
                raise Unsupported(f"adaptive pooling of {extent} elements to {n}: only whole windows are lowered")
            apart += [n, extent // n]
            over.append(len(lead) + len(apart) - 1)
        grouped = reshape(x, (*lead, *apart))
        return ops.reduce_sum(grouped, axes=tuple(over)) * mean_scale(grouped, over)


for _space in (1, 2, 3):
    _max_pool(_space)
    _avg_pool(_space)


@lower("aten.glu.default")
def glu(call: Call, x: Node, dim: int = -1) -> Node:
    dim = axis(dim, x.tensor.rank)
    half = size.floordiv(x.shape[dim], 2)
    return part(x, dim, 0, half) * ops.sigmoid(part(x, dim, half, half))


@lower("aten.cosine_similarity.default")
def cosine_similarity(call: Call, a: Node, b: Node, dim: int = 1, eps: float = 1e-8) -> Node:
    over = (axis(dim, a.tensor.rank),)
    dot = ops.reduce_sum(a * b, axes=over)
    lengths = [ops.sqrt(ops.reduce_sum(x * x, axes=over)) for x in (a, b)]
    floor = constant(eps, a.dtype)
    return dot / (ops.maximum(lengths[0], floor) * ops.maximum(lengths[1], floor))
