"""Uniform formats: value = (code - zero) * scale, by rows or by groups along them.

int8                 8 bits, one f32 scale a row
int{2,3,4,8}_gN      symmetric, one f16 scale for N columns
uint{2,3,4}_gN       asymmetric: an f16 zero point as well, which need not be whole
q8_gN                activations rounded while running: 8 bits, one f32 scale for N columns
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats.base import Array, Format, Quantized, as_f16, code_bytes
from stemma.ir.size import SizeLike

NAMES = "int8, int2_gN, int3_gN, int4_gN, int8_gN, uint2_gN, uint3_gN, uint4_gN, q8_gN"
_NAME = re.compile(r"(?:(u?)int([2-4])|int(8)|q(8))_g(\d+)$")


@dataclass(frozen=True)
class Uniform(Format):
    """Codes low..high, scales of `scale_bits`, zero points when `zeros` (f16, in units of codes)."""

    scale_bits: int = 16
    low: int = 0
    high: int = 0
    zeros: bool = False

    def parts(self, columns: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        groups = columns // (self.group or columns)
        sides: dict[str, tuple[type, tuple[int, ...]]] = {"scales": (np.float32, (groups,))}
        if self.zeros:
            sides["zeros"] = (np.float32, (groups,))
        return {"codes": (np.int8, (columns,)), **sides}

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        scales = size.floordiv(elements, self.group) if self.group else rows
        return code_bytes(elements, self.bits) + scales * (self.scale_bits // 8 + 2 * self.zeros)

    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        """Symmetric 8 bits: scale = max|x| / 127. Fewer bits: the extreme value maps to the lowest code (as llama.cpp's Q4_0 does),
        then the scale is refitted by least squares. Asymmetric: smallest and largest map to the lowest and highest code. A group
        of zeros has scale 0."""
        grouped = values.reshape(len(values), -1, self.group or values.shape[1])
        sides = self.fit(grouped)
        codes = self.codes(grouped, *sides)
        if self.low != -self.high and not self.zeros:
            energy = np.einsum("...i,...i->...", codes, codes)
            fitted = np.einsum("...i,...i->...", grouped, codes)
            scale = np.divide(fitted, energy, out=np.zeros_like(energy), where=energy != 0)
            sides = (as_f16(scale, self.name),)
        names = ("scales", "zeros") if self.zeros else ("scales",)
        return {"codes": codes.astype(np.int8).reshape(values.shape), **dict(zip(names, sides, strict=True))}

    def fit(self, grouped: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """Scales [rows, groups], and zero points for asymmetric codes, that cover groups [rows, groups, G]."""
        largest, smallest = grouped.max(axis=-1), grouped.min(axis=-1)
        if self.zeros:
            largest, smallest = np.maximum(largest, 0), np.minimum(smallest, 0)  # zero stays representable
            scale = as_f16((largest - smallest) / np.float32(self.high - self.low), self.name)
            zero = np.divide(-smallest, scale, out=np.zeros_like(scale), where=scale != 0) + np.float32(self.low)
            return scale, np.rint(zero)
        if self.low == -self.high:
            scale = np.maximum(largest, -smallest) / np.float32(self.high)
        else:
            scale = np.where(-smallest >= largest, smallest, largest) / np.float32(self.low)
        return (scale if self.scale_bits == 32 else as_f16(scale, self.name),)

    def codes(self, grouped: NDArray[np.float32], scale: Array, zero: Array | None = None) -> NDArray[np.float32]:
        """The nearest codes, as floats, of groups [rows, groups, G] under scales [rows, groups]."""
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)[..., None]
        codes = grouped * inverse
        if zero is not None:
            codes += zero[..., None]
        return np.rint(np.clip(codes, self.low, self.high, out=codes), out=codes)

    def dequantize(self, array: Quantized) -> NDArray[np.float32]:
        codes = array.codes
        grouped = codes.reshape(*codes.shape[:-1], -1, self.group or codes.shape[-1]).astype(np.float32)
        if self.zeros:
            grouped -= array.parts["zeros"][..., None]
        return (grouped * array.scales[..., None]).reshape(codes.shape)


def parse(name: str) -> Format | None:
    """The uniform format of a name, or None."""
    if name == "int8":
        return Uniform(name, "quantized", 8, scale_bits=32, low=-127, high=127)
    found = _NAME.match(name)
    if not found:
        return None
    group = int(found[5])
    if group < 8 or group % 8:
        raise TypeMismatch(f"{name}: a group must be a multiple of 8.")
    if found[3] or found[4]:
        return Uniform(name, "quantized", 8, group, scale_bits=32 if found[4] else 16, low=-127, high=127)
    bits = int(found[2])
    if found[1]:
        return Uniform(name, "quantized", bits, group, low=0, high=2**bits - 1, zeros=True)
    return Uniform(name, "quantized", bits, group, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1)
