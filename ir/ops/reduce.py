"""Reductions and scans over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.node import OPS, Op
from stemma.ir.ops.shape import axis_of
from stemma.ir.size import SizeLike
from stemma.ir.types import Tensor, Type


class Reduction(Op, abstract=True):
    """`op(x, axes=, keepdims=False)`: combines all elements along the axes."""

    tags = frozenset({"reduction"})
    function: Callable[..., Any]

    def infer(self, x: Tensor, *, axes: tuple[int, ...], keepdims: bool = False) -> Type:
        for axis in axes:
            axis_of(axis, x.rank)
        if not axes or len(set(axes)) != len(axes):
            raise TypeMismatch(f"{axes} are not distinct axes")
        kept = (1 if i in axes else s for i, s in enumerate(x.shape) if keepdims or i not in axes)
        return Tensor(x.dtype, tuple(kept))

    def evaluate(self, ctx: Any, x: Any, *, axes: tuple[int, ...], keepdims: bool) -> Any:
        return type(self).function(x, axis=axes, keepdims=keepdims).astype(x.dtype)

    def flops(self, type: Type, x: Tensor, **_: Any) -> SizeLike:
        return x.elements


def _reduction(name: str, function: Callable[..., Any], doc: str) -> Op:
    type(name.title(), (Reduction,), {"name": name, "function": staticmethod(function), "__doc__": doc})
    return OPS[name]


class ArgMax(Op):
    """`argmax(x, axis=, keepdims=False)` -> i64: index of the largest element, the first of equals."""

    name = "argmax"
    tags = frozenset({"reduction"})

    def infer(self, x: Tensor, *, axis: int, keepdims: bool = False) -> Type:
        axis_of(axis, x.rank)
        return Tensor("i64", tuple(1 if i == axis else s for i, s in enumerate(x.shape) if keepdims or i != axis))

    def evaluate(self, ctx: Any, x: Any, *, axis: int, keepdims: bool) -> Any:
        return np.argmax(x, axis=axis, keepdims=keepdims)


class CumSum(Op):
    """`cumsum(x, axis=)`: running sum, the current element included."""

    name = "cumsum"

    def infer(self, x: Tensor, *, axis: int) -> Type:
        axis_of(axis, x.rank)
        return x

    def evaluate(self, ctx: Any, x: Any, *, axis: int) -> Any:
        return np.cumsum(x, axis=axis).astype(x.dtype)


reduce_sum = _reduction("reduce_sum", np.sum, "Sum over axes.")
reduce_max = _reduction("reduce_max", np.max, "Maximum over axes.")
reduce_min = _reduction("reduce_min", np.min, "Minimum over axes.")
argmax, cumsum = ArgMax(), CumSum()
