"""Writing `.stemma` files: a stored zip with aligned members, streamed, and either whole or absent.

The file is written under a temporary name in the same folder, synced, and renamed; any exception (Ctrl-C included) removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemma.ir.errors import CompileError

ALIGNMENT = 4096
MANIFEST = "manifest.json"
_LOCAL_HEADER, _ZIP64_EXTRA, _EXTRA_HEADER = 30, 20, 4
_PADDING_ID = 0xD935  # the extra-field id that Android's zipalign uses for padding
_LARGE = 1 << 30  # members from this size on get 64-bit sizes
_OVERHEAD = 1 << 20  # headers, padding and manifest, for the check of free space


@dataclass(frozen=True)
class Stream:
    """A member too large to hold: `size` bytes that come as `chunks`."""

    size: int
    chunks: Iterable[bytes | memoryview]


Member = tuple[str, bytes | Stream]


def write_artifact(path: str | os.PathLike[str], manifest: dict[str, Any], members: Iterable[Member]) -> None:
    """Write `members` and then `manifest` to `path`, atomically.

    The manifest is serialised last, with `files` (sha256 of every member) and the `sha256` and `bytes` of `weights` filled in
    from what was written; so a chunk iterator may still complete the rest of it. CompileError when the folder is missing or
    cannot be written, the disk is full, or a stream has not the size it announced.
    """
    target = Path(path)
    partial = _partial(target)
    file = _open(partial, target)
    try:
        with file:
            files: dict[str, str] = {}
            with contextlib.closing(_Zip(file, target)) as archive:
                for name, data in members:
                    if name in files or name == MANIFEST:
                        raise CompileError(f"The member {name!r} was given twice to the artifact {target}.")
                    files[name] = archive.add(name, data if isinstance(data, Stream) else Stream(len(data), [data]))
                _complete(manifest, files, archive.sizes)
                text = json.dumps(manifest, indent=1).encode()
                archive.add(MANIFEST, Stream(len(text), [text]))
                archive.finish()
            with _writing(target):
                file.flush()
                os.fsync(file.fileno())
        with _writing(target):
            os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def amend(path: str | os.PathLike[str], change: Callable[[dict[str, Any]], object]) -> None:
    """Write the artifact again with its manifest changed in place by `change`; its other members stay as they are."""
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read(MANIFEST))
        change(manifest)
        entries = [e for e in archive.infolist() if e.filename != MANIFEST]
        write_artifact(path, manifest, ((e.filename, Stream(e.file_size, _chunks(archive, e))) for e in entries))


def _chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(entry) as member:
        while chunk := member.read(1 << 24):
            yield chunk


def check_output(path: str | os.PathLike[str]) -> None:
    """CompileError, now rather than after minutes of work, when an artifact cannot be written to `path`."""
    target = Path(path)
    partial = _partial(target)
    _open(partial, target).close()
    partial.unlink()


def _partial(target: Path) -> Path:
    if target.is_dir():
        raise CompileError(f"Cannot write {target}: it is a folder. Give a file name, such as {target / 'model.stemma'}.")
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def _complete(manifest: dict[str, Any], files: dict[str, str], sizes: Mapping[str, int]) -> None:
    manifest["files"] = files
    weights = manifest.get("weights")
    if not isinstance(weights, dict) or weights.get("member") not in files:
        raise CompileError("The manifest names no weights member, or one that was not written.")
    weights |= {"sha256": files[weights["member"]], "bytes": sizes[weights["member"]]}


def _open(partial: Path, target: Path) -> Any:
    try:
        return open(partial, "w+b")
    except FileNotFoundError:
        raise CompileError(f"Cannot write {target}: the folder {target.parent} does not exist. Create it first.") from None
    except OSError as error:
        raise CompileError(f"Cannot write {target}: {error.strerror}. Choose an output that you may write to.") from None


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn a failed write into one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _full(target, f"{error.strerror}") from None
        raise CompileError(f"Writing {target} failed: {error.strerror}. Nothing was left behind.") from None


def _full(target: Path, what: str) -> CompileError:
    return CompileError(
        f"There is no room to write {target}: {what}. Nothing was left behind; free some space in {target.parent}"
        " or choose another output folder."
    )


class _Zip:
    """A zip file being written: members stored, each one's data at a multiple of ALIGNMENT."""

    def __init__(self, file: Any, target: Path) -> None:
        self._file, self._target = file, target
        self._zip: zipfile.ZipFile | None = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self.sizes: dict[str, int] = {}

    def add(self, name: str, stream: Stream) -> str:
        """Write one member and return the sha256 of its data."""
        assert self._zip is not None
        free = shutil.disk_usage(self._target.absolute().parent).free
        if stream.size + _OVERHEAD > free:
            raise _full(self._target, f"{stream.size} more bytes are needed and {free} are free")
        # The date is fixed, so equal models give equal files.
        info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        info.external_attr = 0o644 << 16
        large = stream.size >= _LARGE
        header = _LOCAL_HEADER + len(name.encode()) + (_ZIP64_EXTRA if large else 0) + _EXTRA_HEADER
        padding = -(self._file.tell() + header) % ALIGNMENT
        info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        digest, written = hashlib.sha256(), 0
        with _writing(self._target):
            member = self._zip.open(info, "w", force_zip64=large)
        try:
            if self._file.tell() % ALIGNMENT:
                raise CompileError(f"The member {name!r} of {self._target} was not aligned; report this as a bug.")
            for chunk in stream.chunks:
                view = memoryview(chunk).cast("B")
                digest.update(view)
                written += len(view)
                with _writing(self._target):
                    member.write(view)
            if written != stream.size:
                raise CompileError(f"The member {name!r} has {written} bytes, but {stream.size} were announced.")
        finally:
            with _writing(self._target):
                member.close()
        info.extra = b""  # the central directory needs no padding
        self.sizes[name] = written
        return digest.hexdigest()

    def finish(self) -> None:
        """Write the directory."""
        assert self._zip is not None
        archive, self._zip = self._zip, None
        with _writing(self._target):
            archive.close()

    def close(self) -> None:
        """Give up without a directory, unless `finish` was reached: the file is about to be removed."""
        if self._zip is not None:
            archive, self._zip = self._zip, None
            archive.fp = None  # ZipFile.close (also called by its finalizer) would write a directory
