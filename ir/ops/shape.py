"""Operations that move elements: views, joins, gathers and scatters."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import Quantized, dtype
from stemma.ir.node import Op
from stemma.ir.size import SizeLike
from stemma.ir.types import Tensor, Type

VIEW = frozenset({"view"})


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis; TypeMismatch when out of range or negative (the IR stores only non-negative axes)."""
    if not 0 <= axis < rank:
        raise TypeMismatch(f"axis {axis} is outside 0..{rank - 1}; the IR counts axes from the front")
    return axis


class Mover(Op, abstract=True):
    """An operation without arithmetic."""

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class Reshape(Mover):
    """`reshape(x, shape=)`: the same elements in row-major order."""

    name = "reshape"
    tags = VIEW

    def infer(self, x: Tensor, *, shape: tuple[SizeLike, ...]) -> Type:
        if size.product(shape) is not x.elements and size.product(shape) != x.elements:
            raise TypeMismatch(f"{x.elements} elements cannot become the shape {shape}")
        return Tensor(x.dtype, shape)

    def evaluate(self, ctx: Any, x: Any, *, shape: tuple[SizeLike, ...]) -> Any:
        return x.reshape([ctx.size(s) for s in shape])


class Transpose(Mover):
    """`transpose(x, axes=)`: axis i of the result is axis axes[i] of x."""

    name = "transpose"
    tags = VIEW

    def infer(self, x: Tensor, *, axes: tuple[int, ...]) -> Type:
        if sorted(axes) != list(range(x.rank)):
            raise TypeMismatch(f"{axes} is no permutation of the {x.rank} axes")
        return Tensor(x.dtype, tuple(x.shape[a] for a in axes))

    def evaluate(self, ctx: Any, x: Any, *, axes: tuple[int, ...]) -> Any:
        return np.transpose(x, axes)


class BroadcastTo(Mover):
    """`broadcast_to(x, shape=)`: repeats axes of size 1, and adds axes in front."""

    name = "broadcast_to"
    tags = VIEW

    def infer(self, x: Tensor, *, shape: tuple[SizeLike, ...]) -> Type:
        offset = len(shape) - x.rank
        if offset < 0 or any(s not in (1, t) for s, t in zip(x.shape, shape[offset:], strict=True)):
            raise TypeMismatch(f"the shape {x.shape} does not broadcast to {shape}")
        return Tensor(x.dtype, shape)

    def evaluate(self, ctx: Any, x: Any, *, shape: tuple[SizeLike, ...]) -> Any:
        return np.broadcast_to(x, [ctx.size(s) for s in shape])


class Slice(Mover):
    """`slice(x, axis=, start=, stop=, step=1)`: 0 <= start <= stop <= size, step >= 1."""

    name = "slice"
    tags = VIEW

    def infer(self, x: Tensor, *, axis: int, start: SizeLike, stop: SizeLike, step: int = 1) -> Type:
        axis_of(axis, x.rank)
        extent = x.shape[axis]
        if step < 1 or size.bounds(start)[0] < 0 or size.bounds(stop - start)[1] < 0 or size.bounds(extent - stop)[1] < 0:
            raise TypeMismatch(f"the slice {start}:{stop}:{step} does not fit an axis of {extent}")
        shape = list(x.shape)
        shape[axis] = size.floordiv(stop - start + step - 1, step)
        return Tensor(x.dtype, tuple(shape))

    def evaluate(self, ctx: Any, x: Any, *, axis: int, start: SizeLike, stop: SizeLike, step: int) -> Any:
        part = np.s_[ctx.size(start) : ctx.size(stop) : step]
        if isinstance(x, Quantized) and axis < x.codes.ndim - 1:
            index = (np.s_[:],) * axis + (part,)
            return x[index]
        return x[(np.s_[:],) * axis + (part,)]


class Concat(Mover):
    """`concat(*xs, axis=)`: joins tensors along one axis. Quantized tensors join along any axis but the last."""

    name = "concat"

    def infer(self, *xs: Tensor, axis: int) -> Type:
        if not xs:
            raise TypeMismatch("needs at least one input")
        axis_of(axis, xs[0].rank)
        total: SizeLike = 0
        for x in xs:
            same = x.rank == xs[0].rank and all(
                a == b for i, (a, b) in enumerate(zip(x.shape, xs[0].shape, strict=True)) if i != axis
            )
            if x.dtype != xs[0].dtype or not same:
                raise TypeMismatch(f"the inputs do not fit along axis {axis}")
            total = total + x.shape[axis]
        if dtype(xs[0].dtype).kind == "quantized" and axis == xs[0].rank - 1:
            raise TypeMismatch("quantized tensors do not join along their last axis")
        return Tensor(xs[0].dtype, (*xs[0].shape[:axis], total, *xs[0].shape[axis + 1 :]))

    def evaluate(self, ctx: Any, *xs: Any, axis: int) -> Any:
        if isinstance(xs[0], Quantized):
            return Quantized.concatenate(xs, axis)
        return np.concatenate(xs, axis)


class Pad(Mover):
    """`pad(x, low=, high=, value=)`: adds `low[i]` and `high[i]` elements before and after axis i."""

    name = "pad"

    def infer(self, x: Tensor, *, low: tuple[int, ...], high: tuple[int, ...], value: float) -> Type:
        if not len(low) == len(high) == x.rank or min((*low, *high)) < 0:
            raise TypeMismatch("needs one non-negative amount per axis and side")
        return Tensor(x.dtype, tuple(s + a + b for s, a, b in zip(x.shape, low, high, strict=True)))

    def evaluate(self, ctx: Any, x: Any, *, low: tuple[int, ...], high: tuple[int, ...], value: float) -> Any:
        return np.pad(x, list(zip(low, high, strict=True)), constant_values=value)


class Take(Mover):
    """`take(x, indices, axis=)`: slices of x along `axis`; the axes of `indices` replace it. Indices are in range."""

    name = "take"

    def infer(self, x: Tensor, indices: Tensor, *, axis: int) -> Type:
        axis_of(axis, x.rank)
        if dtype(indices.dtype).kind != "int":
            raise TypeMismatch("indices must be integers")
        return Tensor(x.dtype, x.shape[:axis] + indices.shape + x.shape[axis + 1 :])

    def evaluate(self, ctx: Any, x: Any, indices: Any, *, axis: int) -> Any:
        return np.take(x, indices.astype(np.int64), axis=axis)


class TakeAlong(Mover):
    """`take_along(x, indices, axis=)`: result[.., i, ..] = x[.., indices[.., i, ..], ..]; the other axes broadcast."""

    name = "take_along"

    def infer(self, x: Tensor, indices: Tensor, *, axis: int) -> Type:
        axis_of(axis, x.rank)
        if dtype(indices.dtype).kind != "int" or indices.rank != x.rank:
            raise TypeMismatch("indices must be integers of the same rank")
        for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)):
            if i != axis and b not in (1, a):
                raise TypeMismatch(f"the indices do not fit axis {i}")
        shape = tuple(b if i == axis else a for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)))
        return Tensor(x.dtype, shape)

    def evaluate(self, ctx: Any, x: Any, indices: Any, *, axis: int) -> Any:
        return np.take_along_axis(x, indices.astype(np.int64), axis)


class Scatter(Mover):
    """`scatter(x, indices, updates, axis=)`: a copy of x with x[.., indices[i], ..] = updates[.., i, ..] along `axis`.

    `indices` is one-dimensional; when an index repeats, the last update wins. The write of a key-value cache.
    """

    name = "scatter"

    def infer(self, x: Tensor, indices: Tensor, updates: Tensor, *, axis: int) -> Type:
        axis_of(axis, x.rank)
        if indices.rank != 1 or dtype(indices.dtype).kind != "int":
            raise TypeMismatch("indices must be a one-dimensional integer tensor")
        expected = (*x.shape[:axis], indices.shape[0], *x.shape[axis + 1 :])
        if updates.shape != expected or updates.dtype != x.dtype:
            raise TypeMismatch(f"the updates must be {Tensor(x.dtype, expected)!r}")
        if dtype(x.dtype).kind == "quantized" and axis == x.rank - 1:
            raise TypeMismatch("the last axis of a quantized tensor is stored by rows, which cannot be split")
        return x

    def evaluate(self, ctx: Any, x: Any, indices: Any, updates: Any, *, axis: int) -> Any:
        if isinstance(x, Quantized):
            parts = {n: self.evaluate(ctx, p, indices, updates.parts[n], axis=axis) for n, p in x.parts.items()}
            return Quantized(x.dtype, parts)
        result = np.array(x)
        for i, target in enumerate(indices):
            result[(np.s_[:],) * axis + (int(target),)] = np.take(updates, i, axis=axis)
        return result


reshape, transpose, broadcast_to, slice, concat = Reshape(), Transpose(), BroadcastTo(), Slice(), Concat()
pad, take, take_along, scatter = Pad(), Take(), TakeAlong(), Scatter()
