"""Calling one compiled function with named arrays: checks of names, types, ranks and sizes; named outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stemma.backends.cpu.device import Device, allocate
from stemma.runtime.errors import InputError
from stemma.runtime.manifest import FunctionSpec, TensorSpec

Array = NDArray[Any]
NUMPY: dict[str, type[np.generic]] = {
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16, "i64": np.int64, "i32": np.int32,
    "i16": np.int16, "i8": np.int8, "u8": np.uint8, "bool": np.bool_,
}  # fmt: skip


def empty(shape: tuple[int, ...], dtype: str) -> Array:
    """A page-aligned array of an element type of the manifest (bf16 as its bits, u16)."""
    item = np.dtype(NUMPY[dtype])
    return allocate(int(np.prod(shape)) * item.itemsize).view(item).reshape(shape)


def convert(value: ArrayLike, dtype: str, name: str) -> Array:
    """`value` as a contiguous array of `dtype`, when that loses no meaning. InputError otherwise.

    Integers become any integer type that holds them; floats any float type; nothing changes between the two.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"The input {name!r} is not a rectangular array ({error}).") from None
    wanted = np.dtype(np.float32 if dtype == "bf16" else NUMPY[dtype])
    if array.size == 0 and not hasattr(value, "dtype"):
        array = array.astype(wanted)  # an empty list has no type of its own
    if _family(array.dtype) != _family(wanted):
        raise InputError(f"The input {name!r} must hold {_family(wanted)} ({dtype}), but holds {array.dtype}. Convert it first.")
    if wanted.kind in "iu" and array.size:
        low, high, info = int(array.min()), int(array.max()), np.iinfo(wanted)
        if low < info.min or high > info.max:
            raise InputError(f"The input {name!r} holds values from {low} to {high}, which {dtype} cannot hold.")
    if dtype == "bf16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    return np.asarray(array, wanted, order="C")


def _family(dtype: np.dtype[Any]) -> str:
    return {"i": "integers", "u": "integers", "f": "floats", "b": "truth values"}.get(dtype.kind, f"{dtype.kind} values")


def as_output(array: Array, dtype: str) -> Array:
    """A result as numpy can hold it: bf16 bits become float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else array


class CompiledFunction:
    """A function without states, called with its inputs by position or by name."""

    def __init__(self, device: Device, spec: FunctionSpec) -> None:
        self.device, self.spec = device, spec

    def __call__(self, *positional: ArrayLike, **named: ArrayLike) -> dict[str, Array]:
        """Run it; the results by name. InputError for wrong names, types, ranks or sizes."""
        spec = self.spec
        inputs = self._arguments(positional, named)
        values: dict[str, int] = {}
        for tensor, array in zip(spec.inputs, inputs, strict=True):
            self._bind_dims(tensor, array, values)
        self._check(inputs, values)
        results = [empty(t.dims(values), t.dtype) for t in spec.results]
        launch = self.device.launch(spec.index, len(spec.dims), len(inputs) + len(results))
        launch.resize([values[d.name] for d in spec.dims])
        for position, array in enumerate([*inputs, *results]):
            launch.bind(position, array)
        launch()
        return {t.name: as_output(a, t.dtype) for t, a in zip(spec.results, results, strict=True)}

    def _signature(self) -> str:
        return ", ".join(map(str, self.spec.inputs))

    def _arguments(self, positional: tuple[ArrayLike, ...], named: Mapping[str, ArrayLike]) -> list[Array]:
        names = [t.name for t in self.spec.inputs]
        if len(positional) > len(names):
            raise InputError(f"{len(positional)} inputs were given, but the model takes {len(names)}: {self._signature()}.")
        given = dict(zip(names, positional, strict=False))
        unknown = [n for n in named if n not in names]
        twice = [n for n in named if n in given]
        missing = [n for n in names if n not in given and n not in named]
        for what, wrong in (("has no input", unknown), ("was given twice the input", twice), ("lacks the input", missing)):
            if wrong:
                raise InputError(f"The model {what} {', '.join(map(repr, wrong))}. It takes {self._signature()}.")
        given |= named
        return [convert(given[t.name], t.dtype, t.name) for t in self.spec.inputs]

    def _bind_dims(self, tensor: TensorSpec, array: Array, values: dict[str, int]) -> None:
        if array.ndim != len(tensor.shape):
            raise InputError(
                f"The input {tensor.name!r} has {array.ndim} axes, of sizes {list(array.shape)}, but the model takes {tensor}."
            )
        for text, size in zip(tensor.text, array.shape, strict=True):
            dim = self.spec.dimension(text) if isinstance(text, str) else None
            if dim is None:
                continue
            if values.setdefault(dim.name, size) != size:
                raise InputError(
                    f"The size {dim.name!r} is {values[dim.name]} in one input and {size} in {tensor.name!r}."
                    f" The model takes {self._signature()}."
                )
            if not dim.lo <= size <= dim.hi:
                raise InputError(f"The size {dim.name!r} of {tensor.name!r} is {size}; the model takes {dim.lo} to {dim.hi}.")

    def _check(self, inputs: list[Array], values: Mapping[str, int]) -> None:
        if unbound := [d.name for d in self.spec.dims if d.name not in values]:
            raise InputError(f"No input of the model has the size {', '.join(map(repr, unbound))} as an axis of its own.")
        for tensor, array in zip(self.spec.inputs, inputs, strict=True):
            if array.shape != (wanted := tensor.dims(values)):
                raise InputError(f"The input {tensor.name!r} has sizes {list(array.shape)}, but {tensor} is {list(wanted)} here.")
