"""How the CPU stores a weight of one format: panels of 64 outputs with all their K, each contiguous, the last one padded.

A packing is one class in one file of this folder: sizes, packing, unpacking, and the name of its text in templates/cores, which
multiplies with it and reads single outputs back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.ir import DType, Quantized

PANEL = 64
UNIT = 16

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Packing(ABC):
    """One format's panels. core: the file templates/cores/CORE.hpp.j2. activations: element types of x that it multiplies with."""

    format: DType
    core: str
    activations: tuple[str, ...]

    def refusal(self, columns: int) -> str:
        """Why the kernels do not take rows of so many columns; empty when they do."""
        return ""

    @abstractmethod
    def panel_bytes(self, columns: int) -> int:
        """Bytes of one panel of 64 outputs; ValueError for rows that do not fit."""

    @abstractmethod
    def pack_panel(self, rows: Any) -> Bytes:
        """One panel of at most 64 rows: a `Quantized`, or an array of floats (bf16: or of uint16 bits)."""

    @abstractmethod
    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        """The 64 rows of a panel as `pack_panel` takes them."""

    def seams(self) -> dict[str, Any]:
        """What the core's text needs to know besides the names of the weight's and the activations' types."""
        return {}


def padded(a: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """A matrix with zeros added below and to the right."""
    if a.shape == (rows, columns):
        return a
    return np.pad(a, ((0, rows - a.shape[0]), (0, columns - a.shape[1])))


def raw(a: NDArray[Any]) -> Bytes:
    """The bytes of an array, row-major."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def quantized(format: DType, **parts: NDArray[Any]) -> Quantized:
    """A quantized array of a format from its parts."""
    return Quantized(format.name, parts)
