"""Weights as bit planes, for table lookup: lut{1,2,3,4}_g{32,64,128}.

Per group of G: 64 f16 scales, then [G/32][units 4][bits][16] dwords. A dword holds one plane of 32 consecutive k of an output: byte
i has k = 4i..4i+3 in its low nibble and 16+4i..16+4i+3 in its high one, the first k in the lowest bit. The planes together are
code + 2^(bits-1); of lut1, a set bit is +1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.backends.cpu.formats.base import PANEL, UNIT, Bytes, Packing, padded, quantized, raw
from stemma.ir import DType

GROUPS = (32, 64, 128)
MOST_COLUMNS = 1 << 16  # tables of a row: 8 bytes a column, in a thread's scratch


class Lookup(Packing):
    """Planes of bits, scales by group."""

    def refusal(self, columns: int) -> str:
        name, group = self.format.name, self.format.group
        if columns % group:
            return f"{name} needs an input size that is a multiple of {group}, not {columns}"
        return f"{name} takes an input size of at most {MOST_COLUMNS}, not {columns}" if columns > MOST_COLUMNS else ""

    def panel_bytes(self, columns: int) -> int:
        return columns // self.format.group * (128 + self.format.group * 8 * self.format.bits)

    def pack_panel(self, rows: Any) -> Bytes:
        k, group, bits = rows.shape[1], self.format.group, self.format.bits
        codes = padded(rows.codes, PANEL, k)
        levels = (codes > 0).astype(np.uint8) if bits == 1 else (codes + np.int8(1 << bits - 1)).astype(np.uint8)
        # [group][step][unit][plane][output][byte][nibble][bit] of [unit, output][group][step][nibble][byte][bit]
        split = levels.reshape(4, UNIT, k // group, group // 32, 2, 4, 4).transpose(2, 3, 0, 1, 5, 4, 6)
        planes = np.stack([split >> np.uint8(p) & np.uint8(1) for p in range(bits)], axis=3)
        body = np.packbits(planes.reshape(k // group, -1), axis=1, bitorder="little")
        side = np.ascontiguousarray(padded(rows.scales.astype(np.float16), PANEL, k // group).T).view(np.uint8)
        return raw(np.concatenate([side, body], axis=1))

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        group, bits = self.format.group, self.format.bits
        blocks = panel.reshape(columns // group, -1)
        scales = np.ascontiguousarray(blocks[:, :128]).view(np.float16).T.astype(np.float32)
        flat = np.unpackbits(np.ascontiguousarray(blocks[:, 128:]), axis=1, bitorder="little")
        planes = flat.reshape(columns // group, group // 32, 4, bits, UNIT, 4, 2, 4).astype(np.int8)
        levels = sum(planes[:, :, :, p] << np.int8(p) for p in range(bits))
        codes = np.asarray(levels, np.int8).transpose(2, 3, 0, 1, 5, 4, 6).reshape(PANEL, columns)
        return quantized(self.format, codes=2 * codes - np.int8(1) if bits == 1 else codes - np.int8(1 << bits - 1), scales=scales)

    def seams(self) -> dict[str, Any]:
        return {"prepares": True}


def packing(format: DType) -> Packing | None:
    """The packing of a lookup format, or None when there is no kernel for it."""
    if not format.name.startswith("lut") or format.group not in GROUPS:
        return None
    return Lookup(format, "lookup", tuple(f"q8_g{g}" for g in GROUPS if format.group % g == 0))


EXAMPLES = ("lut1_g64", "lut2_g128", "lut3_g32", "lut4_g64")
"""Names that the tests of all formats try."""
