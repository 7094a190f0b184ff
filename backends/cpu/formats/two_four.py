"""2:4 sparse int4. Per group of N columns 64 f16 scales, then steps of 8 columns, 192 bytes each:

codes    [64] times two pairs of bytes: byte i of an output is (a + 8) | (b + 8) << 4, a the i-th of the two kept codes of columns
         0..3, b that of columns 4..7
masks    [4 units of 16 outputs] u64 of columns 0..3, u64 of columns 4..7: four bits an output, of which two are set
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.backends.cpu.formats.base import PANEL, Bytes, Packing, padded, quantized, raw
from stemma.ir import DType
from stemma.ir.formats.two_four import TwoFour, keep

STEP, STEP_BYTES = 8, 192


class TwoFourInt4(Packing):
    """Two codes and a mask of every four."""

    def refusal(self, columns: int) -> str:
        group = self.format.group
        return f"{self.format.name} needs an input size that is a multiple of {group}, not {columns}" if columns % group else ""

    def panel_bytes(self, columns: int) -> int:
        group = self.format.group
        return columns // group * (2 * PANEL + group // STEP * STEP_BYTES)

    def pack_panel(self, rows: Any) -> Bytes:
        k, group = rows.shape[1], self.format.group
        fours = padded(rows.codes, PANEL, k).reshape(PANEL, k // 4, 4)
        if (np.count_nonzero(fours, axis=2) > 2).any():
            raise ValueError(
                f"a weight of {self.format.name} has more than two codes that are not 0 among four consecutive columns"
            )
        kept = keep((fours != 0).astype(np.int8))
        both = (fours[kept] + np.int8(8)).astype(np.uint8).reshape(PANEL, k // STEP, 2, 2)
        codes = (both[:, :, 0] | both[:, :, 1] << np.uint8(4)).transpose(1, 0, 2).reshape(k // STEP, 2 * PANEL)
        bits = np.packbits(kept.reshape(PANEL // 2, 2, k // STEP, 2, 4).transpose(2, 3, 0, 1, 4), bitorder="little")
        masks = bits.reshape(k // STEP, 2, 4, 8).transpose(0, 2, 1, 3).reshape(k // STEP, 64)
        body = np.concatenate([codes, masks], axis=1).reshape(k // group, -1)
        side = np.ascontiguousarray(padded(rows.scales.astype(np.float16), PANEL, k // group).T).view(np.uint8)
        return raw(np.concatenate([side, body], axis=1))

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        group = self.format.group
        blocks = panel.reshape(columns // group, -1)
        scales = np.ascontiguousarray(blocks[:, : 2 * PANEL]).view(np.float16).T.astype(np.float32)
        steps = blocks[:, 2 * PANEL :].reshape(-1, STEP_BYTES)
        packed = steps[:, : 2 * PANEL].reshape(-1, PANEL, 1, 2)
        both = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).transpose(1, 0, 2, 3)
        masks = np.ascontiguousarray(steps[:, 2 * PANEL :].reshape(-1, 4, 2, 8).transpose(0, 2, 1, 3))
        bits = np.unpackbits(masks.reshape(-1), bitorder="little").reshape(-1, 2, PANEL, 4).transpose(2, 0, 1, 3)
        codes = np.zeros((PANEL, columns // STEP, 2, 4), np.int8)
        codes[bits.astype(np.bool_)] = both.reshape(-1).astype(np.int8) - np.int8(8)
        return quantized(self.format, codes=codes.reshape(PANEL, columns), scales=scales)

    def seams(self) -> dict[str, Any]:
        return {"group": self.format.group}


def packing(format: DType) -> Packing | None:
    """The packing of a 2:4 format, or None."""
    if not isinstance(format, TwoFour):
        return None
    rounded = tuple(f"q8_g{g}" for g in (32, 64, 128) if format.group % g == 0)
    return TwoFourInt4(format, "two_four", ("f32", *rounded))


EXAMPLES = ("int4_g64_2of4", "int4_g128_2of4")
"""Names that the tests of all formats try."""
