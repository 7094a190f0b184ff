"""GGUF's formats with scales of two levels: super-blocks of 256 columns with f16 scales, their sub-blocks with small whole ones.

name   value                                         sub-block  codes     sub_scales  sub_minimums  bits a weight
q2_k   (d * sub_scale) * code - dmin * sub_minimum   16         0..3      0..15       0..15         2.625
q4_k   (d * sub_scale) * code - dmin * sub_minimum   32         0..15     0..63       0..63         4.5
q5_k   (d * sub_scale) * code - dmin * sub_minimum   32         0..31     0..63       0..63         5.5
q6_k   (d * sub_scale) * code                        16         -32..31   -128..127   none          6.5625

Parts of rows of K columns, exactly what a GGUF file holds: codes int8 [K]; sub_scales [K / sub-block] uint8 (q6_k: int8);
sub_minimums uint8 of the same shape (not q6_k); d and dmin float32 [K / 256], values of f16 (dmin not in q6_k). The products
d * sub_scale, times code, and dmin * sub_minimum are exact in f32, so there is one rounding, and values equal those of
`dequantize_row_q*_K` of ggml-quants.c to the bit, with or without fused operations.

Rounding to nearest fits a uniform scale and minimum to each sub-block, trying a few narrower ranges, and rounds those in turn
(simpler than the weighted search of llama.cpp's quantizer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.formats.base import Array, Format, Quantized, as_f16, code_bytes
from stemma.ir.size import SizeLike

NAMES = "q2_k, q4_k, q5_k, q6_k"
SUPER = 256
"""Columns of a super-block."""
_RANGES = (1.0, 0.9, 0.8, 0.7)  # shares of a sub-block's range that rounding tries: fewer levels wasted on its extremes


@dataclass(frozen=True)
class TwoLevel(Format):
    """Codes low..high. sub: columns of a sub-block; scale_bits: of its scale, and of its minimum when `minimums`."""

    sub: int = 0
    scale_bits: int = 0
    low: int = 0
    high: int = 0
    minimums: bool = False

    @property
    def activation_group(self) -> int:
        """Rounded activations share a scale for 32 columns: sums over sub-blocks of 16 stay whole numbers, with their scales."""
        return 32

    def parts(self, columns: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        subs, supers = (columns // self.sub,), (columns // SUPER,)
        parts: dict[str, tuple[type, tuple[int, ...]]] = {
            "codes": (np.int8, (columns,)), "sub_scales": (np.uint8 if self.minimums else np.int8, subs), "d": (np.float32, supers),
        }  # fmt: skip
        if self.minimums:
            parts |= {"sub_minimums": (np.uint8, subs), "dmin": (np.float32, supers)}
        return parts

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        sides = 2 if self.minimums else 1
        small = code_bytes(size.floordiv(elements, self.sub) * sides, self.scale_bits)
        return code_bytes(elements, self.bits) + small + size.floordiv(elements, SUPER) * (2 * sides)

    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        grouped = values.reshape(len(values), -1, self.sub)
        scale, minimum = self._ranged(grouped) if self.minimums else (self._extreme(grouped), None)
        most = 2**self.scale_bits - 1 if self.minimums else -128  # q6_k: the extreme scale maps to the lowest sub-scale
        d, sub_scales = self._levels(scale, most)
        sides = {"sub_scales": sub_scales.astype(np.uint8 if self.minimums else np.int8), "d": d}
        step = self._spread(d) * sub_scales
        offset = np.zeros_like(step)
        if minimum is not None:
            dmin, sub_minimums = self._levels(minimum, most)
            sides |= {"sub_minimums": sub_minimums.astype(np.uint8), "dmin": dmin}
            offset = self._spread(dmin) * sub_minimums
        codes = self._codes(grouped, step, offset)
        return {"codes": codes.astype(np.int8).reshape(values.shape), **sides}

    def dequantize(self, array: Quantized) -> NDArray[np.float32]:
        parts, shape = array.parts, array.shape
        codes = parts["codes"].reshape(*shape[:-1], -1, self.sub).astype(np.float32)
        codes *= (self._spread(parts["d"]) * parts["sub_scales"].astype(np.float32))[..., None]
        if self.minimums:
            codes -= (self._spread(parts["dmin"]) * parts["sub_minimums"].astype(np.float32))[..., None]
        return np.asarray(codes.reshape(shape))

    def _spread(self, of_supers: Array) -> Array:
        """Values of super-blocks [.., supers], for each sub-block."""
        return np.asarray(np.repeat(of_supers, SUPER // self.sub, axis=-1))

    def _codes(self, grouped: Array, step: Array, offset: Array) -> Array:
        """The nearest codes, as floats, under a step and an offset for each sub-block."""
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
        codes = (grouped + offset[..., None]) * inverse[..., None]
        return np.asarray(np.rint(np.clip(codes, self.low, self.high)))

    def _levels(self, wanted: Array, most: int) -> tuple[Array, Array]:
        """(f16 factors [rows, supers], whole multiples of them as floats [rows, subs]) near the wanted scales [rows, subs]."""
        blocks = wanted.reshape(len(wanted), -1, SUPER // self.sub)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], -1)[..., 0]
        d = as_f16(np.asarray(extreme / np.float32(most), np.float32), self.name)
        wide = self._spread(d)
        levels = np.rint(np.divide(wanted, wide, out=np.zeros_like(wanted), where=wide != 0))
        return d, np.clip(levels, -128 if most < 0 else 0, 127 if most < 0 else most)

    def _extreme(self, grouped: Array) -> Array:
        """Scales that map the value of the largest magnitude to the lowest code."""
        largest, smallest = grouped.max(axis=-1), grouped.min(axis=-1)
        return np.asarray(np.where(-smallest >= largest, smallest, largest) / np.float32(self.low))

    def _ranged(self, grouped: Array) -> tuple[Array, Array]:
        """Scales and minimums >= 0 whose codes are nearest in squares, among some shares of the range, which holds zero."""
        largest, smallest = np.maximum(grouped.max(axis=-1), 0), np.minimum(grouped.min(axis=-1), 0)
        best = np.full(largest.shape, np.inf, np.float32)
        scale, minimum = np.zeros_like(largest), np.zeros_like(largest)
        for share in map(np.float32, _RANGES):
            step, offset = (largest - smallest) * share / np.float32(self.high), -smallest * share
            error = self._codes(grouped, step, offset) * step[..., None] - offset[..., None] - grouped
            squares = np.einsum("...i,...i->...", error, error)
            better = squares < best
            best, scale, minimum = np.where(better, squares, best), np.where(better, step, scale), np.where(better, offset, minimum)
        return scale, minimum


_FORMATS = {
    f.name: f
    for f in (
        TwoLevel("q2_k", "quantized", 2, SUPER, sub=16, scale_bits=4, high=3, minimums=True),
        TwoLevel("q4_k", "quantized", 4, SUPER, sub=32, scale_bits=6, high=15, minimums=True),
        TwoLevel("q5_k", "quantized", 5, SUPER, sub=32, scale_bits=6, high=31, minimums=True),
        TwoLevel("q6_k", "quantized", 6, SUPER, sub=16, scale_bits=8, low=-32, high=31),
    )
}


def parse(name: str) -> Format | None:
    """The two-level format of a name, or None."""
    return _FORMATS.get(name)
