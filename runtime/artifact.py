"""Reading `.stemma` files: a stored zip whose weights are mapped in place, and every way such a file can be unusable.

Nothing in an artifact is unpickled or executed here. Opening checks the zip directory, the manifest, sizes, and the hash of
every member but the weights (gigabytes: `Artifact.check` hashes those too).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.runtime.errors import ArtifactError
from stemma.runtime.manifest import ABI, FORMAT, Manifest, parse_manifest

MANIFEST = "manifest.json"
HASH_CHUNK = 64 << 20
_LOCAL_HEADER = 30


class Artifact:
    """An open artifact. ArtifactError (one paragraph naming the file and the cure) when it cannot be used."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")
        except FileNotFoundError:
            raise ArtifactError(f"There is no file {self.path}. Give the path that `stemma compile -o` wrote.") from None
        except OSError as error:
            raise ArtifactError(f"Cannot open {self.path}: {error.strerror}. Give a readable .stemma file.") from None
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            self._zip = self._directory()
            self.manifest = self._manifest()
            self._check_members()
            self.weights = self._map_weights()
        except BaseException:
            self._file.close()
            raise

    def names(self) -> list[str]:
        """Names of the members, in the order of the file."""
        return self._zip.namelist()

    def __contains__(self, name: str) -> bool:
        return name in self._zip.NameToInfo

    def read(self, name: str) -> bytes:
        """One member, its hash checked. ArtifactError when it is absent or damaged."""
        if self._file.closed:
            raise ArtifactError(f"{self.path} was closed. Load it again to use it.")
        if name not in self:
            raise ArtifactError(f"{self.path} has no member {name!r}. It is incomplete: compile the model again.")
        try:
            data = self._zip.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise self._corrupt(f"its member {name!r} cannot be read ({error})") from None
        if name != MANIFEST and hashlib.sha256(data).hexdigest() != self.manifest.files.get(name):
            raise self._corrupt(f"its member {name!r} does not have the recorded hash")
        return data

    def check(self) -> Iterator[tuple[str, int]]:
        """Hash every member, weights included; yields (member, bytes) as each is found good. ArtifactError otherwise."""
        for name in self.names():
            if name == self.manifest.weights_member:
                digest = hashlib.sha256()
                for start in range(0, self.weights.size, HASH_CHUNK):
                    digest.update(self.weights[start : start + HASH_CHUNK].data)
                if digest.hexdigest() != self.manifest.weights_sha256:
                    raise self._corrupt(f"its weights ({name!r}) do not have the recorded hash")
                yield name, self.weights.size
            else:
                yield name, len(self.read(name))

    def close(self) -> None:
        """Close the file. Weights already mapped stay valid while something refers to them."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _corrupt(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path} is corrupt: {what}. Copy the file again, or compile the model again.")

    def _directory(self) -> zipfile.ZipFile:
        head = self._file.read(4)
        foreign = f"{self.path} is not a Stemma artifact"
        if head != b"PK\x03\x04":
            what = "it is empty" if not head else "it is not a zip file"
            raise ArtifactError(f"{foreign}: {what}. Give a file written by `stemma compile`.")
        try:
            archive = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise ArtifactError(
                f"{self.path} is truncated or damaged: the directory at its end is missing or unreadable"
                f" ({self.bytes} bytes are there). Copy the file again, or compile the model again."
            ) from None
        if MANIFEST not in archive.NameToInfo:
            raise ArtifactError(f"{foreign}: it has no {MANIFEST}. Give a file written by `stemma compile`.")
        return archive

    def _manifest(self) -> Manifest:
        try:
            raw: Any = json.loads(self.read(MANIFEST))
        except ValueError:
            raise self._corrupt(f"its {MANIFEST} is not JSON") from None
        version = raw.get("format") if isinstance(raw, dict) else None
        abi = raw.get("abi") if isinstance(raw, dict) else None
        for what, found, known in (("format", version, FORMAT), ("kernel interface", abi, ABI)):
            if type(found) is not int:
                raise self._corrupt(f"its {MANIFEST} has no version number of the {what}")
            if found != known:
                age, cure = ("newer", "Update Stemma") if found > known else ("older", "Compile the model again")
                raise ArtifactError(
                    f"{self.path} has {what} {found}, {age} than the {known} that this version of Stemma reads."
                    f" {cure}, or use the version that wrote the file ({raw.get('stemma', 'unknown')})."
                )
        try:
            return parse_manifest(raw)
        except ValueError as error:
            raise self._corrupt(f"its {MANIFEST} is not valid ({error})") from None

    def _check_members(self) -> None:
        """Every member the manifest lists is there, whole, and (weights apart) has its hash."""
        listed = {*self.manifest.files, self.manifest.weights_member, MANIFEST}
        if stray := sorted(set(self.names()) ^ listed):
            raise self._corrupt(f"its {MANIFEST} and its directory disagree about {', '.join(map(repr, stray))}")
        for name in self.manifest.files:
            if name != self.manifest.weights_member:
                self.read(name)

    def _map_weights(self) -> NDArray[np.uint8]:
        """The weights member as read-only memory of the file: u8[bytes]."""
        name, expected = self.manifest.weights_member, self.manifest.weights_bytes
        info = self._zip.NameToInfo[name]
        header = os.pread(self._file.fileno(), _LOCAL_HEADER, info.header_offset)
        if len(header) != _LOCAL_HEADER or header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
            raise self._corrupt(f"its member {name!r} is not stored where the directory says")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER + lengths
        if info.file_size != expected or start + expected > self.bytes:
            raise self._corrupt(f"its weights have {info.file_size} bytes where the manifest says {expected}")
        if start % mmap.PAGESIZE:
            raise self._corrupt(f"its weights start at byte {start}, not at a multiple of {mmap.PAGESIZE}")
        if expected == 0:
            return np.zeros(0, np.uint8)
        # The whole file is mapped, as offsets of a mapping must be multiples of the machine's allocation granularity.
        mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_WILLNEED"):
            page = start - start % mmap.PAGESIZE
            mapping.madvise(mmap.MADV_WILLNEED, page, start + expected - page)
        return np.frombuffer(mapping, np.uint8, expected, start)
