"""What the blocks of a GGUF file are in the IR: the same codes and scales, in a format that holds them exactly.

kind             format          how
F32 F16 BF16     f32 f16 bf16    as they are
Q4_0             int4_g32        code - 8
Q8_0             int8_g32        the code
Q5_0 IQ4_NL      int8_g32        code - 16, or the table's whole number: held exactly, in 8.5 bits a weight
TQ1_0 TQ2_0      ternary_g256    code - 1
Q2_K Q4_K Q5_K   q2_k q4_k q5_k  codes, sub-scales and minimums
Q6_K             q6_k            codes and sub-scales
Q3_K             q6_k            codes -4..3 and sub-scales -32..31: held exactly, in 6.56 bits a weight

The layouts are those of ggml-common.h, as gguf-py reads them. Other kinds have no format that holds them exactly, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemma.frontend.gguf import GgufTensor
from stemma.frontend.safetensors import Entry, StoredRows
from stemma.ir import Array, CheckpointError, Quantized, Tensor

Parts = dict[str, Array]
_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_MINIMUMS = "whose minimums in f16 no format here holds without rounding"
_REFUSED = {"Q4_1": _MINIMUMS, "Q5_1": _MINIMUMS}


@dataclass(frozen=True)
class Blocks:
    """A quantized tensor of a GGUF file. order: which of the file's rows each row is, None for the same; it moves rows nearby."""

    tensor: GgufTensor
    path: Path
    order: Array | None = None

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> str:
        return _DECODERS[self.tensor.kind.name][0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def bytes(self) -> int:
        return self.tensor.bytes

    @property
    def type(self) -> Tensor:
        return Tensor(self.dtype, self.shape)

    def load(self) -> Quantized:
        """All rows; CheckpointError when the file ends early or a scale is not finite."""
        return self[0 : self.shape[0]]

    def rows(self) -> Blocks:
        return self

    def __getitem__(self, part: slice) -> Quantized:
        start, stop, _ = part.indices(self.shape[0])
        kind = self.tensor.kind
        stored = Entry(self.name, self.path, "u8", (self.shape[0], self.bytes // self.shape[0]), self.tensor.offset, self.bytes)
        raw = _ordered(stored.rows(), start, stop, self.order)
        blocks = raw.reshape(len(raw), -1, kind.bytes)
        parts = _DECODERS[kind.name][1](blocks)
        for name, values in parts.items():
            if values.dtype == np.float32 and not np.isfinite(values).all():
                raise CheckpointError(
                    f"The weight {self.name!r} in {self.path} has scales that are NaN or infinite ({name}). The file is damaged."
                )
        codes = parts.pop("codes").reshape(len(raw), -1)
        if kind.name == "TQ2_0" and codes.max(initial=-1) > 1:
            raise CheckpointError(
                f"The weight {self.name!r} in {self.path} has codes that are not -1, 0 or 1. The file is damaged."
            )
        return Quantized(self.dtype, {"codes": codes} | {n: np.ascontiguousarray(v) for n, v in parts.items()})


@dataclass(frozen=True)
class OrderedRows:
    """A float tensor of a file whose rows are in another order there (see `Blocks`)."""

    entry: Entry
    order: Array

    def __getattr__(self, name: str) -> Any:
        return getattr(self.entry, name)

    def load(self) -> Array:
        return np.asarray(self.entry.load()[self.order])

    def rows(self) -> OrderedRows:
        return self

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(self.entry.shape[0])
        return _ordered(self.entry.rows(), start, stop, self.order)


def stored(tensor: GgufTensor, path: Path, order: Array | None = None) -> Blocks | Entry | OrderedRows:
    """A tensor of a file as the frontend reads tensors; CheckpointError when no format holds its values exactly."""
    kind = tensor.kind.name
    if kind in _FLOATS:
        entry = Entry(tensor.name, path, _FLOATS[kind], tensor.shape, tensor.offset, tensor.bytes)
        return entry if order is None else OrderedRows(entry, order)
    if kind not in _DECODERS or len(tensor.shape) != 2:
        reason = f"which is read for matrices, not {tensor.shape}" if kind in _DECODERS else _REFUSED.get(kind, "which is not read")
        raise CheckpointError(
            f"The tensor {tensor.name!r} in {path} is of the kind {kind}, {reason}. Read are "
            f"{', '.join((*_FLOATS, *_DECODERS))}: make such a file of the original model with llama.cpp's llama-quantize."
        )
    return Blocks(tensor, path, order)


def _ordered(rows: StoredRows, start: int, stop: int, order: Array | None) -> Array:
    """Rows start..stop after ordering, read in one piece of the file that holds them."""
    if order is None or start >= stop:
        return rows[start:stop]
    wanted = order[start:stop]
    first = int(wanted.min())
    return np.asarray(rows[first : int(wanted.max()) + 1][wanted - first])


def _f16(raw: Array) -> Array:
    """float32 values of f16 bytes [.., 2] -> [..]."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)


def _halves(raw: Array) -> Array:
    """Low nibbles, then high ones: [.., 16] -> [.., 32]."""
    return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1)


def _levels(raw: Array, width: int, bits: int) -> Array:
    """Codes of `bits` from runs of `width` bytes: all lowest bits of a run, then the next ones. [.., B] -> [.., B * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = raw.reshape(*raw.shape[:-1], -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return np.asarray(runs.reshape(*raw.shape[:-1], -1))


def _less(codes: Array, offset: int) -> Array:
    return np.asarray(codes.astype(np.int8) - np.int8(offset))


def _q4_0(b: Array) -> Parts:
    return {"codes": _less(_halves(b[..., 2:]), 8), "scales": _f16(b[..., :2])}


def _q5_0(b: Array) -> Parts:
    high = np.unpackbits(b[..., 2:6], axis=-1, bitorder="little")
    return {"codes": _less(_halves(b[..., 6:]) | high << np.uint8(4), 16), "scales": _f16(b[..., :2])}


def _q8_0(b: Array) -> Parts:
    return {"codes": np.ascontiguousarray(b[..., 2:]).view(np.int8), "scales": _f16(b[..., :2])}


def _iq4_nl(b: Array) -> Parts:
    return {"codes": _IQ4_NL[_halves(b[..., 2:])], "scales": _f16(b[..., :2])}


def _tq1_0(b: Array) -> Parts:
    """Five codes of base 3 a byte, as fractions: the next digit is the overflow of a product with 3."""
    digits = []
    for part, width, count in ((b[..., :32], 32, 5), (b[..., 32:48], 16, 5), (b[..., 48:52], 4, 4)):
        powers = np.array([3**i for i in range(count)], np.uint8)[:, None]
        digits.append((part.reshape(*part.shape[:-1], 1, width) * powers).reshape(*part.shape[:-1], -1))
    codes = np.concatenate(digits, axis=-1).astype(np.uint16) * np.uint16(3) >> np.uint16(8)
    return {"codes": _less(codes, 1), "scales": _f16(b[..., 52:])}


def _tq2_0(b: Array) -> Parts:
    return {"codes": _less(_levels(b[..., :64], 32, 2), 1), "scales": _f16(b[..., 64:])}


def _flat(parts: Array) -> Array:
    """Sub-blocks of all blocks of a row: [rows, blocks, S] -> [rows, blocks * S]."""
    return np.ascontiguousarray(parts.reshape(len(parts), -1))


def _q2_k(b: Array) -> Parts:
    codes = _levels(b[..., 16:80], 32, 2).astype(np.int8)
    scales = {"sub_scales": _flat(b[..., :16] & np.uint8(15)), "sub_minimums": _flat(b[..., :16] >> np.uint8(4))}
    return {"codes": codes, **scales, "d": _f16(b[..., 80:82]), "dmin": _f16(b[..., 82:])}


def _q3_k(b: Array) -> Parts:
    high = _levels(b[..., :32], 32, 1) ^ np.uint8(1)  # a set bit means that nothing is subtracted
    codes = _levels(b[..., 32:96], 32, 2).astype(np.int8) - (high << np.uint8(2)).astype(np.int8)
    scales = _halves(b[..., 96:104]) | _levels(b[..., 104:108], 4, 2) << np.uint8(4)
    return {"codes": codes, "sub_scales": _flat(_less(scales, 32)), "d": _f16(b[..., 108:])}


def _with_minimums(codes: Array, b: Array) -> Parts:
    """The parts of q4_k and q5_k, whose blocks begin alike: d, dmin, and scales and minimums of 6 bits in 12 bytes."""
    low, minimum, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = np.concatenate([low & np.uint8(63), high & np.uint8(15) | low >> np.uint8(2) & np.uint8(48)], axis=-1)
    minimums = np.concatenate([minimum & np.uint8(63), high >> np.uint8(4) | minimum >> np.uint8(2) & np.uint8(48)], axis=-1)
    sides = {"sub_scales": _flat(scales), "sub_minimums": _flat(minimums)}
    return {"codes": codes.astype(np.int8), **sides, "d": _f16(b[..., :2]), "dmin": _f16(b[..., 2:4])}


def _q4_k(b: Array) -> Parts:
    return _with_minimums(_levels(b[..., 16:], 32, 4), b)


def _q5_k(b: Array) -> Parts:
    return _with_minimums(_levels(b[..., 48:], 32, 4) | _levels(b[..., 16:48], 32, 1) << np.uint8(4), b)


def _q6_k(b: Array) -> Parts:
    codes = _levels(b[..., :128], 64, 4) | _levels(b[..., 128:192], 32, 2) << np.uint8(4)
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8)
    return {"codes": _less(codes, 32), "sub_scales": _flat(scales), "d": _f16(b[..., 208:])}


_DECODERS: dict[str, tuple[str, Callable[[Array], Parts]]] = {
    "Q4_0": ("int4_g32", _q4_0), "Q5_0": ("int8_g32", _q5_0), "Q8_0": ("int8_g32", _q8_0), "IQ4_NL": ("int8_g32", _iq4_nl),
    "Q2_K": ("q2_k", _q2_k), "Q3_K": ("q6_k", _q3_k), "Q4_K": ("q4_k", _q4_k), "Q5_K": ("q5_k", _q5_k),
    "Q6_K": ("q6_k", _q6_k), "TQ1_0": ("ternary_g256", _tq1_0), "TQ2_0": ("ternary_g256", _tq2_0),
}  # fmt: skip
"""By kind: the format, and the parts of blocks [rows, blocks, bytes]."""
