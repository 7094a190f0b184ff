"""Codebooks with outliers (SqueezeLLM). Rows of a panel go by fours; a block is 16 dwords of codes, one a lane.

first    f16 codebooks [64][2^bits], f16 outliers [64][M], u16 columns [64][M]
nu4      [16 fours][blocks of 128][4 outputs][16] dwords; nibble j of dword i is the code of column 16*j + i of the block
nu3      [16 fours][blocks of 512][4 outputs][3][16] dwords; the 32 codes of lane i are columns 16*j + i; a dword has ten, the
         first lowest; bits 30 and 31 of the first and of the third dword are the low bits of codes 30 and 31, bits 30 and 31 of
         the second their highest
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.formats.base import PANEL, Bytes, Packing, padded, quantized, raw
from stemma.ir import DType
from stemma.ir.formats.codebook import Codebook

FOUR = 4  # outputs that the kernel multiplies at a time


class CodebookPacking(Packing):
    """Codes as indices for a table in a register, lanes along K."""

    @property
    def book(self) -> Codebook:
        """The format, with its own members."""
        assert isinstance(self.format, Codebook)
        return self.format

    @property
    def block(self) -> int:
        """Columns of a block."""
        return 128 if self.format.bits == 4 else 512

    def refusal(self, columns: int) -> str:
        return self.format.refusal(columns) if isinstance(self.format, Codebook) else ""

    def code_bytes(self, columns: int) -> int:
        """Bytes of the codes of a panel."""
        return PANEL * -(-columns // self.block) * self.block * self.format.bits // 8

    def panel_bytes(self, columns: int) -> int:
        return self.code_bytes(columns) + PANEL * (2 * (1 << self.format.bits) + 4 * self.book.outliers)

    def pack_panel(self, rows: Any) -> Bytes:
        k = rows.shape[1]
        blocks = -(-k // self.block)
        codes = padded(rows.codes, PANEL, blocks * self.block).astype(np.uint32)
        codes = codes.reshape(PANEL // FOUR, FOUR, blocks, -1, 16).transpose(0, 2, 1, 3, 4)
        if self.format.bits == 4:
            lanes = _joined(codes, 4)
        else:
            lanes = np.stack([_joined(codes[..., at : at + 10, :], 3) for at in (0, 10, 20)], axis=-2)
            last = codes[..., 30:, :]
            lanes[..., ::2, :] |= last << np.uint32(30)
            lanes[..., 1, :] |= _joined(last >> np.uint32(2), 1) << np.uint32(30)
        sides = [padded(rows.parts[n], PANEL, rows.parts[n].shape[1]) for n in ("codebook", "outliers", "columns")]
        return np.concatenate([*(raw(s.astype(t)) for s, t in zip(sides, _TYPES, strict=True)), raw(lanes)])

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        end, blocks = 0, -(-columns // self.block)
        lanes = panel[-self.code_bytes(columns) :].view(np.uint32).reshape(PANEL // FOUR, blocks, FOUR, -1, 16)
        if self.format.bits == 4:
            codes = _split(lanes[..., 0, :], 4, 8)
        else:
            last = lanes[..., ::2, :] >> np.uint32(30) | _split(lanes[..., 1, :] >> np.uint32(30), 1, 2) << np.uint32(2)
            codes = np.concatenate([*(_split(lanes[..., m, :], 3, 10) for m in range(3)), last], axis=-2)
        codes = codes.transpose(0, 2, 1, 3, 4).reshape(PANEL, -1)[:, :columns]
        sides = []
        for count, kind in zip((2**self.format.bits, self.book.outliers, self.book.outliers), _TYPES, strict=True):
            sides.append(panel[end : end + PANEL * count * 2].view(kind).reshape(PANEL, count))
            end += PANEL * count * 2
        codebook, outliers, places = sides
        return quantized(
            self.format, codes=codes.astype(np.int8), codebook=codebook.astype(np.float32),
            outliers=outliers.astype(np.float32), columns=places,
        )  # fmt: skip

    def seams(self) -> dict[str, Any]:
        return {"bits": self.format.bits, "outliers": self.book.outliers, "prepares": True}


_TYPES: tuple[Any, ...] = (np.float16, np.float16, np.uint16)


def _joined(fields: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Fields [.., n, 16] of so many bits as dwords [.., 16], the first lowest."""
    shifts = (np.arange(fields.shape[-2], dtype=np.uint32) * np.uint32(bits))[:, None]
    return np.asarray(np.bitwise_or.reduce(fields << shifts, axis=-2), np.uint32)


def _split(dwords: NDArray[np.uint32], bits: int, count: int) -> NDArray[np.uint32]:
    """The inverse of `_joined`: the first fields [.., count, 16]."""
    shifts = (np.arange(count, dtype=np.uint32) * np.uint32(bits))[:, None]
    return np.asarray(dwords[..., None, :] >> shifts & np.uint32(2**bits - 1))


def packing(format: DType) -> Packing | None:
    """The packing of a codebook format, or None."""
    if not isinstance(format, Codebook):
        return None
    return CodebookPacking(format, "codebook", ("f32", "q8_g32", "q8_g64", "q8_g128"))


EXAMPLES = ("nu3_o0", "nu4_o9")
"""Names that the tests of all formats try."""
