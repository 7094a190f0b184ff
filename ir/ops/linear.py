"""Products with matrices, convolution, table lookup, and quantization of values."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import Quantized, dtype, format_of, quantize_array
from stemma.ir.node import Cost, Node, Op
from stemma.ir.ops.core import cast
from stemma.ir.ops.elementwise import add, broadcast
from stemma.ir.ops.shape import take, transpose
from stemma.ir.size import SizeLike
from stemma.ir.types import Tensor, Type

WEIGHT_BLOCK = 1 << 24  # elements


def plain(x: Any) -> Any:
    """An array of floats, whatever the storage."""
    return x.dequantize() if isinstance(x, Quantized) else x


class MatMul(Op):
    """`matmul(a, b)`: [.., M, K] @ [.., K, N] -> [.., M, N]; leading axes broadcast; both float, one element type."""

    name = "matmul"

    def infer(self, a: Tensor, b: Tensor) -> Type:
        if a.rank < 2 or b.rank < 2 or a.dtype != b.dtype or not a.is_float:
            raise TypeMismatch("needs two float tensors of rank 2 or more and one element type")
        if a.shape[-1] != b.shape[-2]:
            raise TypeMismatch(f"the inner sizes {a.shape[-1]} and {b.shape[-2]} differ")
        return Tensor(a.dtype, (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))

    def evaluate(self, ctx: Any, a: Any, b: Any) -> Any:
        return np.matmul(a, b)

    def flops(self, type: Tensor, a: Tensor, b: Tensor) -> SizeLike:
        return type.elements * a.shape[-1] * 2


class Linear(Op):
    """`linear(x, w, bias=None)`: x [.., K] f32, w [N, K] of any storage type, bias f32 [N] -> f32 [.., N], x @ w.T + bias.

    Weights are widened or dequantized as they are read; arithmetic is f32. x may be bf16 or q8_gG: activations rounded by a
    lossy pass, so that 16-bit or 8-bit products can be used.
    """

    name = "linear"

    def infer(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Type:
        if w.rank != 2 or x.rank < 1 or x.shape[-1] != w.shape[1]:
            raise TypeMismatch("needs x [.., K] and w [N, K]")
        if x.dtype not in ("f32", "f64", "bf16") and not x.dtype.startswith("q8_g"):
            raise TypeMismatch("x must be f32, bf16 or q8_gG")
        if dtype(w.dtype).kind not in ("float", "quantized") or w.dtype.startswith("q8_g"):
            raise TypeMismatch("w must be float or a quantized weight type")
        result = "f64" if x.dtype == "f64" else "f32"
        if bias is not None and (bias.shape != w.shape[:1] or bias.dtype != result):
            raise TypeMismatch(f"the bias must be {Tensor(result, w.shape[:1])!r}")
        return Tensor(result, (*x.shape[:-1], w.shape[0]))

    def evaluate(self, ctx: Any, x: Any, w: Any, bias: Any = None) -> Any:
        x = plain(x).astype(ctx.float, copy=False)
        step = max(1, WEIGHT_BLOCK // max(1, w.shape[1]))  # bounds the memory of widened weights
        blocks = (w[i : i + step] for i in range(0, w.shape[0], step))
        product = np.concatenate([x @ plain(b).astype(ctx.float, copy=False).T for b in blocks], axis=-1)
        return product if bias is None else product + bias

    def decompose(self, x: Node, w: Node, bias: Node | None = None) -> Node:
        if x.tensor.rank < 2:
            raise TypeMismatch("a linear of a vector has no decomposition; reshape it to [1, K]")
        wide = [dequantize(v) if dtype(v.dtype).kind == "quantized" else cast(v, dtype="f32") for v in (x, w)]
        product = matmul(wide[0], transpose(wide[1], axes=(1, 0)))
        return product if bias is None else add(product, bias)

    def flops(self, type: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> SizeLike:
        return type.elements * x.shape[-1] * 2


class Conv(Op):
    """`conv(x, w, bias=None, stride=, padding=, dilation=, groups=)`: x [B, C, *space], w [O, C/groups, *kernel] -> [B, O, *out].

    Cross-correlation with zero padding, one amount per spatial axis, as in torch.nn.functional.conv2d.
    """

    name = "conv"

    def infer(
        self, x: Tensor, w: Tensor, bias: Tensor | None = None, *, stride: tuple[int, ...], padding: tuple[int, ...],
        dilation: tuple[int, ...], groups: int = 1,
    ) -> Type:  # fmt: skip
        spatial = x.rank - 2
        if spatial < 1 or w.rank != x.rank or not len(stride) == len(padding) == len(dilation) == spatial:
            raise TypeMismatch("needs x [B, C, *space], w [O, C/groups, *kernel] and one setting per spatial axis")
        channels, outputs = w.shape[1] * groups, w.shape[0]
        if x.shape[1] != channels or not isinstance(outputs, int) or outputs % groups:
            raise TypeMismatch(f"{x.shape[1]} channels do not fit {groups} groups of a weight {w.shape}")
        out = []
        for extent, kernel, s, p, d in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True):
            out.append(size.floordiv(extent + 2 * p - (kernel - 1) * d - 1, s) + 1)
        return Tensor(x.dtype, (x.shape[0], outputs, *out))

    def evaluate(
        self, ctx: Any, x: Any, w: Any, bias: Any = None, *, stride: tuple[int, ...], padding: tuple[int, ...],
        dilation: tuple[int, ...], groups: int,
    ) -> Any:  # fmt: skip
        x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
        spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilation, strict=True)]
        axes = tuple(range(2, x.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=axes)  # [B, C, *out, *span]
        windows = windows[(np.s_[:], np.s_[:], *(np.s_[::s] for s in stride), *(np.s_[::d] for d in dilation))]
        parts = []
        for xg, wg in zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True):
            kernel_axes = list(range(2 + len(axes), windows.ndim))
            part = np.tensordot(xg, wg, axes=([1, *kernel_axes], list(range(1, w.ndim))))
            parts.append(np.moveaxis(part, -1, 1))
        result = np.concatenate(parts, 1)
        return result if bias is None else result + bias.reshape(-1, *[1] * len(axes))

    def flops(self, type: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, **_: Any) -> SizeLike:
        return type.elements * size.product(w.shape[1:]) * 2


class Embedding(Op):
    """`embedding(w, ids)`: rows of w [V, D] of any storage type, ids integer [..] -> f32 [.., D]."""

    name = "embedding"

    def infer(self, w: Tensor, ids: Tensor) -> Type:
        if w.rank != 2 or dtype(ids.dtype).kind != "int":
            raise TypeMismatch("needs w [V, D] and integer ids")
        return Tensor("f32", (*ids.shape, w.shape[1]))

    def evaluate(self, ctx: Any, w: Any, ids: Any) -> Any:
        rows = ids.astype(np.int64)
        if isinstance(w, np.ndarray):
            return w[rows].astype(ctx.float)
        if isinstance(w, Quantized):
            return w[rows].dequantize().astype(ctx.float)
        return w.take(rows).astype(ctx.float)  # rows.LazyRows

    def decompose(self, w: Node, ids: Node) -> Node:
        wide = dequantize(w) if dtype(w.dtype).kind == "quantized" else cast(w, dtype="f32")
        return take(wide, ids, axis=0)

    def cost(self, node: Node) -> Cost:
        w, ids = (i.tensor for i in node.inputs)
        rows = Tensor(w.dtype, (ids.elements, w.shape[1]))
        return Cost(0, rows.bytes + ids.bytes + node.tensor.bytes)


class Quantize(Op):
    """`quantize(x, dtype=)`: round x [.., K] to a quantized type along the last axis (see `Format.quantize`)."""

    name = "quantize"

    def infer(self, x: Tensor, *, dtype: str) -> Type:
        if not x.is_float:
            raise TypeMismatch("needs float elements")
        kind = format_of(dtype)
        columns = x.shape[-1] if x.rank else 0
        if not isinstance(columns, int):
            raise TypeMismatch(f"a last axis of {columns} is no constant")
        if reason := kind.refusal(columns):
            raise TypeMismatch(reason)
        return Tensor(dtype, x.shape)

    def evaluate(self, ctx: Any, x: Any, *, dtype: str) -> Any:
        return quantize_array(x, dtype)


class Dequantize(Op):
    """`dequantize(x)`: the f32 values of a quantized tensor, codes * scale."""

    name = "dequantize"

    def infer(self, x: Tensor) -> Type:
        if dtype(x.dtype).kind != "quantized":
            raise TypeMismatch("needs quantized elements")
        return Tensor("f32", x.shape)

    def evaluate(self, ctx: Any, x: Any) -> Any:
        return x.dequantize().astype(ctx.float)


matmul, linear, conv, embedding = MatMul(), Linear(), Conv(), Embedding()
quantize, dequantize = Quantize(), Dequantize()
