"""Element types, and formats: element types that are stored as codes, scales and whatever else a row needs.

A format is one class in one file of this folder: its name, what it stores, its rounding to nearest and its meaning in numpy. How a
backend packs it and multiplies with it is that backend's file of the same name.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.size import SizeLike

Array = NDArray[Any]
BLOCK = 1 << 18  # elements that are rounded at a time: they stay in cache, and bound the memory of temporaries


@dataclass(frozen=True)
class DType:
    """An element type. kind: "float", "int", "bool" or "quantized". bits: of one element (of its code, when quantized).

    group: elements of a row that share one scale; 0 when the whole row does.
    """

    name: str
    kind: str
    bits: int
    group: int = 0

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        """Bytes of `elements` values in `rows` rows, with all that belongs to them; padding of a layout is not counted."""
        return elements * (self.bits // 8)


@dataclass(frozen=True)
class Quantized:
    """A quantized array [.., K]: parts by name (see `Format.parts`), each with the array's leading axes.

    The part "codes" has the logical shape.
    """

    dtype: str
    parts: Mapping[str, Array]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def codes(self) -> Array:
        """int8 codes in the logical shape."""
        return self.parts["codes"]

    @property
    def scales(self) -> Array:
        """float32 scales [.., groups]."""
        return self.parts["scales"]

    def __getitem__(self, index: Any) -> Quantized:
        """Rows: an index of leading axes, as of an array."""
        return Quantized(self.dtype, {name: part[index] for name, part in self.parts.items()})

    @staticmethod
    def concatenate(arrays: Sequence[Quantized], axis: int = 0) -> Quantized:
        """Arrays of one type joined along an axis other than the last."""
        first = arrays[0]
        return Quantized(first.dtype, {n: np.concatenate([a.parts[n] for a in arrays], axis) for n in first.parts})

    def dequantize(self) -> NDArray[np.float32]:
        """The float32 values that it stands for."""
        from stemma.ir.formats import format_of

        return format_of(self.dtype).dequantize(self)


@dataclass(frozen=True)
class Format(DType, ABC):
    """A storage type of rows: codes and what gives them a meaning."""

    @property
    def activation_group(self) -> int:
        """Columns that share a scale when activations are rounded to multiply this format as whole numbers (`q8_gN`)."""
        return math.gcd(self.group or 64, 128)

    @abstractmethod
    def parts(self, columns: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        """What a row of so many columns stores, by name: numpy type and shape. "codes" is (np.int8, (columns,))."""

    @abstractmethod
    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        """The parts that stand for finite rows [rows, K], each code rounded to nearest; TypeMismatch for values it cannot hold."""

    @abstractmethod
    def dequantize(self, array: Quantized) -> NDArray[np.float32]:
        """The float32 values of an array of this format."""

    @property
    def rows_together(self) -> int:
        """Consecutive rows that are rounded together, counted from the first of the whole weight."""
        return 1

    def refusal(self, columns: int) -> str:
        """Why rows of so many columns do not fit; empty when they do."""
        if columns <= 0 or (self.group and columns % self.group):
            return f"A last axis of {columns} is no multiple of the group {self.group} of {self.name}."
        return ""

    def quantize(self, values: Array) -> Quantized:
        """Round float values [.., K] to nearest; TypeMismatch when the rows do not fit or a value is not finite."""
        columns = values.shape[-1]
        if reason := self.refusal(columns):
            raise TypeMismatch(reason)
        rows = values.reshape(-1, columns)
        step = max(16, BLOCK // columns // 16 * 16)

        def work(start: int) -> dict[str, Array]:
            block = np.asarray(rows[start : start + step], np.float32)
            if not np.isfinite(block).all():
                raise TypeMismatch(f"Values to be stored as {self.name} are not finite (NaN or infinity).")
            return self.round_rows(block)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # numpy releases the interpreter lock
            blocks = list(pool.map(work, range(0, len(rows), step))) or [self.round_rows(np.zeros((0, columns), np.float32))]
        joined = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        leading = values.shape[:-1]
        return Quantized(self.name, {name: part.reshape(*leading, *part.shape[1:]) for name, part in joined.items()})


def code_bytes(elements: SizeLike, bits: int) -> SizeLike:
    """Bytes of so many codes, packed without gaps."""
    return size.floordiv(elements * bits + 7, 8)


def as_f16(values: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    """float32 values rounded to float16; TypeMismatch when one overflows."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise TypeMismatch(f"A scale of {what} overflows f16: the values are too large for this element type.")
    return rounded
