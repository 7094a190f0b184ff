"""Float weights: f32 [K][64] f32; bf16 [ceil(K/2)][64][2] bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.formats.base import PANEL, Bytes, Packing, padded, raw
from stemma.ir import DType


class F32(Packing):
    """A column of 64 f32 for every k."""

    def panel_bytes(self, columns: int) -> int:
        return columns * 256

    def pack_panel(self, rows: Any) -> Bytes:
        return raw(padded(rows.astype(np.float32), PANEL, rows.shape[1]).T)

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        return panel.view(np.float32).reshape(columns, PANEL).T


class Bf16(Packing):
    """Pairs of k: a dword an output."""

    def panel_bytes(self, columns: int) -> int:
        return -(-columns // 2) * 256

    def pack_panel(self, rows: Any) -> Bytes:
        bits = rows if rows.dtype == np.uint16 else bf16_bits(rows.astype(np.float32))
        pairs = np.ascontiguousarray(padded(bits, PANEL, bf16_row(rows.shape[1]))).view(np.uint32)
        return raw(pairs.T)

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        return panel.view(np.uint16).reshape(-1, PANEL, 2).transpose(1, 0, 2).reshape(PANEL, -1)[:, :columns]


def bf16_row(k: int) -> int:
    """Elements of one row of bf16 activations: `k` rounded up to even."""
    return -(-k // 2) * 2


def bf16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """f32 to bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    quiet = (u >> np.uint32(16)) | np.uint32(0x40)
    return np.where((u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), quiet, rounded).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 bit patterns to f32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def packing(format: DType) -> Packing | None:
    """The packing of a float type, or None."""
    if format.name == "f32":
        return F32(format, "uniform", ("f32",))
    return Bf16(format, "uniform", ("f32", "bf16")) if format.name == "bf16" else None


EXAMPLES = ("f32", "bf16")
"""Names that the tests of all formats try."""
