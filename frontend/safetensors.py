"""Reads safetensors files: headers at once, tensors one by one with plain reads, so that memory holds one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemma.ir import Array, CheckpointError, Tensor
from stemma.ir.types import numpy_dtype

_DTYPES = {"F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8",
           "U8": "u8", "BOOL": "bool"}  # fmt: skip
_CHUNK = 1 << 22  # elements read at a time: 8 MiB of bf16
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `dtype` is the IR's name, or safetensors' own for a type that the IR does not have ("F8_E4M3")."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    bytes: int

    @property
    def type(self) -> Tensor:
        """The stored type."""
        return Tensor(self.dtype, self.shape)

    def load(self) -> Array:
        """The values, bf16 widened to float32; CheckpointError when the file ends early or a float is not finite."""
        stored = numpy_dtype(self.dtype)
        values = np.empty(int(np.prod(self.shape)), np.float32 if self.dtype == "bf16" else stored)
        with open(self.path, "rb", buffering=0) as file:
            for start in range(0, len(values), _CHUNK):
                part = values[start : start + _CHUNK]
                raw = np.empty(len(part), stored) if self.dtype == "bf16" else part
                self._read(file.fileno(), raw, self.offset + start * stored.itemsize)
                if self.dtype == "bf16":
                    part.view(np.uint32)[:] = raw
                    part.view(np.uint32)[:] <<= 16
                if part.dtype.kind == "f" and not np.isfinite(part.sum(dtype=np.float64)):
                    self._reject(part)
        return values.reshape(self.shape)

    def rows(self) -> StoredRows:
        """The elements as they are stored, read by ranges of the first axis."""
        return StoredRows(self)

    def cells(self, start: int, stop: int) -> Array:
        """Columns start..stop of a matrix, as they are stored."""
        stored = numpy_dtype(self.dtype)
        rows, columns = self.shape
        values = np.empty((rows, stop - start), stored)
        with open(self.path, "rb", buffering=0) as file:
            for i, row in enumerate(values):
                self._read(file.fileno(), row, self.offset + (i * columns + start) * stored.itemsize)
        return values

    def _read(self, descriptor: int, target: Array, offset: int) -> None:
        view = memoryview(target.data).cast("B")
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(f"{self.path} ended inside the tensor {self.name!r}. It is truncated: copy it again.")
            view, offset = view[count:], offset + count

    def _reject(self, values: Array) -> None:
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise CheckpointError(
                f"The weight {self.name!r} in {self.path} holds NaN or infinite values ({bad} of the part just read). "
                "The model would print nonsense; use a checkpoint from before its training diverged."
            )


class StoredRows:
    """A tensor in its file (bf16 as uint16 bits): `rows[start:stop]` reads that range of the first axis, with no mapped pages."""

    def __init__(self, entry: Entry) -> None:
        self._entry, self.shape, self.dtype = entry, entry.shape, numpy_dtype(entry.dtype)

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(self.shape[0])
        values = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with open(self._entry.path, "rb", buffering=0) as file:
            self._entry._read(file.fileno(), values, self._entry.offset + start * row)
        return values


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file by name; CheckpointError when the file is no complete safetensors file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 0 < length <= size - 8 else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not text:
        raise CheckpointError(f"{path} is no safetensors file, or is truncated inside its header: copy or download it again.")
    try:
        header = json.loads(text)
        entries = {n: _entry(n, path, e, 8 + length) for n, e in header.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"The header of {path} is damaged ({error}): copy or download the file again.") from None
    end = max((e.offset + e.bytes for e in entries.values()), default=0)
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: its header describes {end} bytes, the file has {size}. Copy or download it again."
        )
    return entries


def _entry(name: str, path: Path, fields: Mapping[str, Any], base: int) -> Entry:
    start, end = (int(x) for x in fields["data_offsets"])
    shape = tuple(int(s) for s in fields["shape"])
    kind = str(fields["dtype"])
    dtype = _DTYPES.get(kind, kind)
    if not 0 <= start <= end or min(shape, default=0) < 0:
        raise ValueError(f"the tensor {name!r} has impossible offsets or a negative size")
    if kind in _DTYPES and end - start != int(np.prod(shape)) * numpy_dtype(dtype).itemsize:
        raise ValueError(f"the tensor {name!r} of the shape {shape} has {end - start} bytes")
    return Entry(name, path, dtype, shape, base + start, end - start)


def read_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by its stored name, from one file or from the shards of an index."""
    index = folder / INDEX
    if index.exists():
        return _read_shards(folder, index)
    single = folder / "model.safetensors"
    if single.exists():
        return read_header(single)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(found[0])
    if found:
        raise CheckpointError(
            f"{folder} has {len(found)} safetensors files but no {INDEX} that says which tensor is where. Copy the index too."
        )
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} has its weights only as pickled PyTorch files, which are not read because they can run code. Convert "
            "them in a Python of yours: transformers' from_pretrained(folder), then save_pretrained(new_folder)."
        )
    raise CheckpointError(f"{folder} has a configuration but no weights: there is no model.safetensors and no {INDEX}.")


def _read_shards(folder: Path, index: Path) -> dict[str, Entry]:
    try:
        places = {str(n): str(f) for n, f in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read as a safetensors index ({error}): copy or download it again.") from None
    shards = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (folder / file).exists():
            count = list(places.values()).count(file)
            raise CheckpointError(
                f"{index} lists the shard {file!r} with {count} tensors, but {folder} does not have it. Copy the missing file."
            )
        shards[file] = read_header(folder / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(
                f"{index} says that {name!r} is in {file}, which does not have it. The index and the shards are from "
                "different checkpoints."
            )
    return {name: shards[file][name] for name, file in places.items()}
