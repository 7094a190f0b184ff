"""Packing of linear weights into the panels that the CPU kernels stream, and back. Compile side only.

A panel is 64 outputs with all their K, contiguous; the last panel is padded with zero weights. Inside, a unit is 16 outputs times
one little-endian dword, holding 1 (f32), 2 (bf16), 4 (int8) or 8 (int4) consecutive k; a step is the panel's four units: 256 bytes.
  f32    [K][64] f32
  bf16   [ceil(K/2)][64][2] bf16 bits
  int8   [ceil(K/4)][64][4] bytes code + 128, then the panel's 64 f32 scales
  int4   per group of G: 64 f16 scales, then [G/8][64] dwords; byte i of a dword is (code[k+i] + 8) | (code[k+4+i] + 8) << 4
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PANEL = 64
UNIT = 16
GROUPS = (32, 64, 128)

Bytes = NDArray[np.uint8]


def weight_group(format: str) -> int:
    """The group size of an `int4_gG` format. Raises ValueError for anything else."""
    if format in {f"int4_g{group}" for group in GROUPS}:
        return int(format.removeprefix("int4_g"))
    raise ValueError(f"unknown packed weight format {format!r}; known: f32, bf16, int8, int4_g32, int4_g64, int4_g128")


def panel_bytes(k: int, format: str) -> int:
    """Bytes of one panel of 64 outputs with `k` inputs."""
    if format in ("f32", "bf16", "int8"):
        step = {"f32": 1, "bf16": 2, "int8": 4}[format]
        return -(-k // step) * 256 + (256 if format == "int8" else 0)
    group = weight_group(format)
    if k % group:
        raise ValueError(
            f"{format} needs the input size to be a multiple of {group}, got {k}; choose a smaller group or another format"
        )
    return k // group * (128 + group * 32)


def linear_bytes(n: int, k: int, format: str) -> int:
    """Bytes of a packed weight of `n` outputs and `k` inputs."""
    return -(-n // PANEL) * panel_bytes(k, format)


def bf16_row(k: int) -> int:
    """Elements of one row of bf16 activations: `k` rounded up to even."""
    return -(-k // 2) * 2


def q8_row_bytes(k: int, group: int) -> int:
    """Bytes of one row of q8 activations: codes padded to 64, then f32 scales and i32 sums of codes per group, padded to 64."""
    return -(-(-(-k // 64) * 64 + -(-k // group) * 8) // 64) * 64


def pair_order(f: int) -> NDArray[np.int64]:
    """Row order of concat(gate, up), each `f` rows, for a linear kernel with `pair`: 16 rows of gate, 16 of up, and so on."""
    if f % UNIT:
        raise ValueError(f"a paired linear needs each half to have a multiple of {UNIT} outputs, got {f}")
    index = np.arange(f).reshape(-1, 1, UNIT)
    return np.concatenate([index, index + f], axis=1).reshape(-1)


def bf16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """f32 to bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (u >> np.uint32(16)) | np.uint32(0x40)
    return np.where((u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), quiet, rounded).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 bit patterns to f32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _padded(a: NDArray[np.generic], rows: int, columns: int) -> NDArray[np.generic]:
    if a.shape == (rows, columns):
        return a
    return np.pad(a, ((0, rows - a.shape[0]), (0, columns - a.shape[1])))


def _pack_panel(w: NDArray[np.generic], format: str, scales: NDArray[np.generic] | None) -> Bytes:
    """One panel from at most 64 rows of values or codes."""
    k = w.shape[1]
    if format == "f32":
        return _padded(w.astype(np.float32), PANEL, k).T.copy().view(np.uint8).reshape(-1)
    if format == "bf16":
        bits = w if w.dtype == np.uint16 else bf16_bits(w.astype(np.float32))
        pairs = np.ascontiguousarray(_padded(bits, PANEL, bf16_row(k))).view(np.uint32)
        return np.ascontiguousarray(pairs.T).view(np.uint8).reshape(-1)
    if scales is None:
        raise ValueError(f"packing {format} needs scales")
    if format == "int8":
        codes = _padded(w.astype(np.int16), PANEL, -(-k // 4) * 4) + 128
        body = codes.astype(np.uint8).reshape(PANEL, -1, 4).transpose(1, 0, 2).reshape(-1)
        return np.concatenate([body, _padded(scales.astype(np.float32).reshape(-1, 1), PANEL, 1).copy().view(np.uint8).reshape(-1)])
    group = weight_group(format)
    nibbles = (_padded(w, PANEL, k).astype(np.int8) + np.int8(8)).astype(np.uint8).reshape(PANEL, k // group, group // 8, 2, 4)
    codes4 = (nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << np.uint8(4)).transpose(1, 2, 0, 3).reshape(k // group, -1)
    side = np.ascontiguousarray(_padded(scales.astype(np.float16), PANEL, k // group).T).view(np.uint8)
    return np.concatenate([side, codes4], axis=1).reshape(-1)


def pack_panels(weight: NDArray[np.generic], format: str, scales: NDArray[np.generic] | None = None) -> Iterator[Bytes]:
    """The packed weight, one panel at a time, so that a large weight is never held twice.

    weight: [N, K] floats (or uint16 bf16 bits) for f32 and bf16, int8 codes for int8 (-127..127) and int4_gG (-8..7).
    scales: f32 [N] for int8, f16 [N, K/G] for int4_gG. Raises ValueError for shapes that do not fit the format.
    """
    n, k = weight.shape
    panel_bytes(k, format)
    expected = (
        {"f32": None, "bf16": None, "int8": (n,)}[format] if format in ("f32", "bf16", "int8") else (n, k // weight_group(format))
    )
    if (None if scales is None else scales.shape) != expected:
        raise ValueError(
            f"packing {format} of {n} x {k} needs scales of shape {expected}, got {None if scales is None else scales.shape}"
        )
    for first in range(0, n, PANEL):
        rows = slice(first, first + PANEL)
        yield _pack_panel(np.asarray(weight[rows]), format, None if scales is None else np.asarray(scales[rows]))


def pack_linear(weight: NDArray[np.generic], format: str, scales: NDArray[np.generic] | None = None) -> Bytes:
    """All panels of `pack_panels` in one array of `linear_bytes` bytes."""
    return np.concatenate(list(pack_panels(weight, format, scales)))


def unpack_linear(packed: Bytes, n: int, k: int, format: str) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """The inverse of `pack_linear`: (f32 values | uint16 bf16 bits | int8 codes [n, k], scales or None)."""
    panels = np.ascontiguousarray(packed).reshape(-(-n // PANEL), panel_bytes(k, format))
    count = panels.shape[0]
    if format == "f32":
        values = panels.view(np.float32).reshape(count, k, PANEL).transpose(0, 2, 1)
        return values.reshape(-1, k)[:n].copy(), None
    if format == "bf16":
        bits = panels.view(np.uint16).reshape(count, -1, PANEL, 2).transpose(0, 2, 1, 3)
        return bits.reshape(count * PANEL, -1)[:n, :k].copy(), None
    if format == "int8":
        body = panels[:, :-256].reshape(count, -1, PANEL, 4).transpose(0, 2, 1, 3).reshape(count * PANEL, -1)
        scales = np.ascontiguousarray(panels[:, -256:]).view(np.float32).reshape(-1)
        return (body[:n, :k].astype(np.int16) - 128).astype(np.int8), scales[:n].copy()
    group = weight_group(format)
    blocks = panels.reshape(count, k // group, -1)
    halves = np.ascontiguousarray(blocks[:, :, :128]).view(np.float16).transpose(0, 2, 1).reshape(-1, k // group)
    codes = blocks[:, :, 128:].reshape(count, k // group, group // 8, PANEL, 1, 4)
    nibbles = np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=4).transpose(0, 3, 1, 2, 4, 5)
    return (nibbles.reshape(-1, k)[:n].astype(np.int8) - np.int8(8)), halves[:n].copy()
