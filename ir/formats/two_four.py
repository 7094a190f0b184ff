"""2:4 sparsity: int4_gN_2of4. Of every 4 consecutive columns at most two codes are not zero; a scale for N columns (64 or 128)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import uniform
from stemma.ir.formats.base import Array, Format, Quantized
from stemma.ir.size import SizeLike

NAMES = "int4_gN_2of4"
_NAME = re.compile(r"int4_g(\d+)_2of4$")


@dataclass(frozen=True)
class TwoFour(Format):
    """Parts: codes int8 [K] (-8..7, at most two of every four not 0), scales f32 [groups] (f16 values). value = code * scale."""

    def parts(self, columns: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        return self.dense.parts(columns)

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        """Of four columns two codes of 4 bits and a mask of 4 bits."""
        return size.floordiv(elements * 3, 8) + size.floordiv(elements, self.group) * 2

    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        """The two of least magnitude of every four become zero (of equals the last); the others are rounded as int4_gN."""
        return self.dense.round_rows(values * keep(np.abs(values)))

    @property
    def dense(self) -> Format:
        """int4_gN: the format of what is kept."""
        found = uniform.parse(f"int4_g{self.group}")
        assert found is not None
        return found

    def dequantize(self, array: Quantized) -> NDArray[np.float32]:
        return self.dense.dequantize(array)


def keep(importance: Array) -> NDArray[np.bool_]:
    """Which columns stay, by importance [.., K]: the two most important of every four, of equals the first."""
    fours = importance.reshape(-1, 4)
    place = np.argsort(np.argsort(-fours, axis=1, kind="stable"), axis=1)
    return (place < 2).reshape(importance.shape)


def parse(name: str) -> Format | None:
    """The 2:4 format of a name, or None."""
    found = _NAME.match(name)
    if not found:
        return None
    group = int(found[1])
    if group not in (64, 128):
        raise TypeMismatch(f"{name}: a scale is shared by 64 or 128 columns.")
    return TwoFour(name, "quantized", 4, group)
