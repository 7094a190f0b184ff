"""Uniform formats: value = (code - zero) * scale, by rows or by groups along them.

int8                 8 bits, one f32 scale a row
int{2,3,4,8}_gN      symmetric, one f16 scale for N columns
uint{2,3,4}_gN       asymmetric: an f16 zero point as well, which need not be whole
ternary_gN           codes -1, 0, 1 in 2 bits, one f16 scale for N columns
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

NAMES = "int8, int2_gN, int3_gN, int4_gN, int8_gN, uint2_gN, uint3_gN, uint4_gN, ternary_gN, q8_gN"
_NAME = re.compile(r"(?:(u?)int([2-4])|int(8)|q(8)|(ternary))_g(\d+)$")
_SHARES = {2: (1.0, 0.85, 0.7, 0.6, 0.5), 3: (1.0, 0.9, 0.8, 0.7)}  # of the range, tried for codes of so many bits


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
        """Symmetric 8 bits: scale = max|x| / 127. Fewer bits: the extreme value maps to the lowest code (as llama.cpp's Q4_0 does);
        asymmetric: smallest and largest map to the lowest and highest code, zero to a whole one. Codes of 2 and 3 bits also try
        narrower ranges. The scale is then refitted by least squares, and the best in squares is kept. Ternary codes have the scale
        that is best in squares. A group of zeros has scale 0."""
        grouped = values.reshape(len(values), -1, self.group or values.shape[1])
        shares = (1.0,) if self.low == -self.high else _SHARES.get(self.bits, (1.0,))
        tried = [self._rounded(grouped, np.float32(share)) for share in shares]
        sides, codes = tried[0]
        if len(tried) > 1:
            best = np.argmin([self._squares(grouped, c, s) for s, c in tried], axis=0)
            sides = tuple(np.choose(best, [s[i] for s, _ in tried]) for i in range(len(sides)))
            codes = np.choose(best[..., None], [c for _, c in tried])
        names = ("scales", "zeros") if self.zeros else ("scales",)
        return {"codes": codes.astype(np.int8).reshape(values.shape), **dict(zip(names, sides, strict=True))}

    def _rounded(self, grouped: NDArray[np.float32], share: np.float32) -> tuple[tuple[Array, ...], NDArray[np.float32]]:
        """Scales and zero points that cover a share of the range of groups [rows, groups, G], and codes as floats."""
        sides = self._ternary(grouped) if self.high == 1 == -self.low else self._ranged(grouped, share)
        codes = self.codes(grouped, *sides)
        if self.low != -self.high:
            levels = codes - sides[1][..., None] if self.zeros else codes
            energy = np.einsum("...i,...i->...", levels, levels)
            fitted = np.einsum("...i,...i->...", grouped, levels)
            scale = np.divide(fitted, energy, out=np.zeros_like(energy), where=energy != 0)
            sides = (as_f16(scale, self.name), *sides[1:])
        return sides, codes

    def _squares(self, grouped: NDArray[np.float32], codes: Array, sides: tuple[Array, ...]) -> Array:
        """The sum of squared errors of each group."""
        levels = codes - sides[1][..., None] if self.zeros else codes
        error = levels * sides[0][..., None] - grouped
        return np.asarray(np.einsum("...i,...i->...", error, error))

    def _ranged(self, grouped: NDArray[np.float32], share: np.float32) -> tuple[Array, ...]:
        """Scales [rows, groups], and zero points for asymmetric codes, that cover a share of each group's range."""
        largest, smallest = grouped.max(axis=-1) * share, grouped.min(axis=-1) * share
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

    def _ternary(self, grouped: NDArray[np.float32]) -> tuple[Array, ...]:
        """The best scales in squares: the mean of the n largest magnitudes, for the n whose sum squared by n is the most."""
        sums = -np.cumsum(np.sort(-np.abs(grouped), axis=-1), axis=-1)
        counts = np.arange(1, grouped.shape[-1] + 1, dtype=np.float32)
        count = np.argmax(sums / np.sqrt(counts), axis=-1)[..., None]
        scale = np.take_along_axis(sums, count, -1)[..., 0] / counts[count[..., 0]]
        return (as_f16(scale, self.name),)

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
    group = int(found[6])
    if group < 8 or group % 8:
        raise TypeMismatch(f"{name}: a group must be a multiple of 8.")
    if found[3] or found[4]:
        return Uniform(name, "quantized", 8, group, scale_bits=32 if found[4] else 16, low=-127, high=127)
    if found[5]:
        return Uniform(name, "quantized", 2, group, low=-1, high=1)
    bits = int(found[2])
    if found[1]:
        return Uniform(name, "quantized", bits, group, low=0, high=2**bits - 1, zeros=True)
    return Uniform(name, "quantized", bits, group, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1)
