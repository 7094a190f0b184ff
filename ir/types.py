"""Types of values: tensors, states, tuples; and how numpy holds plain element types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import Array, dtype
from stemma.ir.size import SizeLike

_NUMPY = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32, "i16": np.int16,
          "i8": np.int8, "u8": np.uint8, "bool": np.bool_}  # fmt: skip


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


def round_bf16(values: Array) -> NDArray[np.uint16]:
    """float32 values to bfloat16 bits, round to nearest even; NaN stays NaN."""
    bits = np.asarray(values, np.float32, order="C").view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits to float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
