"""Products with some rows of a weight only, chosen while running: what contextual sparsity of MLPs needs.

Contextual sparsity (Liu et al. 2023, Deja Vu; Lee et al. 2024, CATS; Zhou et al. 2024, Sirius, arXiv:2409.03856): of the neurons
of a gated MLP only those with the largest gate values are computed for a token, so the other rows of its weights are not read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import Array, dtype
from stemma.ir.node import Cost, Node, Op
from stemma.ir.ops.core import cast
from stemma.ir.ops.linear import dequantize, matmul
from stemma.ir.ops.shape import reshape, take
from stemma.ir.size import SizeLike
from stemma.ir.types import Tensor, Type


class TopNeurons(Op):
    """`top_neurons(x, count=)`: x f32 [.., F] -> i32 [.., count], the places of the `count` largest |x| of each row, ascending.

    Of equals at the border the first places are taken.
    """

    name = "top_neurons"

    def infer(self, x: Tensor, *, count: int) -> Type:
        if x.rank < 1 or x.dtype not in ("f32", "f64") or not isinstance(x.shape[-1], int):
            raise TypeMismatch("needs x [.., F] of f32 with a constant F")
        if not 1 <= count <= x.shape[-1]:
            raise TypeMismatch(f"{count} of {x.shape[-1]} neurons cannot be chosen")
        return Tensor("i32", (*x.shape[:-1], count))

    def evaluate(self, ctx: Any, x: Any, *, count: int) -> Any:
        order = np.argsort(-np.abs(x), axis=-1, kind="stable")
        return np.sort(order[..., :count], axis=-1).astype(np.int32)

    def flops(self, type: Type, x: Tensor, **_: Any) -> SizeLike:
        return x.elements


class _SomeRows(Op, abstract=True):
    """What both products share: `at` i32 [.., count] names rows of w [F, K], with the leading axes of x."""

    def check(self, x: Tensor, w: Tensor, at: Tensor) -> None:
        if w.rank != 2 or x.rank < 1 or at.rank != x.rank or x.shape[:-1] != at.shape[:-1] or at.dtype != "i32":
            raise TypeMismatch("needs x [.., n], w of rank 2 and at i32 [.., count] with the leading axes of x")
        if x.dtype not in ("f32", "f64") or dtype(w.dtype).kind not in ("float", "quantized") or w.dtype.startswith("q8_g"):
            raise TypeMismatch("x must be f32, w float or a quantized weight type")

    def cost(self, node: Node) -> Cost:
        """Bytes: of the rows that are named, each at most once."""
        x, w, at = (i.tensor for i in node.inputs)
        read = Tensor(w.dtype, (size.minimum(at.elements, w.shape[0]), w.shape[1]))
        return Cost(2 * at.elements * w.shape[1], x.bytes + read.bytes + at.bytes + node.tensor.bytes)


class LinearAt(_SomeRows):
    """`linear_at(x, w, at)`: x f32 [.., K], w [F, K] of any storage type, at i32 [.., n] -> f32 [.., n]: x · w[at]."""

    name = "linear_at"

    def infer(self, x: Tensor, w: Tensor, at: Tensor) -> Type:
        self.check(x, w, at)
        if x.shape[-1] != w.shape[1]:
            raise TypeMismatch("x and the rows of w have different lengths")
        return Tensor(x.dtype, at.shape)

    def evaluate(self, ctx: Any, x: Any, w: Any, at: Any) -> Any:
        flat, places = x.reshape(-1, x.shape[-1]), at.reshape(-1, at.shape[-1])
        rows = [rows_of(w, p, ctx.float) @ v for v, p in zip(flat, places, strict=True)]
        return np.array(rows, ctx.float).reshape(at.shape)

    def decompose(self, x: Node, w: Node, at: Node) -> Node:
        column = reshape(x, shape=(*x.shape, 1))
        return reshape(matmul(take(_wide(w), at, axis=0), column), shape=at.shape)


class LinearFrom(_SomeRows):
    """`linear_from(x, w, at)`: x f32 [.., n], w [F, D] of any storage type, at i32 [.., n] -> f32 [.., D]: sum of x_j * w[at_j]."""

    name = "linear_from"

    def infer(self, x: Tensor, w: Tensor, at: Tensor) -> Type:
        self.check(x, w, at)
        if x.shape != at.shape:
            raise TypeMismatch("x has not one value for every row that is named")
        return Tensor(x.dtype, (*x.shape[:-1], w.shape[1]))

    def evaluate(self, ctx: Any, x: Any, w: Any, at: Any) -> Any:
        flat, places = x.reshape(-1, x.shape[-1]), at.reshape(-1, at.shape[-1])
        rows = [v @ rows_of(w, p, ctx.float) for v, p in zip(flat, places, strict=True)]
        return np.array(rows, ctx.float).reshape(*x.shape[:-1], w.shape[1])

    def decompose(self, x: Node, w: Node, at: Node) -> Node:
        row = reshape(x, shape=(*x.shape[:-1], 1, x.shape[-1]))
        return reshape(matmul(row, take(_wide(w), at, axis=0)), shape=(*x.shape[:-1], w.shape[1]))


def rows_of(w: Any, places: Array, float_type: type) -> Array:
    """Some rows of a weight as floats, however it is stored."""
    rows = w[places] if isinstance(w, np.ndarray) else w[places].dequantize() if hasattr(w, "parts") else w.take(places)
    return np.asarray(rows).astype(float_type, copy=False)


def _wide(w: Node) -> Node:
    return dequantize(w) if dtype(w.dtype).kind == "quantized" else cast(w, dtype="f32")


top_neurons, linear_at, linear_from = TopNeurons(), LinearAt(), LinearFrom()
