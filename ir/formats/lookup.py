"""Formats that are multiplied by table lookup (T-MAC, arXiv 2407.00088): lut{1,2,3,4}_gN.

lut{2,3,4}_gN   as int{2,3,4}_gN: the same codes, scales and rounding
lut1_gN         codes -1 and +1, one f16 scale for N columns: the mean magnitude
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import uniform
from stemma.ir.formats.base import Array, Format, Quantized, as_f16, code_bytes
from stemma.ir.size import SizeLike

NAMES = "lut1_gN, lut2_gN, lut3_gN, lut4_gN"
_NAME = re.compile(r"lut([1-4])_g(\d+)$")


@dataclass(frozen=True)
class Lookup(Format):
    """Codes of `bits` bits, one f16 scale a group."""

    def parts(self, columns: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        return {"codes": (np.int8, (columns,)), "scales": (np.float32, (columns // self.group,))}

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        return code_bytes(elements, self.bits) + size.floordiv(elements, self.group) * 2

    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        """Of one bit the sign (+1 for zero), under the scale that is best in squares; of more bits as the uniform format."""
        if self.bits > 1:
            same = uniform.parse(f"int{self.bits}_g{self.group}")
            assert same is not None
            return replace(same, name=self.name).round_rows(values)
        means = np.abs(values).reshape(len(values), -1, self.group).mean(axis=-1, dtype=np.float32)
        return {"codes": np.where(values < 0, np.int8(-1), np.int8(1)), "scales": as_f16(means, self.name)}

    def dequantize(self, array: Quantized) -> NDArray[np.float32]:
        grouped = array.codes.reshape(*array.shape[:-1], -1, self.group).astype(np.float32)
        return (grouped * array.scales[..., None]).reshape(array.shape)


def parse(name: str) -> Format | None:
    """The lookup format of a name, or None."""
    found = _NAME.match(name)
    if not found:
        return None
    group = int(found[2])
    if group < 32 or group % 32:
        raise TypeMismatch(f"{name}: a group must be a multiple of 32.")
    return Lookup(name, "quantized", int(found[1]), group)
