"""Codes of 2 to 6 and 8 bits in planes, made for products of unsigned bytes.

A code is cut into planes of 4, 2 and 1 bits, the low bits first: 2 = [2], 3 = [2, 1], 4 = [4], 5 = [4, 1], 6 = [4, 2]; 8 stays
whole. Byte i of a dword of a plane of p bits holds, for q < 8 / p, the bits of code[4q + i] at bit p * q: 32 / p columns of one
output. So a quad of 4 columns is one shift and one mask away from the four bytes that a dot product takes. A chunk is the fewest
columns that fill whole dwords of every plane (8, 16 or 32), stored as [dword][64 outputs]. A panel is groups of columns one after
the other: first the sides, the numbers that say what codes mean, then the chunks.

sides of int{2,3,8}_gN, ternary_gN    64 f16 scales
sides of uint{2,3,4}_gN               64 f16 scales, 64 f16 zero points
q{2,4,5,6}_k       in place of groups, super-blocks of 256 columns: 64 f16 d, 64 f16 dmin if there is one, then for every two
  sub-blocks their sides, 64 bytes each, and their chunks
  q2_k  sub_scale | sub_minimum << 4 of both
  q4_k, q5_k  sub_scale | (sub_minimum & 3) << 6 of both, then 64 bytes with the minimums' other 4 bits, of the first in the low
  q6_k  sub_scale + 128 of both
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.formats.base import PANEL, Bytes, Packing, padded, quantized, raw
from stemma.ir import DType
from stemma.ir.formats.two_level import SUPER, TwoLevel
from stemma.ir.formats.uniform import Uniform

GROUPS = (32, 64, 128)
ACTIVATIONS = (32, 64, 128)
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
CHUNK = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 4}


@dataclass(frozen=True)
class Planes(Packing):
    """Unsigned codes: bits of each, low: what 0 stands for; and the bytes of a group's sides."""

    bits: int = 0
    low: int = 0

    @property
    def group_bytes(self) -> int:
        return self.sides_bytes + self.format.group * self.bits * (PANEL // 8)

    @property
    def sides_bytes(self) -> int:
        """Bytes of a group's sides, of 64 outputs."""
        raise NotImplementedError

    def seams(self) -> dict[str, Any]:
        chunk = CHUNK[self.bits]
        return {
            "bits": self.bits, "low": self.low, "chunk": chunk, "dwords": chunk * self.bits // 32, "sides_bytes": self.sides_bytes,
        }  # fmt: skip

    def refusal(self, columns: int) -> str:
        group = self.format.group
        return f"{self.format.name} needs an input size that is a multiple of {group}, not {columns}" if columns % group else ""

    def panel_bytes(self, columns: int) -> int:
        return columns // self.format.group * self.group_bytes

    def pack_codes(self, codes: NDArray[np.int8]) -> Bytes:
        """Codes [rows, K] of at most 64 rows as bytes [groups, bytes of a group's chunks]."""
        groups, chunk = codes.shape[1] // self.format.group, CHUNK[self.bits]
        unsigned = (padded(codes, PANEL, codes.shape[1]).astype(np.int16) - self.low).astype(np.uint8)
        quads = unsigned.reshape(PANEL, -1, chunk // 4, 4)
        dwords, base = [], 0
        for plane in PLANES[self.bits]:
            bits = (quads >> np.uint8(base)) & np.uint8(2**plane - 1)
            held = bits.reshape(PANEL, len(quads[0]), -1, 8 // plane, 4) << (np.arange(8 // plane, dtype=np.uint8) * plane)[:, None]
            dwords.append(np.bitwise_or.reduce(held, axis=3))
            base += plane
        return np.ascontiguousarray(np.concatenate(dwords, axis=2).transpose(1, 2, 0, 3)).reshape(groups, -1)

    def unpack_codes(self, packed: Bytes, columns: int) -> NDArray[np.int8]:
        """The inverse of `pack_codes`: codes [64, K]."""
        chunk = CHUNK[self.bits]
        dwords = packed.reshape(columns // chunk, -1, PANEL, 4).transpose(2, 0, 1, 3)
        codes = np.zeros((PANEL, columns // chunk, chunk // 4, 4), np.uint8)
        first = base = 0
        for plane in PLANES[self.bits]:
            count = chunk * plane // 32
            held = dwords[:, :, first : first + count, None] >> (np.arange(8 // plane, dtype=np.uint8) * plane)[:, None]
            codes |= (held & np.uint8(2**plane - 1)).reshape(codes.shape) << np.uint8(base)
            first, base = first + count, base + plane
        return (codes.astype(np.int16) + self.low).astype(np.int8).reshape(PANEL, columns)


@dataclass(frozen=True)
class Groups(Planes):
    """Sides of f16: scales, and zero points when `zeros`."""

    zeros: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The parts that are sides."""
        return ("scales", "zeros") if self.zeros else ("scales",)

    @property
    def sides_bytes(self) -> int:
        return 128 * len(self.names)

    def pack_panel(self, rows: Any) -> Bytes:
        groups = rows.shape[1] // self.format.group
        sides = [np.ascontiguousarray(padded(rows.parts[n].astype(np.float16), PANEL, groups).T).view(np.uint8) for n in self.names]
        return np.concatenate([*sides, self.pack_codes(rows.codes)], axis=1).reshape(-1)

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        groups = panel.reshape(columns // self.format.group, -1)
        sides = np.ascontiguousarray(groups[:, : self.sides_bytes]).view(np.float16).astype(np.float32)
        parts: dict[str, NDArray[Any]] = {"codes": self.unpack_codes(np.ascontiguousarray(groups[:, self.sides_bytes :]), columns)}
        for i, name in enumerate(self.names):
            parts[name] = sides[:, i * PANEL : (i + 1) * PANEL].T
        return quantized(self.format, **parts)

    def seams(self) -> dict[str, Any]:
        return super().seams() | {"group": self.format.group, "sides": "groups", "zeros": self.zeros}


@dataclass(frozen=True)
class SuperBlocks(Planes):
    """Sides of GGUF's super-blocks; `rule` is the format, which says how many there are."""

    @property
    def rule(self) -> TwoLevel:
        assert isinstance(self.format, TwoLevel)
        return self.format

    @property
    def side_rows(self) -> int:
        """Rows of 64 bytes before the chunks of two sub-blocks."""
        return 3 if self.rule.scale_bits == 6 else 2

    @property
    def factors_bytes(self) -> int:
        """Bytes of d, and dmin if there is one."""
        return 256 if self.rule.minimums else 128

    @property
    def sides_bytes(self) -> int:
        return self.factors_bytes + SUPER // self.rule.sub // 2 * self.side_rows * PANEL

    def pack_panel(self, rows: Any) -> Bytes:
        supers = rows.shape[1] // SUPER

        def side(name: str, type: Any) -> NDArray[Any]:  # [supers, pairs, 2, 64 outputs]; of factors [supers, 1, 1, 64]
            part = padded(rows.parts[name].astype(type), PANEL, rows.parts[name].shape[1])
            return part.reshape(PANEL, supers, -1, min(2, part.shape[1] // supers)).transpose(1, 2, 3, 0)

        factors = [raw(side(name, np.float16)).reshape(supers, -1) for name in ("d", "dmin") if name in rows.parts]
        codes = self.pack_codes(rows.codes).reshape(supers, SUPER // self.rule.sub // 2, -1)
        if not self.rule.minimums:
            sides = [(side("sub_scales", np.int16) + 128).astype(np.uint8)]
        else:
            scales, minimums = side("sub_scales", np.uint8), side("sub_minimums", np.uint8)
            high = minimums >> np.uint8(2)
            sides = (
                [scales | minimums << np.uint8(4)]
                if self.rule.scale_bits == 4
                else [scales | (minimums & np.uint8(3)) << np.uint8(6), high[:, :, 0] | high[:, :, 1] << np.uint8(4)]
            )
        pairs = np.concatenate([*(s.reshape(*codes.shape[:2], -1) for s in sides), codes], axis=2)
        return raw(np.concatenate([*factors, pairs.reshape(supers, -1)], axis=1))

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        supers = panel.reshape(columns // SUPER, -1)
        factors = np.ascontiguousarray(supers[:, : self.factors_bytes]).view(np.float16).astype(np.float32)
        pairs = supers[:, self.factors_bytes :].reshape(len(supers), SUPER // self.rule.sub // 2, -1)
        low: Bytes = pairs[:, :, : 2 * PANEL]
        high: Bytes = pairs[:, :, 2 * PANEL : self.side_rows * PANEL]

        def part(side: NDArray[Any]) -> NDArray[Any]:  # [64, numbers of the row]
            return side.reshape(-1, PANEL).T

        codes = self.unpack_codes(np.ascontiguousarray(pairs[:, :, self.side_rows * PANEL :]), columns)
        d = part(factors[:, :PANEL])
        if not self.rule.minimums:
            return quantized(self.format, codes=codes, d=d, sub_scales=part((low.astype(np.int16) - 128).astype(np.int8)))
        if self.rule.scale_bits == 4:
            scales, minimums = low & np.uint8(15), low >> np.uint8(4)
        else:
            scales = low & np.uint8(63)
            minimums = low >> np.uint8(6) | np.concatenate([high & np.uint8(15), high >> np.uint8(4)], axis=2) << np.uint8(2)
        dmin = part(factors[:, PANEL:])
        return quantized(self.format, codes=codes, d=d, dmin=dmin, sub_scales=part(scales), sub_minimums=part(minimums))

    def seams(self) -> dict[str, Any]:
        rule = self.rule
        sides = {"sub": rule.sub, "scale_bits": rule.scale_bits, "minimums": rule.minimums, "zeros": False}
        return super().seams() | {"group": SUPER, "sides": "two_level"} | sides


def packing(format: DType) -> Packing | None:
    """The packing of a format whose codes are multiplied as planes, or None."""
    if isinstance(format, TwoLevel):
        return SuperBlocks(format, "planes", ("f32", "q8_g32"), format.bits, format.low)
    if not isinstance(format, Uniform) or format.scale_bits != 16 or (format.bits == 4 and not format.zeros):
        return None
    if format.group not in (*GROUPS, 256) or (format.group == 256 and (format.bits != 2 or format.zeros)):
        return None
    activations = ("f32", *(f"q8_g{g}" for g in ACTIVATIONS if format.group % g == 0))
    return Groups(format, "planes", activations, format.bits, -128 if format.bits == 8 else format.low, format.zeros)


EXAMPLES = ("int2_g128", "int3_g32", "uint4_g32", "int8_g32", "q2_k", "q4_k", "q5_k", "q6_k")
"""Names that the tests of all formats try."""
