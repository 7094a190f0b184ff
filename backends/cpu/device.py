"""The device half of the CPU backend: loads a kernel library, chooses its variant, owns memory, makes native calls.

Needs the standard library and numpy only. `_SIGNATURES` lists what every library exports.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.runtime.errors import DeviceError, InputError

ABI = 2
PAGE = 4096
HUGE_PAGE = 2 << 20
_ERROR_BYTES = 1024


class NativeTensor(ctypes.Structure):
    """StemmaTensor of the native interface: a row-major array that stays with its owner. dtype: 0 f32, 1 i32, 2 i64, 3 bool."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("data", ctypes.c_void_p),
    ]


_VOID, _INT, _LONG, _CHARS = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "stemma_variants": (_CHARS, []),
    "stemma_supported": (_INT, [_CHARS]),
    "stemma_open": (_VOID, [_CHARS, _VOID, _INT, _VOID, _LONG]),
    "stemma_close": (None, [_VOID]),
    "stemma_arena_bytes": (_LONG, [_VOID, _INT, _VOID]),
    "stemma_call": (_INT, [_VOID, _INT, _VOID, _VOID, _VOID]),
    "stemma_set_weights": (None, [_VOID, _VOID]),
    "stemma_set_profile": (None, [_VOID, _INT]),
    "stemma_profile": (_LONG, [_VOID, _VOID, _LONG]),
    "stemma_probe": (ctypes.c_double, [_VOID, _INT, _VOID, _LONG, _LONG]),
    "stemma_machine_open": (_VOID, [_VOID, _CHARS, _LONG, _VOID, _LONG]),
    "stemma_machine_close": (None, [_VOID]),
    "stemma_machine_start": (_LONG, [_VOID, _CHARS, _VOID, _LONG, _VOID, _LONG]),
    "stemma_machine_advance": (_INT, [_VOID, _LONG, _LONG]),
    "stemma_machine_status": (_INT, [_VOID, _LONG, _VOID]),
    "stemma_machine_tokens": (_LONG, [_VOID, _LONG, _LONG, _VOID, _LONG]),
    "stemma_machine_error": (_CHARS, [_VOID, _LONG]),
    "stemma_machine_request": (_LONG, [_VOID, _LONG, _VOID, _VOID, _LONG]),
    "stemma_machine_reply": (_INT, [_VOID, _LONG, _VOID, _CHARS]),
    "stemma_machine_result": (_INT, [_VOID, _LONG, _CHARS, _VOID]),
    "stemma_machine_release": (None, [_VOID, _LONG]),
    "stemma_machine_statistics": (_LONG, [_VOID, _LONG, _VOID, _LONG]),
}


def allocate(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed, page-aligned memory, committed by the system when first touched; large blocks ask for huge pages."""
    # Private, as Python's default (shared) memory belongs to a file system that gives no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if nbytes < HUGE_PAGE:
        memory = np.frombuffer(mmap.mmap(-1, max(nbytes, 1), flags), np.uint8)
        return memory[:nbytes]
    block = mmap.mmap(-1, nbytes + HUGE_PAGE, flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without huge pages: ordinary ones do the same work
            pass
    memory = np.frombuffer(block, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + nbytes]


def copy_weights(weights: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy in memory that asks for huge pages, made by two threads (the zeroing of pages costs as much as the copy)."""
    copy = allocate(weights.size)
    middle = weights.size // 2
    other = threading.Thread(target=np.copyto, args=(copy[:middle], weights[:middle]))
    other.start()
    np.copyto(copy[middle:], weights[middle:])
    other.join()
    return copy


class Turns:
    """A lock that threads get in the order in which they asked, so that one which asks again and again keeps nobody out."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            self._waiting.append(gate)
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C while waiting; the turn may have come at the same moment
            with self._guard:
                mine = gate not in self._waiting
                if not mine:
                    self._waiting.remove(gate)
            if mine:
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


def available_threads() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Device:
    """One opened kernel library with its weights: an instance of the model's native half.

    `library` is the shared library's bytes, `weights` u8 memory that the kernels read in place, `variant` one of the library's
    instruction-set variants (default: $STEMMA_VARIANT, else the best one this machine has), `threads` the size of the
    team (default: $STEMMA_THREADS, else the processors available). DeviceError when the machine cannot run it.
    """

    def __init__(
        self,
        library: bytes,
        weights: NDArray[np.uint8],
        *,
        variant: str | None = None,
        threads: int | None = None,
        source: str = "the library",
    ) -> None:
        self._handle: int | None = None
        self._arena = np.zeros(0, np.uint8)
        self._library, self.source = _load(library, source), source
        self.variants: tuple[str, ...] = tuple(self._library.stemma_variants().decode().split(","))
        self.supported = tuple(v for v in self.variants if self._library.stemma_supported(v.encode()))
        self.variant = self._choose(variant or os.environ.get("STEMMA_VARIANT") or None)
        self.threads = _threads(threads)
        self._weights = weights
        self._handle = self._open(weights)
        self._reserve(PAGE)
        self.lock = Turns()
        self._machines: weakref.WeakSet[Machine] = weakref.WeakSet()
        self._mover: threading.Thread | None = None

    def _open(self, weights: NDArray[np.uint8]) -> int:
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        handle: int | None = self._library.stemma_open(
            self.variant.encode(), weights.ctypes.data, self.threads, ctypes.addressof(error), _ERROR_BYTES
        )
        if not handle:
            raise DeviceError(f"The kernels of {self.source} did not start: {error.value.decode(errors='replace')}")
        return handle

    def move_to_huge_pages(self) -> None:
        """Copy the weights into huge pages in the background, and use the copy from the next call after that on."""
        self._mover = threading.Thread(target=self._move, daemon=True)
        self._mover.start()

    def _move(self) -> None:
        copy = copy_weights(self._weights)
        with self.lock:
            if self._handle is None:
                return
            self._library.stemma_set_weights(self._handle, copy.ctypes.data)
            self._weights = copy

    def _choose(self, wanted: str | None) -> str:
        compiled = ", ".join(self.variants)
        if wanted is None:
            if not self.supported:
                raise DeviceError(
                    f"This machine has none of the instruction sets that {self.source} was compiled for ({compiled})."
                    " Compile the model again with the variant 'portable' included."
                )
            return self.supported[0]
        if wanted not in self.variants:
            raise DeviceError(f"{self.source} has no kernel variant {wanted!r}. Choose one of {compiled}.")
        if wanted not in self.supported:
            raise DeviceError(
                f"This machine lacks the instruction set of the kernel variant {wanted!r} of {self.source}."
                f" Choose one of {', '.join(self.supported) or 'another artifact'}, or leave the choice to Stemma."
            )
        return wanted

    @property
    def handle(self) -> int:
        """The native model; DeviceError after `close`."""
        if self._handle is None:
            raise DeviceError(f"The model of {self.source} was closed. Load it again to use it.")
        return self._handle

    def launch(self, index: int, sizes: int, buffers: int) -> Launch:
        """A prepared call of the function `index`, which takes that many sizes and buffers."""
        return Launch(self, index, sizes, buffers)

    def machine(self, blob: bytes) -> Machine:
        """A machine that runs the programs of `blob` on this model. DeviceError when they do not fit."""
        made = Machine(self, blob)
        self._machines.add(made)
        return made

    def probe(self, kind: int, memory: NDArray[np.uint8], rounds: int) -> float:
        """Bytes (kind 0: read `memory`) or operations (1: f32, 2: bf16, 3: int8 products) per second; 0 without such a unit."""
        with self.lock:
            start = time.perf_counter()
            done = self._library.stemma_probe(self.handle, kind, memory.ctypes.data, memory.size, rounds)
            return float(done / (time.perf_counter() - start))

    def _reserve(self, nbytes: int) -> None:
        if nbytes > self._arena.size:
            self._arena = allocate(nbytes)
            self._arena_address: int = self._arena.ctypes.data

    def close(self) -> None:
        """Stop the threads and release scratch memory. Later calls raise DeviceError."""
        for machine in list(self._machines):
            machine.close()
        with self.lock:
            if self._handle is not None:
                handle, self._handle = self._handle, None
                self._library.stemma_close(handle)
                self._arena = np.zeros(0, np.uint8)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


class Launch:
    """One function with its arrays of sizes and addresses, made once so that a call costs a few microseconds."""

    __slots__ = ("device", "index", "_sizes", "_buffers", "_pointers", "_keep", "_arena_bytes", "_call")

    def __init__(self, device: Device, index: int, sizes: int, buffers: int) -> None:
        self.device, self.index = device, index
        self._sizes = (ctypes.c_int64 * sizes)()
        self._buffers = (ctypes.c_void_p * buffers)()
        self._pointers = (ctypes.addressof(self._sizes), ctypes.addressof(self._buffers))
        self._keep: list[NDArray[Any] | None] = [None] * buffers
        self._arena_bytes = 0
        self._call = device._library.stemma_call

    def resize(self, sizes: Sequence[int]) -> None:
        """Set the values of the function's dimensions."""
        self._sizes[:] = list(sizes)
        with self.device.lock:
            needed = self.device._library.stemma_arena_bytes(self.device.handle, self.index, self._pointers[0])
        if needed < 0:
            raise DeviceError(f"Function {self.index} of {self.device.source} refuses the sizes {list(sizes)}.")
        self._arena_bytes = needed

    def bind(self, position: int, memory: NDArray[Any], offset: int = 0) -> None:
        """Pass `memory` (contiguous), from `offset` bytes on, as buffer number `position`; it is kept alive."""
        self._keep[position] = memory
        self._buffers[position] = memory.ctypes.data + offset

    def __call__(self) -> None:
        """Run the function. DeviceError when it reports a failure."""
        with self.device.lock:
            self._run()

    def profile(self) -> NDArray[np.float64]:
        """Run the function with a clock around each of its kernels; nanoseconds of each, in the order of the manifest."""
        device = self.device
        library = device._library
        with device.lock:
            library.stemma_set_profile(device.handle, 1)
            try:
                self._run()
                times = np.zeros(library.stemma_profile(device.handle, None, 0))
                library.stemma_profile(device.handle, times.ctypes.data, times.size)
            finally:
                library.stemma_set_profile(device.handle, 0)
        return times

    def _run(self) -> None:
        device = self.device
        device._reserve(self._arena_bytes)
        status = self._call(device.handle, self.index, *self._pointers, device._arena_address)
        if status:
            raise DeviceError(
                f"Function {self.index} of {device.source} failed with status {status} for the sizes {list(self._sizes)}."
            )


class Machine:
    """A native machine: its calls, one at a time through the device's lock. Instances of programs are numbers.

    `library` has the functions, `handle` the machine; DeviceError after `close`, or when the device is closed.
    """

    def __init__(self, device: Device, blob: bytes) -> None:
        self.device, self.library = device, device._library
        self._handle: int | None = None
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        with device.lock:
            self._handle = self.library.stemma_machine_open(device.handle, blob, len(blob), ctypes.addressof(error), _ERROR_BYTES)
        if not self._handle:
            raise DeviceError(f"The programs of {device.source} do not run: {error.value.decode(errors='replace')}")

    @property
    def handle(self) -> int:
        """The native machine."""
        if self._handle is None:
            raise DeviceError(f"The model of {self.device.source} was closed. Load it again to use it.")
        return self._handle

    def close(self) -> None:
        """Cancel what runs and release the memory."""
        with self.device.lock:
            handle, self._handle = self._handle, None
            if handle:
                self.library.stemma_machine_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


def _threads(wanted: int | None) -> int:
    if wanted is None:
        text = os.environ.get("STEMMA_THREADS")
        if text is None:
            return available_threads()
        if not text.isdigit():
            raise InputError(f"$STEMMA_THREADS is {text!r}. Set it to a positive number, or unset it.")
        wanted = int(text)
    if not 1 <= wanted <= 1024:
        raise InputError(f"threads={wanted} is not between 1 and 1024.")
    return wanted


def _load(library: bytes, source: str) -> ctypes.CDLL:
    digest = hashlib.sha256(library).hexdigest()
    with _loaded_lock:
        if digest not in _loaded:
            _loaded[digest] = _link(library, digest, source)
        return _loaded[digest]


_loaded: dict[str, ctypes.CDLL] = {}
_loaded_lock = threading.Lock()


def _link(library: bytes, digest: str, source: str) -> ctypes.CDLL:
    """Load a shared library from memory; from a file in $STEMMA_CACHE when that is set (profilers want a file)."""
    cache = os.environ.get("STEMMA_CACHE")
    try:
        if cache:
            linked = ctypes.CDLL(str(_cached(library, digest, Path(cache))))
        elif hasattr(os, "memfd_create"):
            # The descriptor stays open: the loader would take a reused /proc/self/fd/N for the library it already has.
            descriptor = os.memfd_create(f"stemma-{digest[:12]}", os.MFD_CLOEXEC)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(library)
            linked = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        else:
            with tempfile.TemporaryDirectory(prefix="stemma-") as folder:
                linked = ctypes.CDLL(str(_cached(library, digest, Path(folder))))
    except OSError as error:
        raise DeviceError(
            f"The kernels of {source} cannot be loaded on this machine ({error}). Compile the model on a machine of"
            " this kind; where memory may not be executed, set STEMMA_CACHE to a folder that allows it."
        ) from None
    abi = getattr(linked, "stemma_abi", None)
    if abi is None or abi() != ABI:
        found = "none" if abi is None else abi()
        raise DeviceError(
            f"The kernels of {source} have interface {found}; this version of Stemma calls interface {ABI}."
            " Compile the model again with this version."
        )
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(linked, name)
        except AttributeError:
            raise DeviceError(f"The kernels of {source} lack {name}. Compile the model again.") from None
        function.restype, function.argtypes = result, arguments
    return linked


def _cached(library: bytes, digest: str, folder: Path) -> Path:
    """The library as a file named by its hash, written at once or found with the same content."""
    path = folder / f"{digest}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != library:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(library)
        os.replace(file.name, path)
    return path
