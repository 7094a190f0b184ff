"""Weights stored row by row, for kernels that read some rows only: contextual sparsity.

f32, bf16   plain
int8        K codes, then one f32 scale; padded to 64 bytes
int4_gG     per 128 k: 16 dwords, nibble t of dword i is code[k+16t+i] + 8; then K/G f16 scales; padded to 64 bytes
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.backends.cpu.formats.base import Bytes, padded, raw

NAMES = ("f32", "bf16", "int8", "int4_g32", "int4_g64", "int4_g128")


def row_bytes(columns: int, name: str) -> int:
    """Bytes of one stored row; ValueError for a format that is not stored by rows."""
    if name not in NAMES:
        raise ValueError(f"weights of {name} are not stored by rows; {', '.join(NAMES)} are")
    if name in ("f32", "bf16"):
        return columns * (4 if name == "f32" else 2)
    used = columns + 4 if name == "int8" else -(-columns // 128) * 64 + columns // int(name[6:]) * 2
    return -(-used // 64) * 64


def pack_rows(value: Any, name: str) -> Bytes:
    """Rows of a quantized weight in this layout."""
    rows, columns = value.shape
    if name == "int8":
        parts = [value.codes.view(np.uint8), value.scales.astype(np.float32).view(np.uint8)]
    else:
        codes = padded((value.codes + np.int8(8)).astype(np.uint8), rows, -(-columns // 128) * 128).reshape(rows, -1, 8, 16)
        bytes_ = codes[:, :, 0::2] | codes[:, :, 1::2] << np.uint8(4)  # [.., byte of the dword, dword]
        parts = [np.swapaxes(bytes_, 2, 3).reshape(rows, -1), value.scales.astype(np.float16).view(np.uint8)]
    return raw(padded(np.concatenate([p.reshape(rows, -1) for p in parts], axis=1), rows, row_bytes(columns, name)))
