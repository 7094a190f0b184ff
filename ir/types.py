"""Types of values: element types, tensors, tuples; and the reference meaning of quantized element types."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.size import SizeLike

Array = NDArray[Any]


@dataclass(frozen=True)
class DType:
    """An element type. `bits` counts the codes only; `group` elements share one scale of `scale_bits` (0: one per row)."""

    name: str
    kind: str  # "float" | "int" | "bool" | "quantized"
    bits: int
    group: int = 0
    scale_bits: int = 0
    low: int = 0
    high: int = 0

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        """Bytes of `elements` values in `rows` rows, scales included; padding of a layout is not counted."""
        code_bytes = size.floordiv(elements * self.bits + 7, 8) if self.bits < 8 else elements * (self.bits // 8)
        if self.kind != "quantized":
            return code_bytes
        scales = size.floordiv(elements, self.group) if self.group else rows
        return code_bytes + scales * (self.scale_bits // 8)


_PLAIN = {
    d.name: d
    for d in (
        DType("f64", "float", 64), DType("f32", "float", 32), DType("f16", "float", 16), DType("bf16", "float", 16),
        DType("i64", "int", 64), DType("i32", "int", 32), DType("i16", "int", 16), DType("i8", "int", 8),
        DType("u8", "int", 8), DType("bool", "bool", 8),
        DType("int8", "quantized", 8, scale_bits=32, low=-127, high=127),
    )
}  # fmt: skip
_GROUPED = re.compile(r"(int4|q8)_g(\d+)$")
_NUMPY = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32, "i16": np.int16,
          "i8": np.int8, "u8": np.uint8, "bool": np.bool_}  # fmt: skip


@lru_cache(maxsize=None)
def dtype(name: str) -> DType:
    """The element type called `name`; TypeMismatch when there is none."""
    if name in _PLAIN:
        return _PLAIN[name]
    if found := _GROUPED.match(name):
        kind, group = found[1], int(found[2])
        if group < 8 or group % 8:
            raise TypeMismatch(f"{name}: a group must be a multiple of 8.")
        if kind == "int4":
            return DType(name, "quantized", 4, group=group, scale_bits=16, low=-8, high=7)
        return DType(name, "quantized", 8, group=group, scale_bits=32, low=-127, high=127)
    raise TypeMismatch(f"There is no element type {name!r}. Known: {', '.join(_PLAIN)}, int4_gN, q8_gN.")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type that stores `name` (bf16 is stored as uint16 bits)."""
    return np.dtype(np.uint16 if name == "bf16" else _NUMPY[name])


@dataclass(frozen=True)
class Tensor:
    """A tensor type: element type name and a shape of sizes."""

    dtype: str
    shape: tuple[SizeLike, ...]

    def __post_init__(self) -> None:
        dtype(self.dtype)
        for s in self.shape:
            if isinstance(s, bool) or not isinstance(s, (int, size.Size)) or (isinstance(s, int) and s < 0):
                raise TypeMismatch(f"{s!r} is not a size, in the shape {self.shape!r}.")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> SizeLike:
        return size.product(self.shape)

    @property
    def bytes(self) -> SizeLike:
        """Stored bytes; for quantized types a row is one step of the last axis but one."""
        return dtype(self.dtype).stored_bytes(self.elements, size.product(self.shape[:-1]))

    @property
    def is_float(self) -> bool:
        return dtype(self.dtype).kind == "float"

    def __repr__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape)) or '()'}]"


@dataclass(frozen=True)
class State:
    """A value of a decoding program that is no array: a set of sequences, a token tree, an output, a drafter's table.

    States are values like any other: an operation on one gives a new one. `args` are strings and integers, part of the type.
    """

    kind: str
    args: tuple[str | int, ...] = ()

    def __repr__(self) -> str:
        return f"State[{', '.join(map(repr, (self.kind, *self.args)))}]"


@dataclass(frozen=True)
class Tuple:
    """The type of a node with several results; `get(node, index=i)` reads one."""

    items: tuple[Tensor | State, ...]

    def __repr__(self) -> str:
        return f"Tuple[{', '.join(map(repr, self.items))}]"


Type = Tensor | Tuple | State


def tensors_of(type: Type) -> tuple[Tensor, ...]:
    """The tensors in a type: itself, or those of a tuple; states have none."""
    items = type.items if isinstance(type, Tuple) else (type,)
    return tuple(t for t in items if isinstance(t, Tensor))


@dataclass(frozen=True)
class Quantized:
    """A quantized array: integer codes in the logical shape, and scales [..., groups] (one group for per-row types)."""

    dtype: str
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def __getitem__(self, rows: slice) -> Quantized:
        """A range of the first axis."""
        return Quantized(self.dtype, self.codes[rows], self.scales[rows])

    def dequantize(self) -> NDArray[np.float32]:
        """float32 values, codes * scale."""
        group = dtype(self.dtype).group or self.codes.shape[-1]
        grouped = self.codes.reshape(*self.codes.shape[:-1], -1, group).astype(np.float32)
        return (grouped * self.scales[..., None]).reshape(self.codes.shape)


def quantize_array(values: Array, name: str) -> Quantized:
    """Round to nearest, symmetric, along the last axis.

    8-bit types: scale = max|x| / 127. 4-bit types: the extreme value x* maps to -8 (as llama.cpp's Q4_0 does), then the scale
    is refitted by least squares to the codes and rounded to f16. An all-zero group has scale 0. TypeMismatch when the last axis
    is not a multiple of the group, or when a value is not finite.
    """
    kind = dtype(name)
    if kind.kind != "quantized":
        raise TypeMismatch(f"{name} is not a quantized element type.")
    columns = values.shape[-1]
    group = kind.group or columns
    if group == 0 or columns % group:
        raise TypeMismatch(f"A last axis of {columns} is no multiple of the group {group} of {name}.")
    rows = values.reshape(-1, columns)
    codes = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), columns // group), np.float32)
    step = max(1, QUANTIZE_BLOCK // columns)  # a block that stays in cache, and bounds the memory of temporaries

    def work(start: int) -> None:
        block = rows[start : start + step]
        codes[start : start + step], scales[start : start + step] = _quantize_block(block, kind, group)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # numpy releases the interpreter lock
        list(pool.map(work, range(0, len(rows), step)))
    return Quantized(name, codes.reshape(values.shape), scales.reshape(*values.shape[:-1], -1))


QUANTIZE_BLOCK = 1 << 18  # elements


def _quantize_block(values: Array, kind: DType, group: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes and scales of [rows, columns] values."""
    grouped = np.asarray(values, np.float32).reshape(len(values), -1, group)
    largest = grouped.max(axis=-1, keepdims=True)
    smallest = grouped.min(axis=-1, keepdims=True)
    if not (np.isfinite(largest).all() and np.isfinite(smallest).all()):
        raise TypeMismatch(f"Values to be stored as {kind.name} are not finite (NaN or infinity).")
    if kind.low == -kind.high:
        scale = np.maximum(largest, -smallest) / np.float32(kind.high)
    else:
        scale = np.where(-smallest >= largest, smallest, largest) / np.float32(kind.low)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes = grouped * inverse
    np.rint(np.clip(codes, kind.low, kind.high, out=codes), out=codes)
    if kind.scale_bits == 16:
        energy = np.einsum("...i,...i->...", codes, codes)[..., None]
        fitted = np.einsum("...i,...i->...", grouped, codes)[..., None]
        scale = np.divide(fitted, energy, out=np.zeros_like(scale), where=energy != 0)
        with np.errstate(over="ignore"):
            scale = scale.astype(np.float16).astype(np.float32)
        if not np.isfinite(scale).all():
            raise TypeMismatch(f"A scale of {kind.name} overflows f16: the values are too large for this element type.")
    return codes.astype(np.int8).reshape(values.shape), scale[..., 0]


def round_bf16(values: Array) -> NDArray[np.uint16]:
    """float32 values to bfloat16 bits, round to nearest even; NaN stays NaN."""
    bits = np.asarray(values, np.float32, order="C").view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits to float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
