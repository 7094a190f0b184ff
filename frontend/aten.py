"""The lowering table: from ATen operator names to plain functions that build IR nodes.

    @lower("aten.add.Tensor")
    def add(call: Call, a: Value, b: Value, *, alpha: Number = 1) -> Node: ...

A lowering gets the arguments as ATen passes them, with tensors as nodes and symbolic integers as sizes. It returns one node,
or a list for an operator with several results. What it cannot express it refuses with `Unsupported(reason)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from stemma.ir import Node, Size, SizeLike, Tensor, dtype, ops, size

Number = int | float | bool
Value = Node | Number | Size  # what ATen calls a Tensor or a Scalar argument
Lowering = Callable[..., Any]
L = TypeVar("L", bound=Lowering)
LOWERINGS: dict[str, Lowering] = {}

TORCH_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_ORDER = ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")
_RANK = {"bool": 0, "int": 1, "float": 2}


class Unsupported(Exception):
    """A lowering refuses a call; the frontend collects the reasons of the whole graph before it fails."""


@dataclass(frozen=True)
class Call:
    """What a lowering may know besides its arguments: the operator's name and the types of its results."""

    name: str
    results: tuple[Tensor, ...]

    @property
    def out(self) -> Tensor:
        """The type of the first result."""
        return self.results[0]

    @property
    def dtype(self) -> str:
        return self.out.dtype


def lower(*names: str) -> Callable[[L], L]:
    """Register a lowering for operators such as "aten.add.Tensor"."""

    def register(function: L) -> L:
        for name in names:
            if name in LOWERINGS:
                raise ValueError(f"{name} has two lowerings")
            LOWERINGS[name] = function
        return function

    return register


def torch_dtype(value: torch.dtype) -> str:
    """The IR's name of a torch element type; Unsupported when it has none."""
    if value not in TORCH_DTYPES:
        raise Unsupported(f"the element type {str(value).removeprefix('torch.')} does not exist in the IR")
    return TORCH_DTYPES[value]


def to(x: Node, name: str) -> Node:
    """`x` with the element type `name`; no node when it has it already."""
    return x if x.dtype == name else ops.cast(x, dtype=name)


def constant(value: Number, name: str) -> Node:
    """A scalar of the element type `name`."""
    kind = dtype(name).kind
    return ops.constant(value=bool(value) if kind == "bool" else float(value) if kind == "float" else int(value), dtype=name)


def node(value: Value, name: str) -> Node:
    """A tensor, number or size as a node of the element type `name`."""
    if isinstance(value, Node):
        return to(value, name)
    if isinstance(value, Size):
        return to(ops.size_value(size=value), name)
    return constant(value, name)


def _promote(names: Sequence[str]) -> str:
    if set(names) == {"f16", "bf16"}:
        return "f32"
    if set(names) == {"u8", "i8"}:
        return "i16"
    return max(names, key=_ORDER.index)


def common(*values: Value) -> str:
    """The element type in which ATen computes on these operands: tensors outrank 0-d tensors, which outrank numbers."""
    groups: list[list[str]] = [[], [], []]
    for v in values:
        if isinstance(v, Node):
            groups[0 if v.tensor.rank else 1].append(v.dtype)
        else:
            groups[2].append("bool" if isinstance(v, bool) else "f32" if isinstance(v, float) else "i64")
    best: str | None = None
    for group in groups:
        if group:
            name = _promote(group)
            if best is None or _RANK[dtype(name).kind] > _RANK[dtype(best).kind]:
                best = name
    assert best is not None
    return best


def axis(index: int, rank: int) -> int:
    """A non-negative axis from ATen's, which may count from the end."""
    return index + rank if index < 0 else index


def axes(indices: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Non-negative axes; all of them for None or an empty list."""
    if isinstance(indices, int):
        indices = [indices]
    return tuple(axis(i, rank) for i in indices) if indices else tuple(range(rank))


def reshape(x: Node, shape: Sequence[SizeLike]) -> Node:
    """`x` in another shape; no node when it has it already."""
    return x if x.shape == tuple(shape) else ops.reshape(x, shape=tuple(shape))


def broadcast(x: Node, shape: Sequence[SizeLike]) -> Node:
    """`x` repeated to a shape; no node when it has it already."""
    return x if x.shape == tuple(shape) else ops.broadcast_to(x, shape=tuple(shape))


def transpose(x: Node, order: Sequence[int]) -> Node:
    """`x` with its axes permuted; no node when the order is kept."""
    return x if list(order) == list(range(x.tensor.rank)) else ops.transpose(x, axes=tuple(order))


def filled(value: Value, out: Tensor) -> Node:
    """A tensor of the type `out` that holds one value everywhere."""
    return broadcast(node(value, out.dtype), out.shape)


def part(x: Node, index: int, start: SizeLike, length: SizeLike, step: int = 1) -> Node:
    """`length` steps along an axis from `start`; no node for the whole axis."""
    if start == 0 and length == x.shape[index] and step == 1:
        return x
    stop = start if length == 0 else start + (length - 1) * step + 1
    return ops.slice(x, axis=index, start=start, stop=stop, step=step)


def clamp_bound(value: SizeLike | None, extent: SizeLike, default: SizeLike) -> SizeLike:
    """A Python slice bound as a size in 0..extent."""
    if value is None:
        return default
    low, high = size.bounds(value)
    if high < 0:
        value = value + extent
    elif low < 0:
        raise Unsupported(f"the slice bound {value} may be negative or not, depending on its sizes")
    return size.maximum(0, size.minimum(value, extent))


def mean_scale(x: Node, over: Sequence[int]) -> Value:
    """1/n for a mean over axes; a node when n is symbolic."""
    count = size.product([x.shape[i] for i in over])
    if isinstance(count, int):
        if count == 0:
            raise Unsupported("the mean of no elements")
        return 1.0 / count
    return ops.reciprocal(to(ops.size_value(size=count), x.dtype))
