"""Reads GGUF files: magic, version, metadata and tensor descriptions at once; of the tensors' data only where it lies.

    "GGUF", u32 version, u64 tensors, u64 entries
    entries:  string key, u32 type, value                            strings: u64 bytes, UTF-8
    tensors:  string name, u32 axes, u64 sizes (fastest first), u32 kind, u64 offset from the start of the data
    padding to general.alignment (32 by default), data

Everything is little-endian. Every count is checked against the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemma.ir import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_AXES = 4
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class Kind:
    """How elements are stored: `bytes` for every `block` of a row."""

    name: str
    block: int
    bytes: int


KINDS = {
    0: Kind("F32", 1, 4), 1: Kind("F16", 1, 2), 2: Kind("Q4_0", 32, 18), 3: Kind("Q4_1", 32, 20), 6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24), 8: Kind("Q8_0", 32, 34), 10: Kind("Q2_K", 256, 84), 11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144), 13: Kind("Q5_K", 256, 176), 14: Kind("Q6_K", 256, 210),
    16: Kind("IQ2_XXS", 256, 66), 17: Kind("IQ2_XS", 256, 74), 18: Kind("IQ3_XXS", 256, 98), 19: Kind("IQ1_S", 256, 50),
    20: Kind("IQ4_NL", 32, 18), 21: Kind("IQ3_S", 256, 110), 22: Kind("IQ2_S", 256, 82), 23: Kind("IQ4_XS", 256, 136),
    24: Kind("I8", 1, 1), 25: Kind("I16", 1, 2), 26: Kind("I32", 1, 4), 27: Kind("I64", 1, 8), 28: Kind("F64", 1, 8),
    29: Kind("IQ1_M", 256, 56), 30: Kind("BF16", 1, 2), 34: Kind("TQ1_0", 256, 54), 35: Kind("TQ2_0", 256, 66),
    39: Kind("MXFP4", 32, 17),
}  # fmt: skip
"""Kinds by their number in ggml.h; not all of them can be used (see `gguf_blocks`)."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. shape: slowest axis first, as everywhere else; offset: of its first byte in the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Gguf:
    """A file: its metadata by key (numbers, truth values, strings, lists of those), and its tensors by name."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file is meant as GGUF: by its first bytes, or by its name."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC or path.suffix == ".gguf"
    except OSError:
        return path.suffix == ".gguf"


def read_gguf(path: Path) -> Gguf:
    """The description of a file; CheckpointError when it is no complete GGUF file of a known version."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with the four letters GGUF.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).file()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


class _Reader:
    """Reads from front to back. `end` is the size of the file, `at` the next byte."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, len(MAGIC), len(data)

    def file(self) -> Gguf:
        version = self.number(4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is a big-endian GGUF file" if swapped in VERSIONS else f"is GGUF of version {version}"
            raise CheckpointError(
                f"{self.path} {what}; little-endian files of the versions 2 and 3 are read. Convert the model again."
            )
        tensors, entries = self.number(8), self.number(8)
        self.fits(entries, 8 + 4 + 1, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text("a metadata key")
            if key in metadata:
                raise self.damaged(f"it has two metadata entries {key!r}")
            metadata[key] = self.value(self.number(4), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.damaged(f"its alignment is {alignment!r}, no power of two")
        self.fits(tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        described = [self.tensor() for _ in range(tensors)]
        base = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in described:
            if name in found:
                raise self.damaged(f"it has two tensors {name!r}")
            found[name] = self.placed(name, shape, kind, offset, base, alignment)
        return Gguf(self.path, version, metadata, found)

    def tensor(self) -> tuple[str, tuple[int, ...], Kind, int]:
        """Name, shape, kind and offset within the data of the next tensor."""
        name = self.text("a tensor's name")
        axes = self.number(4)
        if not 1 <= axes <= _AXES:
            raise self.damaged(f"the tensor {name!r} has {axes} axes")
        shape = tuple(self.number(8) for _ in range(axes))[::-1]
        number = self.number(4)
        if number not in KINDS:
            raise CheckpointError(
                f"The tensor {name!r} in {self.path} is of the kind {number}, which is not known. The file is damaged, or newer "
                "than this reader."
            )
        return name, shape, KINDS[number], self.number(8)

    def placed(self, name: str, shape: tuple[int, ...], kind: Kind, offset: int, base: int, alignment: int) -> GgufTensor:
        """The tensor, after checks that it lies in the file."""
        if min(shape) < 1 or shape[-1] % kind.block:
            raise self.damaged(f"the tensor {name!r} of the kind {kind.name} has the shape {shape}")
        size = math.prod(shape) // kind.block * kind.bytes
        if offset % alignment:
            raise self.damaged(f"the tensor {name!r} is not aligned to {alignment} bytes")
        if base + offset + size > self.end:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: the tensor {name!r} ends at byte {base + offset + size}, the file has "
                f"{self.end}. Copy or download it again."
            )
        return GgufTensor(name, kind, shape, base + offset, size)

    def value(self, kind: int, key: str) -> Any:
        """A metadata value of a type."""
        if kind in _SCALARS:
            (number,) = struct.unpack(_SCALARS[kind], self.take(struct.calcsize(_SCALARS[kind])))
            return bool(number) if kind == _BOOL else number
        if kind == _STRING:
            return self.text(f"the value of {key!r}")
        if kind != _ARRAY:
            raise self.damaged(f"the metadata entry {key!r} is of the type {kind}, which is not known")
        inner, count = self.number(4), self.number(8)
        if inner == _STRING:
            self.fits(count, 8, f"strings in {key!r}")
            return [self.text(f"an item of {key!r}") for _ in range(count)]
        if inner not in _SCALARS:
            raise self.damaged(f"the metadata entry {key!r} is an array of the type {inner}, which is not read")
        form = np.dtype(_SCALARS[inner])
        self.fits(count, form.itemsize, f"items in {key!r}")
        items = np.frombuffer(self.take(count * form.itemsize), form).tolist()
        return list(map(bool, items)) if inner == _BOOL else items

    def text(self, what: str) -> str:
        count = self.number(8)
        self.fits(count, 1, f"bytes in {what}")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is no UTF-8") from None

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def take(self, count: int) -> bytes:
        if self.at + count > self.end:
            raise CheckpointError(f"{self.path} is truncated inside its header. Copy or download it again.")
        self.at += count
        return self.data[self.at - count : self.at]

    def fits(self, count: int, size: int, what: str) -> None:
        """CheckpointError when so many things of at least `size` bytes cannot be in the rest of the file."""
        if count * size > self.end - self.at:
            raise self.damaged(f"it announces {count} {what}, which cannot be in the {self.end - self.at} bytes that are left")

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged: {what}. Copy or download it again.")
