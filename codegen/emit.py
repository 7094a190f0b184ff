"""Emits one C++ source for a module: support code, each kernel once, and per function its offsets and launch list.

The text depends only on the schedules and the backend's templates, so equal models give equal sources and share compiled objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stemma.backends.base import Backend, Kernel
from stemma.codegen import lower
from stemma.codegen.schedule import Buffer, Launch, Schedule
from stemma.ir import Dim, SizeLike, dtype

C_TYPES = {
    "f64": "double", "f32": "float", "f16": "f16", "bf16": "bf16", "i64": "int64_t", "i32": "int32_t", "i16": "int16_t",
    "i8": "int8_t", "u8": "uint8_t", "bool": "uint8_t",
}  # fmt: skip


@dataclass(frozen=True)
class Emitted:
    """The source text, and the launch tables for the manifest by function name."""

    source: str
    launches: Mapping[str, list[dict[str, Any]]]


def emit(schedules: Sequence[Schedule], offsets: Sequence[int], backend: Backend, title: str) -> Emitted:
    """The source of a module. `offsets` are the places of the packed weights in the blob, by the number of their buffer."""
    kernels: dict[str, str] = {}
    for schedule in schedules:
        for launch in schedule.launches:
            kernel = launch.kernel
            if isinstance(kernel, Kernel) and kernel.name not in kernels:
                kernels[kernel.name] = backend.render(kernel)
            elif isinstance(kernel, lower.Kernel) and kernel.name not in kernels:
                kernels[kernel.name] = launch.source
    functions = [_function(s, offsets) for s in schedules]
    text = backend.host(title=title, kernels=list(kernels.values()), functions=functions)
    return Emitted(text, {s.function.name: launch_table(s) for s in schedules})


def c_size(expression: SizeLike) -> str:
    """A size as a C++ expression over the variables d_<dimension>."""
    if isinstance(expression, int):
        return str(expression)
    terms = []
    for monomial, coefficient in expression.terms:
        factors = [_atom(a) for a in monomial]
        if coefficient != 1 or not factors:
            factors.insert(0, f"({coefficient})" if coefficient < 0 else str(coefficient))
        terms.append(" * ".join(factors))
    return " + ".join(terms)


def _atom(atom: Any) -> str:
    if isinstance(atom, Dim):
        return f"d_{atom.name}"
    function = {"floordiv": "size_floordiv", "min": "size_min", "max": "size_max"}[atom.kind]
    return f"{function}({c_size(atom.a)}, {c_size(atom.b)})"


def _function(schedule: Schedule, offsets: Sequence[int]) -> dict[str, Any]:
    sizes = [f"const int64_t d_{d.name} = sizes[{i}];" for i, d in enumerate(schedule.dims)]
    total = "0"
    for i, slot in enumerate(schedule.plan.slots):
        sizes.append(f"const int64_t o{i} = {total};")
        total = f"o{i} + slot_bytes({c_size(slot)})"
    body: list[str] = []
    stage = 0
    for i, launch in enumerate(schedule.launches):
        if launch.stage != stage:
            body.append(f"team.barrier();  // ---- stage {launch.stage}")
            stage = launch.stage
        body += _launch(i, launch, schedule, offsets)
    states = schedule.states
    notes = [f"buffer {a.index}: {a.name} {a.tensor!r}{' (state)' * (a.name in states)}" for a in schedule.arguments]
    return {
        "name": schedule.function.name, "dims": [d.name for d in schedule.dims], "low": [d.lo for d in schedule.dims],
        "high": [d.hi for d in schedule.dims], "sizes": sizes, "total": total, "body": body, "launches": len(schedule.launches),
        "notes": notes,
    }  # fmt: skip


def _launch(index: int, launch: Launch, schedule: Schedule, offsets: Sequence[int]) -> list[str]:
    def place(buffer: Buffer, constant: bool) -> str:
        name = C_TYPES.get(buffer.tensor.dtype)
        cast = f"({'const ' if constant else ''}{name or 'void'}*)"
        if buffer.kind == "argument":
            return f"{cast}call.b[{buffer.index}]"
        if buffer.kind == "weight":
            return f"{cast}(W + {offsets[buffer.index]})"
        return f"{cast}(A + o{schedule.plan.slot_of[buffer.name]})"

    lines: list[str] = []
    parts = ["team"]
    for argument, buffer in launch.arguments:
        if argument.kind == "size":
            parts.append(c_size(argument.value))
        elif argument.kind == "sizes":
            name = f"n{index}_{len(lines)}"
            lines.append(f"const int64_t {name}[] = {{{', '.join(map(c_size, argument.value))}}};")
            parts.append(name)
        else:
            assert buffer is not None
            parts.append(place(buffer, argument.kind == "input"))
    if isinstance(launch.kernel, lower.Kernel):
        parts += [f"d_{d}" for d in launch.kernel.dims]
    by = f"  by {launch.by}" if launch.by else ""
    line = f"  {launch.line}" if launch.line else ""
    what = f" ({launch.what})" if launch.what else ""
    name = launch.kernel.name if launch.kernel else "st_copy"
    return [f"// {index}: {launch.op}{what}{by}{line}", *lines, f"{name}({', '.join(parts)});", f"ST_MARK({index})"]


def launch_table(schedule: Schedule) -> list[dict[str, Any]]:
    """What the manifest says of each launch: kernel, operations, origin, cost as size expressions, stage."""
    return [
        {"name": x.kernel.name if x.kernel else "copy", "op": x.op, "what": x.what, "by": x.by, "line": x.line, "stage": x.stage,
         "flops": _plain(x.cost.flops), "bytes": _plain(x.cost.bytes)}
        for x in schedule.launches
    ]  # fmt: skip


def function_table(schedule: Schedule, index: int) -> dict[str, Any]:
    """A function's entry of the manifest: dims, inputs, states and results in the order of the call, its launches."""
    results = set(schedule.function.result_names)
    groups: dict[str, list[dict[str, Any]]] = {"inputs": [], "states": [], "results": []}
    for a in schedule.arguments:
        kind = "states" if a.name in schedule.states else "results" if a.name in results else "inputs"
        groups[kind].append({"name": a.name, "dtype": a.tensor.dtype, "shape": [_plain(s) for s in a.tensor.shape], **_row(a)})
    dims = [{"name": d.name, "lo": d.lo, "hi": d.hi} for d in schedule.dims]
    return {"index": index, "dims": dims, **groups, "launches": launch_table(schedule)}


def _row(buffer: Buffer) -> dict[str, Any]:
    """The bytes of a row that is stored as codes with their scales."""
    kind = dtype(buffer.tensor.dtype)
    return {"row_bytes": kind.stored_bytes(buffer.tensor.shape[-1])} if kind.kind == "quantized" else {}


def _plain(value: SizeLike) -> int | str:
    return value if isinstance(value, int) else str(value)


__all__ = ["C_TYPES", "Emitted", "c_size", "emit", "function_table", "launch_table"]
