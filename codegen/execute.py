"""Runs a module in this process without an artifact, on any backend that can: for tests, `verify` and the op suite."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stemma.backends import registry
from stemma.backends.base import Executable
from stemma.backends.cpu.device import Device, Launch, allocate
from stemma.codegen import pack
from stemma.codegen.build import Program, program
from stemma.codegen.schedule import Schedule
from stemma.ir import Array, CompileError, Module, WeightStore, size
from stemma.ir.interpret import bind_sizes
from stemma.ir.types import numpy_dtype, round_bf16, widen_bf16


def executable(
    module: Module, weights: WeightStore, target: str = "cpu", *, variants: Sequence[str] = ("native",), threads: int = 1
) -> Executable:
    """The module, ready to be called. CompileError when the backend runs nothing."""
    backend = registry.get(target)
    direct = backend.executable(module, weights)
    if direct is not None:
        return direct
    return Native(program(module, backend), weights, variants, threads)


class Native:
    """A module built for the CPU and loaded into this process, weights in memory."""

    def __init__(self, made: Program, weights: WeightStore, variants: Sequence[str], threads: int) -> None:
        if made.backend.toolchain is None or made.backend.device is None:
            raise CompileError(f"The backend {made.backend.name} renders kernels and runs none.")
        self.program = made
        blob = allocate(max(made.layout.total, 64))
        end = 0
        for chunk in pack.stream(made.table, made.layout, weights):
            part = np.frombuffer(chunk, np.uint8)
            blob[end : end + len(part)] = part
            end += len(part)
        with tempfile.TemporaryDirectory(prefix="stemma-") as folder:
            self.built = made.backend.toolchain.build(made.source, variants, Path(folder) / "kernels.so")
            library = self.built.path.read_bytes()
        self.device = Device(library, blob, threads=threads, variant=self.built.variants[0])

    def call(self, function: str, inputs: Mapping[str, Array], sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
        """Run one function. Floats of bf16 tensors are rounded on the way in and widened on the way out; states are copied."""
        schedule, launch, buffers = self._prepare(function, inputs, sizes or {})
        launch()
        tensors = {a.name: a.tensor for a in schedule.arguments}
        return {n: _widened(buffers[n], tensors[n].dtype) for n in schedule.function.result_names}

    def profile(self, function: str, inputs: Mapping[str, Array], sizes: Mapping[str, int] | None = None) -> Array:
        """Nanoseconds of each launch of one call, in the order of the schedule."""
        _, launch, _ = self._prepare(function, inputs, sizes or {})
        times: Array = launch.profile()
        return times

    def _prepare(
        self, function: str, inputs: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> tuple[Schedule, Launch, dict[str, Array]]:
        names = [s.function.name for s in self.program.schedules]
        schedule = self.program.schedules[names.index(function)]
        tensors = {a.name: a.tensor for a in schedule.arguments}
        params = [p.attrs["name"] for p in schedule.function.params]
        values = dict(sizes) | bind_sizes([tensors[n] for n in params], [np.shape(inputs[n]) for n in params], params)
        launch = self.device.launch(names.index(function), len(schedule.dims), len(schedule.arguments))
        launch.resize([values[d.name] for d in schedule.dims])
        buffers: dict[str, Array] = {}
        for position, argument in enumerate(schedule.arguments):
            if argument.name in inputs:
                buffers[argument.name] = _stored(np.asarray(inputs[argument.name]), argument.tensor.dtype)
            else:
                shape = [size.evaluate(s, values) for s in argument.tensor.shape]
                count = int(np.prod(shape)) * numpy_dtype(argument.tensor.dtype).itemsize
                fill = np.full(count, 0xFF, np.uint8)  # a result that is not written shows (NaN, -1)
                buffers[argument.name] = fill.view(numpy_dtype(argument.tensor.dtype)).reshape(shape)
            launch.bind(position, buffers[argument.name])
        return schedule, launch, buffers


def _stored(value: Array, name: str) -> Array:
    """A contiguous copy in the storage type."""
    if name == "bf16":
        return round_bf16(value)
    return np.array(value, numpy_dtype(name), order="C")


def _widened(value: Array, name: str) -> Any:
    return widen_bf16(value) if name == "bf16" else value
