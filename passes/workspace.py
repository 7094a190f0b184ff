"""Results of a long calibration on disk, so that memory holds one at a time and an interrupted one goes on where it was.

A workspace is a folder per calibration, named by a hash of all that determines its results. A result is a set of arrays: one .npy
file each, and a receipt with their hashes that is written last. What the receipt does not vouch for is made again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stemma.ir import Array, PassError, Quantized

VERSION = "1"  # of what the passes compute: a new number makes old workspaces worthless


class Workspace:
    """Stores results under names, in `folder`/<key>; in a temporary folder that goes with this object when `folder` is None."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="stemma-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or "") / key[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PassError(f"The calibration cannot write to {self.folder}: {error.strerror}.") from None

    def save(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Write a result; PassError when the disk does not take it."""
        receipt = {}
        try:
            for part, array in arrays.items():
                path = self._path(name, part)
                np.save(path, np.ascontiguousarray(array), allow_pickle=False)
                receipt[part] = _sha256(path)
            partial = self._path(name, "partial")
            partial.write_text(json.dumps(receipt))
            partial.replace(self._receipt(name))
        except OSError as error:
            raise PassError(f"A result of the calibration cannot be written to {self.folder}: {error.strerror}.") from None

    def has(self, name: str, expected: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> bool:
        """Whether a whole, undamaged result of these parts is there: numpy type and shape of each."""
        try:
            receipt = json.loads(self._receipt(name).read_text())
            whole = isinstance(receipt, dict) and receipt.keys() == expected.keys()
            return whole and all(
                receipt[part] == _sha256(self._path(name, part)) and _same(self.part(name, part), type, shape)
                for part, (type, shape) in expected.items()
            )
        except (OSError, ValueError):
            return False

    def part(self, name: str, part: str) -> Array:
        """One array of a stored result, mapped: its rows are read when they are used. PassError when it is gone."""
        try:
            return np.asarray(np.load(self._path(name, part), mmap_mode="r", allow_pickle=False))
        except OSError as error:
            raise PassError(f"The result {self._path(name, part)} of the calibration cannot be read: {error}.") from None

    def _path(self, name: str, part: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.{part}.npy"

    def _receipt(self, name: str) -> Path:
        return self._path(name, "receipt").with_suffix(".json")


class StoredQuantized:
    """A quantized weight in a workspace, read by ranges of rows. shape: the logical one."""

    def __init__(self, workspace: Workspace, name: str, dtype: str, parts: Sequence[str]) -> None:
        self._workspace, self._name, self._dtype, self._parts = workspace, name, dtype, tuple(parts)
        self.shape: tuple[int, ...] = workspace.part(name, "codes").shape

    def __getitem__(self, rows: slice) -> Quantized:
        parts = {part: np.array(self._workspace.part(self._name, part)[rows]) for part in self._parts}
        return Quantized(self._dtype, parts)


def digest(*parts: Any) -> str:
    """A hash of texts and integer arrays, for the key of a workspace."""
    found = hashlib.sha256(VERSION.encode())
    for part in parts:
        data = np.ascontiguousarray(part, np.int64).tobytes() if isinstance(part, np.ndarray) else str(part).encode()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def identity(folder: Path) -> str:
    """Names, sizes and times of the weight files of a checkpoint: of the folder, or of the file itself."""
    files = [folder] if folder.is_file() else sorted(f for f in folder.iterdir() if f.is_file())
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return repr((str(folder.resolve()), stats))


def _same(array: Array, type: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    return array.dtype == type and array.shape == shape


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
