"""The reference interpreter: runs a function on numpy arrays by each operation's own definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stemma.ir import size
from stemma.ir.errors import StemmaError, TypeMismatch
from stemma.ir.formats import Quantized, dtype
from stemma.ir.function import Function, topological
from stemma.ir.node import Node
from stemma.ir.size import SizeLike
from stemma.ir.types import State, Tensor, Type, numpy_dtype, round_bf16, widen_bf16
from stemma.ir.weights import WeightStore

WeightSource = Callable[[str], Any]


@dataclass(frozen=True)
class World:
    """What a decoding program reaches outside itself: models, Python functions, compiled functions, each by name."""

    models: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    compiled: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


class Context:
    """What evaluations may ask for: the float type, sizes, weights, calls of regions, and a program's `World`.

    `float` is float64 (the reference) or float32. Narrower float types round only where a `cast` says so.
    """

    def __init__(self, weights: WeightSource | None, float_type: type = np.float64, world: World = World()) -> None:
        self.float = float_type
        self.world = world
        self.sizes: dict[str, int] = {}
        self._weights = weights

    def numpy(self, name: str) -> np.dtype[Any]:
        """The numpy type in which values of the element type `name` are computed."""
        return np.dtype(self.float) if dtype(name).kind == "float" else numpy_dtype(name)

    def size(self, expression: SizeLike) -> int:
        return size.evaluate(expression, self.sizes)

    def model(self, name: str) -> Any:
        """The reference model of that name; StemmaError when there is none."""
        return self._reach("model", self.world.models, name)

    def host(self, name: str, inputs: Sequence[Any], type: Tensor) -> Any:
        """The checked result of a Python function; StemmaError when it has not the type that the program declares."""
        value = np.asarray(self._reach("host function", self.world.host, name)(*inputs))
        kinds = {"f": "float", "i": "int", "u": "int", "b": "bool"}
        expected = tuple(self.size(s) for s in type.shape)
        if value.shape != expected or dtype(type.dtype).kind != kinds.get(value.dtype.kind):
            raise StemmaError(f"The host function {name!r} returned {value.dtype}{list(value.shape)}; {type!r} is declared.")
        return value.astype(self.numpy(type.dtype))

    def compiled(self, name: str, inputs: Sequence[Any]) -> Any:
        """The result of a compiled function of the module."""
        return self._reach("function", self.world.compiled, name)(*inputs)

    @staticmethod
    def _reach(what: str, known: Mapping[str, Any], name: str) -> Any:
        if name not in known:
            raise StemmaError(f"The program needs the {what} {name!r}; given: {', '.join(sorted(known)) or 'none'}.")
        return known[name]

    def weight(self, name: str, type: Tensor) -> Any:
        """The stored value, floats widened to `float`; StemmaError when its shape is not the declared one."""
        if self._weights is None:
            raise StemmaError(f"The weight {name!r} is needed, but no weights were given.")
        value = self._weights(name)
        if tuple(value.shape) != type.shape:
            raise StemmaError(f"The weight {name!r} has the shape {tuple(value.shape)}, the module expects {type.shape}.")
        return value if isinstance(value, Quantized) else value.astype(self.numpy(type.dtype), copy=False)

    def cast(self, x: Any, name: str) -> Any:
        if name == "bf16":
            return widen_bf16(round_bf16(x.astype(np.float32))).astype(self.float)
        if name == "f16":
            with np.errstate(over="ignore"):
                return x.astype(np.float16).astype(self.float)
        return x.astype(self.numpy(name), copy=False)

    def lazy_rows(self, function: Function) -> dict[Node, Any]:
        """Weights of linears and embeddings, as values that are computed when they are read, by blocks of rows."""
        if not isinstance(self._weights, WeightStore):
            return {}
        from stemma.ir.rows import LazyRows
        from stemma.ir.verify import constant_nodes

        constant, users = constant_nodes(function), function.users()

        def only_read_by_rows(node: Node) -> bool:
            places = {"linear": 1, "embedding": 0, "linear_at": 1, "linear_from": 1}
            return bool(users[node]) and all(
                u.op.name in places and [i for i, x in enumerate(u.inputs) if x is node] == [places[u.op.name]] for u in users[node]
            )

        found = [n for n in function.nodes if n in constant and n not in function.results and only_read_by_rows(n)]
        return {n: LazyRows(n, self._weights) for n in found}

    @classmethod
    def of(cls, function: Function, arguments: Sequence[Any], weights: WeightSource | None) -> Context:
        """A float32 context for arguments in the order of the parameters."""
        context = cls(weights, np.float32)
        names = [p.attrs["name"] for p in function.params]
        context.sizes = bind_sizes([p.type for p in function.params], [a.shape for a in arguments], names)
        return context

    def extend(self, function: Function, values: dict[Node, Any]) -> tuple[Any, ...]:
        """The results of a function. Nodes in `values` are not evaluated, and what is evaluated is added to it."""
        values |= {node: lazy for node, lazy in self.lazy_rows(function).items() if node not in values}
        for node in topological(function.results, values):
            if node not in values:
                values[node] = node.op.evaluate(self, *(values[i] for i in node.inputs), **node.attrs)
        return tuple(values[r] for r in function.results)

    def call(self, function: Function, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Evaluate a function or region; values are freed after their last use."""
        values: dict[Node, Any] = dict(zip(function.params, arguments, strict=True)) | self.lazy_rows(function)
        remaining = {node: len(users) for node, users in function.users().items()}
        for result in function.results:
            remaining[result] += 1
        for node in topological(function.results, values):
            if node not in values:
                inputs = [values[i] for i in node.inputs]
                values[node] = node.op.evaluate(self, *inputs, **node.attrs)
            for i in dict.fromkeys(node.inputs):
                remaining[i] -= 1
                if not remaining[i] and i in values:
                    del values[i]
        return tuple(values[r] for r in function.results)


def bind_sizes(
    types: Sequence[Type], shapes: Sequence[tuple[int, ...]], names: Sequence[str], known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Values of the dimensions from concrete shapes (and those `known`); StemmaError naming the input that does not fit."""
    values: dict[str, int] = {}
    composite: list[tuple[SizeLike, int, str]] = []
    for type, shape, name in zip(types, shapes, names, strict=True):
        if isinstance(type, State):
            continue
        if not isinstance(type, Tensor) or len(shape) != type.rank:
            raise StemmaError(f"The input {name!r} has {len(shape)} axes; it must be {type!r}.")
        for expected, actual in zip(type.shape, shape, strict=True):
            found = size.dims(expected)
            if isinstance(expected, size.Size) and len(found) == 1 and expected is size.dim(*_fields(next(iter(found)))):
                d = next(iter(found))
                if not d.lo <= actual <= d.hi:
                    raise StemmaError(f"The input {name!r} has the size {actual} for {d.name}; allowed: {d.lo}..{d.hi}.")
                if values.setdefault(d.name, actual) != actual:
                    raise StemmaError(f"The input {name!r} has {d.name} = {actual}, another input has {values[d.name]}.")
            else:
                composite.append((expected, actual, name))
    for expected, actual, name in composite:
        if size.evaluate(expected, {**(known or {}), **values}) != actual:
            raise StemmaError(f"The input {name!r} has the size {actual} where {expected} is expected.")
    return values


def _fields(d: size.Dim) -> tuple[str, int, int]:
    return d.name, d.lo, d.hi


def interpret(
    function: Function,
    inputs: Mapping[str, Any] | Sequence[Any],
    weights: WeightSource | Mapping[str, Any] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    float_type: type = np.float64,
    world: World = World(),
) -> dict[str, Any]:
    """Run `function` on arrays (by parameter name or in order); returns results by name.

    Float inputs are widened to `float_type`. `weights` maps a name to an array (bf16 given as widened floats) or `Quantized`.
    `sizes` gives dimensions that no input shows; `world` what a decoding program reaches (states are
    given as their values). Raises StemmaError when inputs do not fit the parameters.
    """
    names = [p.attrs["name"] for p in function.params]
    given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=True))
    if given.keys() != set(names):
        raise StemmaError(f"The function {function.name!r} takes {', '.join(names)}; given: {', '.join(given)}.")
    source = weights.__getitem__ if isinstance(weights, Mapping) else weights
    context = Context(source, float_type, world)
    whole = [isinstance(given[n], Quantized) or isinstance(p.type, State) for n, p in zip(names, function.params, strict=True)]
    values = [given[n] if kept else np.asarray(given[n]) for n, kept in zip(names, whole, strict=True)]
    shapes = [() if isinstance(p.type, State) else v.shape for p, v in zip(function.params, values, strict=True)]
    context.sizes = dict(sizes or {}) | bind_sizes([p.type for p in function.params], shapes, names, sizes)
    arguments = []
    for parameter, value, kept in zip(function.params, values, whole, strict=True):
        if not kept:
            value = value.astype(context.numpy(parameter.dtype), copy=False)
        arguments.append(value)
    return dict(zip(function.result_names, context.call(function, arguments), strict=True))


def evaluate_constant(node: Node, weights: WeightSource | None, float_type: type = np.float32) -> Any:
    """The value of a constant expression (over weights and constants only); TypeMismatch if it needs a parameter."""
    context = Context(weights, float_type)
    for n in Function("", (), {"value": node}).nodes:
        if n.op.name == "param":
            raise TypeMismatch(f"{node!r} depends on the parameter {n.attrs['name']!r}, so it is not constant.")
    return context.call(Function("", (), {"value": node}), ())[0]
