"""What the machine can do, what each kernel needs, and how long it took: the roofline of a step (Williams et al. 2009)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stemma.backends.cpu.device import Device, allocate
from stemma.runtime.errors import InputError
from stemma.runtime.session import Session
from stemma.runtime.sizes import compile_size

if TYPE_CHECKING:
    from stemma.runtime.model import Model

PROBE_BYTES = 1 << 29  # far larger than any cache
PROBE_ROUNDS = 4_000_000  # about a tenth of a second of multiplications


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of this machine and team of threads: bytes per second, operations per second by unit (0: no unit)."""

    bandwidth: float
    f32: float
    bf16: float
    int8: float


@dataclass(frozen=True)
class KernelTime:
    """One launch. flops and bytes are those of its definition; predicted is the larger of its two floors, seconds are medians."""

    name: str
    what: str
    flops: int
    bytes: int
    predicted: float
    seconds: float

    @property
    def share(self) -> float:
        """Predicted over measured time: 1 is the roofline."""
        return self.predicted / self.seconds if self.seconds else 0.0


def measure_ceilings(device: Device) -> Ceilings:
    """Probe read bandwidth (huge pages) and the arithmetic peaks of the device's instruction set; the best of three each."""
    memory = allocate(PROBE_BYTES)
    memory[:: 1 << 12] = 1  # touch every page
    device.probe(0, memory, 1)
    bandwidth = max(device.probe(0, memory, 2) for _ in range(3))
    peaks = [max(device.probe(kind, memory, PROBE_ROUNDS) for _ in range(2)) for kind in (1, 2, 3)]
    return Ceilings(bandwidth, *peaks)


@dataclass(frozen=True)
class Roofline:
    """The kernels of a step, and the seconds of a whole step without a clock in it: medians, measured in turns."""

    kernels: tuple[KernelTime, ...]
    seconds: float

    @property
    def explained(self) -> float:
        """The kernels' times together, over the time of the step."""
        return sum(k.seconds for k in self.kernels) / self.seconds


def roofline(model: Model, ceilings: Ceilings, *, rows: int = 1, context: int = 128, repeats: int = 15) -> Roofline:
    """Time every kernel of a language model's step over `rows` new tokens of one sequence after `context` cached ones.

    InputError when that exceeds the model's limits.
    """
    if model.kind != "causal_lm":
        raise InputError(f"{model.manifest.name} is not a language model; the roofline table needs a decode step.")
    limit = min(model.context, rows + context)
    if rows < 1 or rows > model.manifest.rows or limit < rows + context:
        raise InputError(f"{rows} rows after {context} tokens exceed {model.manifest.rows} rows or {model.context} positions.")
    session = Session(model.step, 1, rows + context)
    try:
        index = np.arange(rows, dtype=np.int32)
        session.fill(index % model.vocab, index * 0, context + index)
        session.selected[0] = rows - 1
        session.run(rows, 1)
        whole, parts = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            session.run(rows, 1)
            whole.append(time.perf_counter() - started)
            parts.append(session.profile(rows, 1))
        times = np.median(parts, axis=0) * 1e-9
    finally:
        session.close()
    step = model.manifest.raw["functions"]["step"]
    names = frozenset(d["name"] for d in step["dims"])
    values = {"rows": rows, "outputs": 1, "sequences": 1, "context": context + rows, "slots": context + rows}
    found = []
    for launch, seconds in zip(step["launches"], times, strict=True):
        flops, size = (compile_size(launch[key], names)(values) for key in ("flops", "bytes"))
        predicted = max(size / ceilings.bandwidth, flops / _peak(launch["what"], ceilings))
        found.append(KernelTime(launch["op"], launch["what"], flops, size, predicted, float(seconds)))
    return Roofline(tuple(found), float(np.median(whole)))


def _peak(what: str, ceilings: Ceilings) -> float:
    """The unit that does a kernel's products, by its activations."""
    if "q8" in what and ceilings.int8:
        return ceilings.int8
    return ceilings.bf16 if "bf16 activations" in what and ceilings.bf16 else ceilings.f32
