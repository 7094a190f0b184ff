"""Lowerings of ATen operators that create tensors and move elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stemma.frontend.aten import (
    Call,
    Number,
    Unsupported,
    Value,
    axes,
    axis,
    broadcast,
    clamp_bound,
    constant,
    filled,
    lower,
    node,
    part,
    reshape,
    to,
    transpose,
)  # fmt: skip
from stemma.ir import Node, SizeLike, ops, size
from stemma.ir.formats import dtype

Ints = Sequence[SizeLike]


@lower(
    "aten.contiguous.default", "aten.clone.default", "aten.detach.default", "aten.detach_.default", "aten.alias.default",
    "aten.lift_fresh_copy.default", "aten.lift_fresh.default", "aten.to.device", "aten.to.dtype", "aten.to.dtype_layout",
    "aten.to.other", "aten._to_copy.default", "aten.type_as.default", "aten.resolve_conj.default", "aten.positive.default",
)  # fmt: skip
def copy(call: Call, x: Node, *_: Any, **__: Any) -> Node:
    return to(x, call.dtype)


@lower("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
def dropout(call: Call, x: Node, p: float, train: bool) -> Node:
    if train and p > 0:
        raise Unsupported("dropout in training mode; call module.eval() first")
    return x


@lower(
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints", "aten.unsqueeze.default",
    "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unflatten.int", "aten.view_as.default",
    "aten.reshape_as.default",
)  # fmt: skip
def view(call: Call, x: Node, *_: Any) -> Node:
    return reshape(x, call.out.shape)


@lower("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(call: Call, x: Node, *_: Any, **__: Any) -> Node:
    return broadcast(x, call.out.shape)


@lower("aten.transpose.int", "aten.swapaxes.default")
def swap(call: Call, x: Node, a: int, b: int) -> Node:
    order = list(range(x.tensor.rank))
    a, b = axis(a, len(order)), axis(b, len(order))
    order[a], order[b] = order[b], order[a]
    return transpose(x, order)


@lower("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def t(call: Call, x: Node) -> Node:
    return x if x.tensor.rank < 2 else swap(call, x, -2, -1)


@lower("aten.permute.default")
def permute(call: Call, x: Node, order: Sequence[int]) -> Node:
    return transpose(x, axes(order, x.tensor.rank))


@lower("aten.movedim.int")
def movedim(call: Call, x: Node, source: int, target: int) -> Node:
    order = [i for i in range(x.tensor.rank) if i != axis(source, x.tensor.rank)]
    order.insert(axis(target, x.tensor.rank), axis(source, x.tensor.rank))
    return transpose(x, order)


@lower("aten.slice.Tensor")
def slice(call: Call, x: Node, dim: int = 0, start: SizeLike | None = None, end: SizeLike | None = None, step: int = 1) -> Node:
    dim = axis(dim, x.tensor.rank)
    return part(x, dim, clamp_bound(start, x.shape[dim], 0), call.out.shape[dim], step)


@lower("aten.narrow.default")
def narrow(call: Call, x: Node, dim: int, start: SizeLike, length: SizeLike) -> Node:
    return slice(call, x, dim, start)


@lower("aten.select.int")
def select(call: Call, x: Node, dim: int, index: SizeLike) -> Node:
    dim = axis(dim, x.tensor.rank)
    return reshape(part(x, dim, clamp_bound(index, x.shape[dim], 0), 1), call.out.shape)


def _split(call: Call, x: Node, dim: int) -> list[Node]:
    parts, start = [], size.floordiv(0, 1)
    for result in call.results:
        parts.append(part(x, dim, start, result.shape[dim]))
        start = start + result.shape[dim]
    return parts


@lower("aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes", "aten.chunk.default")
def split(call: Call, x: Node, sizes: object, dim: int = 0) -> list[Node]:
    return _split(call, x, axis(dim, x.tensor.rank))


@lower("aten.unbind.int")
def unbind(call: Call, x: Node, dim: int = 0) -> list[Node]:
    dim = axis(dim, x.tensor.rank)
    return [reshape(part(x, dim, i, 1), r.shape) for i, r in enumerate(call.results)]


@lower("aten.cat.default", "aten.concat.default")
def cat(call: Call, tensors: Sequence[Node], dim: int = 0) -> Node:
    dim = axis(dim, call.out.rank)
    # ATen skips empty one-dimensional tensors whatever the rank of the others.
    kept = [to(x, call.dtype) for x in tensors if x.shape != (0,)]
    kept = [x for x in kept if x.shape[dim] != 0] or kept[:1]
    return kept[0] if len(kept) == 1 else ops.concat(*kept, axis=dim)


@lower("aten.stack.default")
def stack(call: Call, tensors: Sequence[Node], dim: int = 0) -> Node:
    dim = axis(dim, call.out.rank)
    shape = [1 if i == dim else s for i, s in enumerate(call.out.shape)]
    return cat(call, [reshape(x, shape) for x in tensors], dim)


@lower("aten.repeat.default", "aten.tile.default")
def repeat(call: Call, x: Node, repeats: Ints) -> Node:
    rank = call.out.rank
    repeats = [1] * (rank - len(repeats)) + list(repeats)
    shape = [1] * (rank - x.tensor.rank) + list(x.shape)
    apart = [s for pair in zip([1] * rank, shape, strict=True) for s in pair]
    wide = [s for pair in zip(repeats, shape, strict=True) for s in pair]
    return reshape(broadcast(reshape(x, apart), wide), call.out.shape)


@lower("aten.repeat_interleave.self_int")
def repeat_interleave(call: Call, x: Node, repeats: SizeLike, dim: int | None = None, **_: Any) -> Node:
    if dim is None:
        x, dim = reshape(x, (x.tensor.elements,)), 0
    dim = axis(dim, x.tensor.rank)
    apart = (*x.shape[: dim + 1], 1, *x.shape[dim + 1 :])
    wide = (*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :])
    return reshape(broadcast(reshape(x, apart), wide), call.out.shape)


@lower("aten.flip.default")
def flip(call: Call, x: Node, dims: Sequence[int]) -> Node:
    for dim in axes(dims, x.tensor.rank):
        last = ops.size_value(size=x.shape[dim] - 1)
        x = ops.take(x, last - ops.iota(size=x.shape[dim]), axis=dim)
    return x


@lower("aten.roll.default")
def roll(call: Call, x: Node, shifts: Ints, dims: Sequence[int] = ()) -> Node:
    if not dims:
        return reshape(roll(call, reshape(x, (x.tensor.elements,)), shifts, [0]), x.shape)
    for dim, shift in zip(axes(dims, x.tensor.rank), shifts, strict=True):
        extent = x.shape[dim]
        if not (isinstance(extent, int) and isinstance(shift, int)):
            raise Unsupported("a roll along an axis of symbolic size")
        if extent and shift % extent:
            cut = extent - shift % extent
            x = ops.concat(part(x, dim, cut, extent - cut), part(x, dim, 0, cut), axis=dim)
    return x


@lower("aten.constant_pad_nd.default", "aten.pad.default")
def pad(call: Call, x: Node, amounts: Ints, *rest: Any, **named: Any) -> Node:
    mode = "constant"
    if call.name == "aten.pad.default" and rest:
        mode, *rest = rest  # type: ignore[assignment]
    value = rest[0] if rest else named.get("value", 0)
    if mode != "constant":
        raise Unsupported(f"padding of the mode {mode!r}")
    low, high = [0] * x.tensor.rank, [0] * x.tensor.rank
    for i in range(len(amounts) // 2):
        dim = x.tensor.rank - 1 - i
        for amount, side in ((amounts[2 * i], low), (amounts[2 * i + 1], high)):
            if not isinstance(amount, int):
                raise Unsupported("padding by a symbolic amount")
            if amount < 0:
                x = part(x, dim, -amount if side is low else 0, x.shape[dim] + amount)
            else:
                side[dim] = amount
    return ops.pad(x, low=tuple(low), high=tuple(high), value=value or 0) if any(low + high) else x


@lower("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(call: Call, *bounds: Value, **_: Any) -> Node:
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    x = to(ops.iota(size=call.out.shape[0]), call.dtype)
    x = x if step == 1 else x * node(step, call.dtype)
    return x if start == 0 else x + node(start, call.dtype)


@lower("aten.full.default", "aten.full_like.default", "aten.new_full.default")
def full(call: Call, like: object, *values: Value, **_: Any) -> Node:
    return filled(values[-1], call.out)


@lower("aten.fill.Scalar", "aten.fill.Tensor")
def fill(call: Call, x: Node, value: Value) -> Node:
    return filled(value, call.out)


def _constant(name: str, value: Number, overload: str = "default") -> None:
    @lower(f"aten.{name}.{overload}", f"aten.{name}_like.default", f"aten.new_{name}.default")
    def function(call: Call, *_: Any, **__: Any) -> Node:
        return filled(value, call.out)


_constant("zeros", 0)
_constant("ones", 1)
_constant("empty", 0, "memory_format")  # what the program then overwrites


@lower("aten.scalar_tensor.default")
def scalar_tensor(call: Call, value: Value, **_: Any) -> Node:
    return node(value, call.dtype)


@lower("aten.eye.default", "aten.eye.m")
def eye(call: Call, *_: Any, **__: Any) -> Node:
    rows, columns = call.out.shape
    return to(ops.eq(reshape(ops.iota(size=rows), (rows, 1)), ops.iota(size=columns)), call.dtype)


@lower("aten.one_hot.default")
def one_hot(call: Call, x: Node, classes: int = -1) -> Node:
    return to(ops.eq(reshape(x, (*x.shape, 1)), ops.iota(size=call.out.shape[-1], dtype=x.dtype)), "i64")


def _triangle(name: str, lower_part: bool) -> None:
    @lower(f"aten.{name}.default")
    def function(call: Call, x: Node, diagonal: SizeLike = 0) -> Node:
        rows, columns = x.shape[-2:]
        row = reshape(ops.iota(size=rows), (rows, 1))
        limit = row if diagonal == 0 else row + node(diagonal, "i64")
        column = ops.iota(size=columns)
        keep = ops.le(column, limit) if lower_part else ops.ge(column, limit)
        return ops.where(keep, x, constant(0, x.dtype))


_triangle("tril", True)
_triangle("triu", False)


def _never_negative(x: Node) -> bool:
    """Whether integers are known to be 0 or more, so that ATen's indexing from the end does not occur."""
    match x.op.name:
        case "iota" | "argmax":
            return True
        case "size_value":
            return size.bounds(x.attrs["size"])[0] >= 0
        case "constant":
            return bool(x.attrs["value"] >= 0)
        case "where":
            return all(map(_never_negative, x.inputs[1:]))
        case "reshape" | "broadcast_to" | "transpose" | "slice" | "concat" | "add" | "mul" | "cumsum" | "minimum" | "floordiv":
            return all(map(_never_negative, x.inputs))
        case "maximum":
            return any(map(_never_negative, x.inputs))
        case "cast":
            return dtype(x.inputs[0].dtype).kind == "bool" or _never_negative(x.inputs[0])
    return False


def _positive(indices: Node, extent: SizeLike) -> Node:
    """Indices counted from the front."""
    if _never_negative(indices):
        return indices
    wrapped = indices + node(extent, indices.dtype)
    return ops.where(ops.lt(indices, constant(0, indices.dtype)), wrapped, indices)


@lower("aten.index_select.default")
def index_select(call: Call, x: Node, dim: int, indices: Node) -> Node:
    return ops.take(x, indices, axis=axis(dim, x.tensor.rank))


@lower("aten.gather.default")
def gather(call: Call, x: Node, dim: int, indices: Node, **_: Any) -> Node:
    dim = axis(dim, x.tensor.rank)
    for i, extent in enumerate(indices.shape):
        x = x if i == dim else part(x, i, 0, extent)
    return ops.take_along(x, indices, axis=dim)


@lower("aten.index.Tensor")
def index(call: Call, x: Node, indices: Sequence[Node | None]) -> Node:
    """x[i0, :, i1, ...]: the indexed axes become one, which a single take reads at the row-major position."""
    picked = [i for i, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    if any(index.dtype in ("bool", "u8") for index in given):
        raise Unsupported("indexing by a mask gives a shape that depends on data; multiply by the mask or use torch.where")
    front = picked != list(range(picked[0], picked[-1] + 1))
    if front:  # ATen puts the axes of separated indices first
        x = transpose(x, [*picked, *(i for i in range(x.tensor.rank) if i not in picked)])
    first = 0 if front else picked[0]
    extents = x.shape[first : first + len(picked)]
    position: Node | None = None
    for extent, each in zip(extents, given, strict=True):
        here = to(_positive(each, extent), "i64")
        position = here if position is None else position * node(extent, "i64") + here
    assert position is not None
    flat = reshape(x, (*x.shape[:first], size.product(extents), *x.shape[first + len(picked) :]))
    return ops.take(flat, position, axis=first)


@lower("aten.slice_scatter.default")
def slice_scatter(
    call: Call, x: Node, source: Node, dim: int = 0, start: SizeLike | None = None, end: SizeLike | None = None,
    step: int = 1,
) -> Node:  # fmt: skip
    if step != 1:
        raise Unsupported("an assignment to a slice with a step")
    dim = axis(dim, x.tensor.rank)
    begin = clamp_bound(start, x.shape[dim], 0)
    stop = begin + source.shape[dim]
    pieces = [part(x, dim, 0, begin), to(source, x.dtype), part(x, dim, stop, x.shape[dim] - stop)]
    return cat(call, pieces, dim)


@lower("aten.select_scatter.default")
def select_scatter(call: Call, x: Node, source: Node, dim: int, index: SizeLike) -> Node:
    dim = axis(dim, x.tensor.rank)
    shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
    return slice_scatter(call, x, reshape(source, shape), dim, clamp_bound(index, x.shape[dim], 0))


@lower("aten.scatter.value", "aten.scatter.src")
def scatter(call: Call, x: Node, dim: int, indices: Node, source: Value) -> Node:
    """One step of the index axis after the other, so that the last of equal indices wins, for a few steps only."""
    dim = axis(dim, x.tensor.rank)
    steps = indices.shape[dim]
    same = all(i == dim or s == e for i, (s, e) in enumerate(zip(indices.shape, x.shape, strict=True)))
    if not same or not isinstance(steps, int) or steps > 16:
        raise Unsupported("a scatter is lowered for at most 16 indices along its axis, and all of the other axes")
    place = reshape(ops.iota(size=x.shape[dim]), [s if i == dim else 1 for i, s in enumerate(x.shape)])
    for i in range(steps):
        value = part(source, dim, i, 1) if isinstance(source, Node) and source.tensor.rank else source
        x = ops.where(ops.eq(place, part(indices, dim, i, 1)), node(value, x.dtype), x)
    return x


@lower("aten.index_copy.default")
def index_copy(call: Call, x: Node, dim: int, indices: Node, source: Node) -> Node:
    return ops.scatter(x, indices, source, axis=axis(dim, x.tensor.rank))


@lower("aten.copy.default")
def copy_into(call: Call, x: Node, source: Node, non_blocking: bool = False) -> Node:
    return broadcast(to(source, x.dtype), x.shape)


@lower("aten.meshgrid.default", "aten.meshgrid.indexing")
def meshgrid(call: Call, tensors: Sequence[Node], *, indexing: str = "ij") -> list[Node]:
    if indexing != "ij":
        raise Unsupported("meshgrid with indexing='xy'")
    grids = []
    for i, (x, result) in enumerate(zip(tensors, call.results, strict=True)):
        shape = [1] * result.rank
        grids.append(broadcast(reshape(x, [*shape[:i], x.tensor.elements, *shape[i + 1 :]]), result.shape))
    return grids
