"""Running decoding programs: machines of the native library, kept for the next call, and the instances that run on them."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stemma.backends.cpu import device as native
from stemma.backends.cpu.device import Device, NativeTensor
from stemma.runtime.errors import DeviceError, InputError
from stemma.runtime.function import convert
from stemma.runtime.manifest import ProgramSpec

Array = NDArray[Any]
SLICE = 50_000_000  # nanoseconds in the native code at a time: for Ctrl-C, and for other threads
RUNNING, FINISHED, FAILED, WAITING = range(4)
_DTYPES: tuple[type[np.generic], ...] = (np.float32, np.int32, np.int64, np.bool_)
_ERROR_BYTES, _MAX_ARGUMENTS, _ROOM = 1024, 64, 4096
_PER_MODEL = ("calls", "rows", "outputs", "seconds")
KEPT = 16  # programs given as objects whose machines are kept


class Machine:
    """One native machine. A caller has it for itself (`Machines.take`); native calls of several machines take turns.

    `totals` are its statistics since it was made (`figures` names them), as of the last `advance`.
    """

    def __init__(self, device: Device, blob: bytes) -> None:
        self._device, self._blob = device, blob
        self._machine: native.Machine = device.machine(blob)
        self._library = device._library
        self._dropped: deque[int] = deque()
        self._tokens = np.zeros(_ROOM, np.int32)
        self.totals: Array = np.zeros(7)

    def start(self, program: str, inputs: Mapping[str, Array]) -> Instance:
        """A new instance; missing inputs take their defaults. InputError when they are not what the program takes."""
        arrays = {name: np.asarray(value, order="C") for name, value in inputs.items()}
        tensors = (NativeTensor * max(len(arrays), 1))(*(_tensor(name, a) for name, a in arrays.items()))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        with self._device.lock:
            self._release()
            number = self._library.stemma_machine_start(
                self._machine.handle,
                program.encode(),
                ctypes.addressof(tensors),
                len(arrays),
                ctypes.addressof(error),
                _ERROR_BYTES,
            )
        if number < 0:
            raise InputError(error.value.decode(errors="replace"))
        return Instance(self, int(number))

    def advance(self, tokens: int = 0) -> bool:
        """Run for at most `SLICE`, or until `tokens` were emitted (0: any number). Whether a host function is wanted."""
        with self._device.lock:
            self._release()
            state = self._library.stemma_machine_advance(self._machine.handle, tokens, SLICE)
            self.totals = self._statistics(-1)
        return bool(state == 2)

    def _statistics(self, number: int) -> Array:
        found: Array = np.zeros(max(self.totals.size, 64))
        count = self._library.stemma_machine_statistics(self._machine.handle, number, found.ctypes.data, found.size)
        return found[: min(count, found.size)]

    def _release(self) -> None:
        while self._dropped:
            self._library.stemma_machine_release(self._machine.handle, self._dropped.popleft())

    def close(self) -> None:
        """Cancel what runs and release the memory."""
        self._machine.close()


class Instance:
    """One run of a program. `release` it when done; that cancels what still runs."""

    def __init__(self, machine: Machine, number: int) -> None:
        self._machine, self._number, self._read = machine, number, 0

    def poll(self) -> tuple[int, list[int]]:
        """Its status (RUNNING, FINISHED, FAILED or WAITING), and the tokens emitted since the last poll."""
        machine, emitted = self._machine, ctypes.c_int64()
        library, handle = machine._library, machine._machine.handle
        with machine._device.lock:
            status = library.stemma_machine_status(handle, self._number, ctypes.addressof(emitted))
            new: list[int] = []
            while self._read < emitted.value:
                room = machine._tokens
                count = library.stemma_machine_tokens(handle, self._number, self._read, room.ctypes.data, room.size)
                if count <= 0:
                    break
                new += room[:count].tolist()
                self._read += count
        return int(status), new

    @property
    def error(self) -> str:
        """Why it failed."""
        machine = self._machine
        with machine._device.lock:
            text: bytes | None = machine._library.stemma_machine_error(machine._machine.handle, self._number)
            return (text or b"").decode(errors="replace")

    def answer(self, host: Mapping[str, Callable[..., ArrayLike]], types: Mapping[str, str]) -> None:
        """Call the Python function that it waits for, and give it the result. What the function raises is raised here.

        `types`: the element types that the program declares. InputError for a missing function or a result of another type.
        """
        machine = self._machine
        name, arguments = ctypes.c_char_p(), (NativeTensor * _MAX_ARGUMENTS)()
        with machine._device.lock:
            count = machine._library.stemma_machine_request(
                machine._machine.handle, self._number, ctypes.addressof(name), ctypes.addressof(arguments), _MAX_ARGUMENTS
            )
            called, values = (name.value or b"").decode(), [_array(t) for t in arguments[: max(count, 0)]]
        if called not in host:
            raise InputError(
                f"The program calls the Python function {called!r}; given: {', '.join(sorted(host)) or 'none'}."
                f" Pass it by name: host={{{called!r}: function}}."
            )
        result = convert(host[called](*values), types[called], f"the result of {called}")
        tensor = _tensor(called, result)
        with machine._device.lock:
            failed = machine._library.stemma_machine_reply(
                machine._machine.handle, self._number, ctypes.addressof(tensor), None
            )  # fmt: skip
        if failed:
            raise InputError(f"{self.error} It has the sizes {list(result.shape)}.")

    def result(self, name: str) -> Array | None:
        """A copy of a named result, once it has finished; None for results that are no arrays."""
        machine, tensor = self._machine, NativeTensor()
        with machine._device.lock:
            missing = machine._library.stemma_machine_result(
                machine._machine.handle, self._number, name.encode(), ctypes.addressof(tensor)
            )
            return None if missing else _array(tensor)

    def release(self) -> None:
        """Forget it, and cancel it when it still runs. Takes effect with the machine's next call, so it may be called anywhere."""
        self._machine._dropped.append(self._number)


class Machines:
    """Machines of one model, by the program object they were made for ("" for the artifact's own programs), kept between calls.

    Each holds the caches of its sequences, and what persistent parameters (tables of drafters) have learnt.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: OrderedDict[Hashable, list[Machine]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: Hashable, blob: bytes) -> Machine:
        """A machine that nobody else uses; give it back."""
        with self._lock:
            if idle := self._idle.get(key):
                return idle.pop()
        return Machine(self._device, blob)

    def give(self, key: Hashable, machine: Machine) -> None:
        """Keep a machine for the next caller."""
        with self._lock:
            self._idle.setdefault(key, []).append(machine)
            self._idle.move_to_end(key)
            while len(self._idle) > KEPT + 1:
                oldest = next(k for k in self._idle if k != "")
                self._idle.pop(oldest)


def figures(totals: Array, before: Array, models: tuple[str, ...]) -> dict[str, Any]:
    """What a machine did between two readings of its statistics, by name; `models`: dictionaries by the name of a model."""
    change = totals - (before if before.size == totals.size else 0)
    names = ("seconds", "emitted", "trees", "nodes", "followed", "drafting_seconds")
    found: dict[str, Any] = dict(zip(names, change[:6].tolist(), strict=True))
    parts = change[7 : 7 + len(models) * len(_PER_MODEL)].reshape(-1, len(_PER_MODEL)).tolist()
    return found | {"models": {m: dict(zip(_PER_MODEL, part, strict=True)) for m, part in zip(models, parts, strict=False)}}


def raise_failure(instance: Instance, program: ProgramSpec) -> None:
    """DeviceError for an instance that has failed."""
    raise DeviceError(f"The program {program.name!r} stopped: {instance.error}")


def _tensor(name: str, array: Array) -> NativeTensor:
    shape = (ctypes.c_int64 * 4)(*array.shape)
    return NativeTensor(name.encode(), _DTYPES.index(array.dtype.type), array.ndim, shape, array.ctypes.data)


def _array(tensor: Any) -> Array:
    """A copy of a native tensor."""
    dtype, shape = np.dtype(_DTYPES[tensor.dtype]), tuple(tensor.shape[: tensor.rank])
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    return np.frombuffer(ctypes.string_at(tensor.data, size), dtype).reshape(shape)
