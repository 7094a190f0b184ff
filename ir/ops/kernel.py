"""Kernel-level operations: loops, loads, stores and reductions over scalars (shape ()), in the spirit of tinygrad's ranges.

A kernel is a Function whose parameters are buffers and whose results are stores. A scalar that depends on a `loop_index` is
computed once per value of that index; nothing says where: a renderer places each scalar at the outermost loop where all its
indices are defined. Arithmetic on scalars reuses the elementwise operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import dtype
from stemma.ir.node import Op
from stemma.ir.size import Size, SizeLike
from stemma.ir.types import Tensor, Type

REDUCTIONS = ("sum", "max", "min", "argmax")


def _scalar(value: Tensor, what: str) -> None:
    if value.shape != ():
        raise TypeMismatch(f"the {what} must be a scalar, not {value!r}")


def _check_indices(buffer: Tensor, indices: tuple[Tensor, ...]) -> None:
    if len(indices) != buffer.rank:
        raise TypeMismatch(f"a buffer of {buffer.rank} axes needs as many indices, not {len(indices)}")
    for index in indices:
        if index != Tensor("i64", ()):
            raise TypeMismatch(f"an index must be an i64 scalar, not {index!r}")


class LoopIndex(Op):
    """`loop_index(name=, extent=, axis=)`: the variable of a loop over 0 .. extent-1, an i64 scalar.

    `axis` numbers the loops that meet in one expression; the interpreter lays the loop along that axis from the back, so that
    evaluating a scalar for all indices at once is numpy broadcasting.
    """

    name = "loop_index"
    level = "kernel"

    def infer(self, *, name: str, extent: SizeLike, axis: int) -> Type:
        if not name.isidentifier() or axis < 0 or not isinstance(extent, (int, Size)):
            raise TypeMismatch(f"needs an identifier, a size and an axis >= 0, not {name!r}, {extent!r}, {axis!r}")
        return Tensor("i64", ())

    def evaluate(self, ctx: Any, *, name: str, extent: SizeLike, axis: int) -> Any:
        return np.arange(ctx.size(extent), dtype=np.int64).reshape(-1, *[1] * axis)

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class Load(Op):
    """`load(buffer, *indices)`: one element of a buffer (a parameter, or the value of a store), row-major."""

    name = "load"
    level = "kernel"

    def infer(self, buffer: Tensor, *indices: Tensor) -> Type:
        _check_indices(buffer, indices)
        if dtype(buffer.dtype).kind == "quantized":
            raise TypeMismatch("an element of a quantized buffer has no address of its own")
        return Tensor(buffer.dtype, ())

    def evaluate(self, ctx: Any, buffer: Any, *indices: Any) -> Any:
        return buffer[tuple(np.broadcast_arrays(*indices))] if indices else buffer

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class Store(Op):
    """`store(buffer, value, *indices)`: the buffer with one element replaced for every value of the loops in value and indices.

    The last one in loop order wins when an element is written twice. In memory the buffer is updated in place.
    """

    name = "store"
    level = "kernel"

    def infer(self, buffer: Tensor, value: Tensor, *indices: Tensor) -> Type:
        _check_indices(buffer, indices)
        _scalar(value, "value")
        if value.dtype != buffer.dtype:
            raise TypeMismatch(f"a {value.dtype} does not fit a buffer of {buffer.dtype}; insert a cast")
        return buffer

    def evaluate(self, ctx: Any, buffer: Any, value: Any, *indices: Any) -> Any:
        result = np.array(buffer)
        value, *places = np.broadcast_arrays(value, *indices)
        result[tuple(places)] = value if places else value.reshape(())
        return result

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class ReduceLoop(Op):
    """`reduce_loop(value, *loops, kind=)`: combines a scalar over all values of loop indices; kind sum, max, min or argmax.

    argmax takes one loop and gives the index (i64) of the largest value, the first of equals. An empty loop gives 0 for sum; the
    others are undefined then.
    """

    name = "reduce_loop"
    level = "kernel"

    def infer(self, value: Tensor, *loops: Tensor, kind: str) -> Type:
        _scalar(value, "value")
        if kind not in REDUCTIONS:
            raise TypeMismatch(f"{kind!r} is none of {', '.join(REDUCTIONS)}")
        if not loops or (kind == "argmax" and len(loops) != 1) or any(loop != Tensor("i64", ()) for loop in loops):
            raise TypeMismatch("needs loop indices to reduce over, exactly one for argmax")
        return Tensor("i64" if kind == "argmax" else value.dtype, ())

    def evaluate(self, ctx: Any, value: Any, *loops: Any, kind: str) -> Any:
        value = np.broadcast_arrays(value, *loops)[0]
        axes = tuple(value.ndim - loop.ndim for loop in loops)
        if kind == "argmax":
            return np.argmax(value, axis=axes[0], keepdims=True)
        combine: Any = {"sum": np.sum, "max": np.max, "min": np.min}[kind]
        return combine(value, axis=axes, keepdims=True).astype(value.dtype)

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 1


loop_index, load, store, reduce_loop = LoopIndex(), Load(), Store(), ReduceLoop()
