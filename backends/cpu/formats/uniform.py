"""Uniform formats. A unit is 16 outputs times one little-endian dword of consecutive k; a step is four units, 256 bytes.

int8      [ceil(K/4)][64][4] bytes code + 128, then the panel's 64 f32 scales
int4_gG   per group of G: 64 f16 scales, then [G/8][64] dwords; byte i of a dword is (code[k+i] + 8) | (code[k+4+i] + 8) << 4
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.backends.cpu.formats.base import PANEL, Bytes, Packing, padded, quantized, raw
from stemma.ir import DType

ACTIVATIONS = ("f32", "q8_g32", "q8_g64", "q8_g128")
GROUPS = (32, 64, 128)


class Int8(Packing):
    """Bytes, scales by row."""

    def panel_bytes(self, columns: int) -> int:
        return -(-columns // 4) * 256 + 256

    def pack_panel(self, rows: Any) -> Bytes:
        k = rows.shape[1]
        codes = padded(rows.codes.astype(np.int16), PANEL, -(-k // 4) * 4) + 128
        body = codes.astype(np.uint8).reshape(PANEL, -1, 4).transpose(1, 0, 2)
        return np.concatenate([raw(body), raw(padded(rows.scales.astype(np.float32), PANEL, 1))])

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        body = panel[:-256].reshape(-1, PANEL, 4).transpose(1, 0, 2).reshape(PANEL, -1)[:, :columns]
        return quantized(
            self.format, codes=(body.astype(np.int16) - 128).astype(np.int8), scales=panel[-256:].view(np.float32).reshape(-1, 1)
        )


class Int4(Packing):
    """Nibbles, scales by group."""

    def refusal(self, columns: int) -> str:
        group = self.format.group
        return f"{self.format.name} needs an input size that is a multiple of {group}, not {columns}" if columns % group else ""

    def panel_bytes(self, columns: int) -> int:
        group = self.format.group
        return columns // group * (128 + group * 32)

    def pack_panel(self, rows: Any) -> Bytes:
        k, group = rows.shape[1], self.format.group
        nibbles = (padded(rows.codes, PANEL, k) + np.int8(8)).astype(np.uint8).reshape(PANEL, k // group, group // 8, 2, 4)
        codes = (nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << np.uint8(4)).transpose(1, 2, 0, 3).reshape(k // group, -1)
        side = np.ascontiguousarray(padded(rows.scales.astype(np.float16), PANEL, k // group).T).view(np.uint8)
        return raw(np.concatenate([side, codes], axis=1))

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        group = self.format.group
        blocks = panel.reshape(columns // group, -1)
        scales = np.ascontiguousarray(blocks[:, :128]).view(np.float16).T.astype(np.float32)
        codes = blocks[:, 128:].reshape(columns // group, group // 8, PANEL, 1, 4)
        nibbles = np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=3).transpose(2, 0, 1, 3, 4)
        return quantized(self.format, codes=nibbles.reshape(PANEL, columns).astype(np.int8) - np.int8(8), scales=scales)


def packing(format: DType) -> Packing | None:
    """The packing of a uniform weight format, or None when there is no kernel for it."""
    if format.name == "int8":
        return Int8(format, "uniform", ACTIVATIONS)
    if format.name in {f"int4_g{g}" for g in GROUPS}:
        return Int4(format, "uniform", tuple(a for a in ACTIVATIONS if a == "f32" or format.group % int(a[4:]) == 0))
    return None


EXAMPLES = ("int8", "int4_g32", "int4_g64", "int4_g128")
"""Names that the tests of all formats try."""
