"""The typed view of an artifact's manifest: functions, their dimensions and tensors, limits, targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stemma.runtime.sizes import SizeFunction, compile_size

FORMAT = 2
ABI = 2
KINDS = ("causal_lm", "model")
ITEM_BYTES = {
    "f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Dimension:
    """A named size and its inclusive range."""

    name: str
    lo: int
    hi: int


@dataclass(frozen=True)
class TensorSpec:
    """One input, state or result: its element type, and its shape as written and as functions of the dimensions.

    row_bytes: of one row of the last axis, when rows are stored as codes with their scales; 0 for plain element types.
    """

    name: str
    dtype: str
    text: tuple[int | str, ...]
    shape: tuple[SizeFunction, ...]
    row_bytes: int = 0

    def dims(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for these values of the dimensions."""
        return tuple(size(values) for size in self.shape)

    def nbytes(self, values: Mapping[str, int]) -> int:
        """Bytes of the tensor for these values of the dimensions."""
        total = self.row_bytes or ITEM_BYTES[self.dtype]
        for size in self.shape[:-1] if self.row_bytes else self.shape:
            total *= size(values)
        return total

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(size) for size in self.text)}]"


@dataclass(frozen=True)
class FunctionSpec:
    """One compiled function: its index in the library and what it takes and returns, in the order of the native call."""

    name: str
    index: int
    dims: tuple[Dimension, ...]
    inputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]

    def dimension(self, name: str) -> Dimension | None:
        """The dimension of that name, or None."""
        return next((d for d in self.dims if d.name == name), None)


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of a program. dtype "state": a value that the machine makes. shape: numbers and names of sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    default: int | float | None
    text: str


@dataclass(frozen=True)
class ProgramSpec:
    """A decoding program: its parameters and results by name; `plain` names the same program without speculation, if any.

    host: the element types of what the Python functions that it calls return, by the name of the function.
    """

    name: str
    parameters: tuple[ParameterSpec, ...]
    results: tuple[str, ...]
    host: Mapping[str, str]
    plain: str | None

    @property
    def prompt(self) -> ParameterSpec | None:
        """The parameter that takes the prompt: the first one that is i32[n]."""
        return next((p for p in self.parameters if p.dtype == "i32" and len(p.shape) == 1 and isinstance(p.shape[0], str)), None)

    @property
    def options(self) -> tuple[ParameterSpec, ...]:
        """What a caller may give by name: all but the prompt, states, and values that the machine keeps from run to run."""
        prompt = self.prompt
        return tuple(p for p in self.parameters if p is not prompt and p.dtype != "state" and p.name not in self.results)

    def option(self, name: str) -> ParameterSpec | None:
        """The option of that name, or None."""
        return next((p for p in self.options if p.name == name), None)


@dataclass(frozen=True)
class Manifest:
    """What the runtime uses of manifest.json; `raw` is all of it, for reports."""

    raw: Mapping[str, Any]
    kind: str
    name: str
    targets: Mapping[str, Mapping[str, Any]]
    functions: Mapping[str, FunctionSpec]
    programs: Mapping[str, ProgramSpec]
    models: tuple[str, ...]
    context: int
    rows: int
    vocab: int
    eos: tuple[int, ...]
    bos: int | None
    weights_member: str
    weights_bytes: int
    weights_sha256: str
    files: Mapping[str, str]


def parse_manifest(raw: Any) -> Manifest:
    """Check and convert a decoded manifest of the current format.

    ValueError with a short reason when a key is missing or has the wrong type.
    """
    kind = _get(raw, "kind", str)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    functions = {name: _function(name, spec) for name, spec in _get(raw, "functions", dict).items()}
    needed = "step" if kind == "causal_lm" else "forward"
    if needed not in functions:
        raise ValueError(f"a {kind} needs a function {needed!r}")
    weights = _get(raw, "weights", dict)
    limits = _get(raw, "limits", dict) if kind == "causal_lm" else {}
    eos = _get(raw, "eos", list) if kind == "causal_lm" else []
    bos = raw.get("bos")
    context, rows = (_get(limits, key, int, "limits.") if kind == "causal_lm" else 0 for key in ("context", "rows"))
    if kind == "causal_lm" and not (context > 0 and rows > 0):
        raise ValueError(f"limits of {context} positions and {rows} rows let nothing run")
    if not all(type(token) is int for token in eos) or not (bos is None or type(bos) is int):
        raise ValueError("eos must be a list of token ids and bos a token id or null")
    return Manifest(
        raw=raw,
        kind=kind,
        name=_get(raw, "name", str),
        targets=_get(raw, "targets", dict),
        functions=functions,
        programs={name: parse_program(name, table) for name, table in _get(raw, "programs", dict).items()},
        models=tuple(_get(m, "name", str, "models.") for m in _get(raw, "models", list)),
        context=context,
        rows=rows,
        vocab=_get(raw, "vocab", int) if kind == "causal_lm" else 0,
        eos=tuple(eos),
        bos=bos,
        weights_member=_get(weights, "member", str, "weights."),
        weights_bytes=_get(weights, "bytes", int, "weights."),
        weights_sha256=_get(weights, "sha256", str, "weights."),
        files=_get(raw, "files", dict),
    )


def parse_program(name: str, raw: Any) -> ProgramSpec:
    """A program's entry of the manifest. ValueError when it is not one."""
    where = f"programs.{name}."
    parameters = []
    for p in _get(raw, "params", list, where):
        text = _get(p, "type", str, where)
        found = _TYPE.fullmatch(text)
        if found is None:
            raise ValueError(f"{where}{p.get('name')} has the type {text!r}")
        dtype = "state" if found[1] == "State" else found[1]
        sizes = () if dtype == "state" else tuple(s.strip() for s in found[2].split(",") if s.strip() not in ("", "()"))
        shape = tuple(int(s) if s.isdigit() else s for s in sizes)
        parameters.append(ParameterSpec(_get(p, "name", str, where), dtype, shape, p.get("default"), text))
    host = {called: str(type).partition("[")[0] for called, type in _get(raw, "host", dict, where).items()}
    return ProgramSpec(name, tuple(parameters), tuple(_get(raw, "results", list, where)), host, raw.get("plain"))


_TYPE = re.compile(r"(f32|i32|i64|bool|State)\[(.*)\]")


def _get(raw: Any, key: str, kind: type, prefix: str = "") -> Any:
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix[:-1] or 'the manifest'} is not an object")
    if key not in raw:
        raise ValueError(f"the key {prefix + key!r} is missing")
    if not isinstance(raw[key], kind):
        raise ValueError(f"the key {prefix + key!r} is not of type {kind.__name__}")
    return raw[key]


def _function(name: str, raw: Any) -> FunctionSpec:
    where = f"functions.{name}."
    dims = tuple(
        Dimension(_get(d, "name", str, where + "dims."), _get(d, "lo", int, where), _get(d, "hi", int, where))
        for d in _get(raw, "dims", list, where)
    )
    names = frozenset(d.name for d in dims)

    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(_tensor(t, names, f"{where}{key}.") for t in _get(raw, key, list, where))

    index = _get(raw, "index", int, where)
    return FunctionSpec(name, index, dims, tensors("inputs"), tensors("states"), tensors("results"))


def _tensor(raw: Any, names: frozenset[str], where: str) -> TensorSpec:
    name, dtype, shape = (_get(raw, key, kind, where) for key, kind in (("name", str), ("dtype", str), ("shape", list)))
    row_bytes = _get(raw, "row_bytes", int, where) if "row_bytes" in raw else 0
    if dtype not in ITEM_BYTES and (row_bytes <= 0 or not shape):
        raise ValueError(f"{where}{name} has the unknown element type {dtype!r}")
    return TensorSpec(name, dtype, tuple(shape), tuple(compile_size(size, names) for size in shape), row_bytes)
