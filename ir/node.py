"""Nodes and operations: frozen, interned, typed. Equal structure is the same object, so equality is identity.

An `Op` subclass holds every meaning of an operation side by side: type rule, reference evaluation, cost, decomposition and
documentation (its docstring). Calling an op builds a node.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from stemma.ir import size
from stemma.ir.errors import StemmaError, TypeMismatch
from stemma.ir.size import SizeLike
from stemma.ir.types import Tensor, Type, tensors_of


@dataclass(frozen=True)
class Origin:
    """Where a node came from. Not part of its identity: the first builder of a structure wins."""

    line: str = ""  # the user's source line, "file.py:12 in forward"
    by: str = ""  # the pass or rule that made it


_origin: contextvars.ContextVar[Origin] = contextvars.ContextVar("origin", default=Origin())


@contextlib.contextmanager
def stamp(*, line: str | None = None, by: str | None = None) -> Iterator[None]:
    """Nodes built inside carry this origin; what is not given is inherited from the enclosing stamp."""
    outer = _origin.get()
    token = _origin.set(Origin(outer.line if line is None else line, outer.by if by is None else by))
    try:
        yield
    finally:
        _origin.reset(token)


class Node:
    """One value: an operation applied to inputs with attributes. Build nodes by calling an `Op`."""

    __slots__ = ("op", "inputs", "attrs", "type", "origin", "__weakref__")
    op: Op
    inputs: tuple[Node, ...]
    attrs: Mapping[str, Any]
    type: Type
    origin: Origin

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Nodes are frozen; build a new one.")

    @property
    def tensor(self) -> Tensor:
        """The type of a single-result node; TypeMismatch for a tuple."""
        if isinstance(self.type, Tensor):
            return self.type
        raise TypeMismatch(f"{self.op.name} has several results; read one with get(node, index=i).")

    @property
    def shape(self) -> tuple[SizeLike, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def __repr__(self) -> str:
        return f"<{self.op.name}: {self.type!r}>"

    def rebuild(self, *inputs: Node) -> Node:
        """The same operation on other inputs, with the same origin; itself when they are the same."""
        if len(inputs) == len(self.inputs) and all(a is b for a, b in zip(inputs, self.inputs, strict=True)):
            return self
        with stamp(line=self.origin.line, by=self.origin.by):
            return self.op(*inputs, **self.attrs)

    def __add__(self, other: object) -> Node:
        return _binary("add", self, other)

    def __radd__(self, other: object) -> Node:
        return _binary("add", other, self)

    def __sub__(self, other: object) -> Node:
        return _binary("sub", self, other)

    def __rsub__(self, other: object) -> Node:
        return _binary("sub", other, self)

    def __mul__(self, other: object) -> Node:
        return _binary("mul", self, other)

    def __rmul__(self, other: object) -> Node:
        return _binary("mul", other, self)

    def __truediv__(self, other: object) -> Node:
        return _binary("div", self, other)

    def __rtruediv__(self, other: object) -> Node:
        return _binary("div", other, self)

    def __neg__(self) -> Node:
        return OPS["neg"](self)

    def __matmul__(self, other: Node) -> Node:
        return OPS["matmul"](self, other)


def _binary(name: str, a: object, b: object) -> Node:
    like = next(x for x in (a, b) if not isinstance(x, (int, float, bool)))
    if isinstance(like, Node):
        a, b = (x if isinstance(x, Node) else OPS["constant"](value=x, dtype=like.dtype) for x in (a, b))
    return OPS[name](a, b)


OPS: dict[str, Op] = {}
_nodes: weakref.WeakValueDictionary[tuple[Any, ...], Node] = weakref.WeakValueDictionary()
INF = float("inf")


@dataclass(frozen=True)
class Cost:
    """Arithmetic operations and bytes moved to or from memory, as sizes."""

    flops: SizeLike
    bytes: SizeLike


class Op:
    """Base of all operations. Subclasses set `name` and define `infer` and `evaluate`; `OPS[name]` is the only instance.

    infer(*input_types, **attrs) -> Type: the type rule; raises TypeMismatch. Its signature is the op's signature: positional
        parameters are inputs (defaults of None mark optional ones), keyword-only parameters are attributes.
    evaluate(ctx, *arrays, **attrs) -> array: numpy reference; floats are `ctx.float` arrays, quantized values `Quantized`.
    decompose(*nodes, **attrs) -> Node: for composites, the same value from simpler ops; None for primitives.
    flops(type, *input_types, **attrs) -> size: arithmetic operations; bytes are those of inputs and result.
    """

    name: ClassVar[str]
    level: ClassVar[str] = "tensor"
    tags: ClassVar[frozenset[str]] = frozenset()
    infer: Callable[..., Type]
    evaluate: Callable[..., Any]
    decompose: Callable[..., Node] | None = None

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if not abstract and "name" in cls.__dict__:
            if cls.name in OPS:
                raise StemmaError(f"Two operations are called {cls.name!r}.")
            OPS[cls.name] = cls()

    def __init__(self) -> None:
        signature = inspect.signature(self.infer)
        self.defaults = {p.name: p.default for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def flops(self, *types: Any, **attrs: Any) -> SizeLike:
        """Arithmetic operations, from the result's and the inputs' types; by default one per element of the (first) result."""
        return next((t.elements for t in tensors_of(types[0])), 0)

    def cost(self, node: Node) -> Cost:
        """FLOPs and bytes of one evaluation that reads all inputs and writes all results once."""
        types = [i.type for i in node.inputs]
        return Cost(
            self.flops(node.type, *types, **node.attrs),
            size._sum([b for t in (*types, node.type) for b in type_bytes(t)]),
        )

    def __call__(self, *inputs: Any, **attrs: Any) -> Node:
        """Build the node; TypeMismatch when the type rule rejects it. Python numbers become constants of the other dtype."""
        for value in inputs:
            if hasattr(value, "trace_op"):  # a pattern variable or another tracer takes over
                traced: Node = value.trace_op(self, inputs, attrs)
                return traced
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        unknown = attrs.keys() - self.defaults.keys()
        missing = [k for k, v in self.defaults.items() if k not in attrs and v is inspect.Parameter.empty]
        if unknown or missing:
            raise TypeMismatch(f"{self.name}: unknown attributes {sorted(unknown)}, missing attributes {missing}.")
        full = {key: freeze(attrs.get(key, default)) for key, default in self.defaults.items()}
        like = next((v for v in inputs if isinstance(v, Node)), None)
        nodes = tuple(_as_node(self, v, like) for v in inputs)
        key = (self.name, nodes, tuple((k, _key(v)) for k, v in full.items()))
        node = _nodes.get(key)
        if node is None:
            try:
                inferred = self.infer(*(n.type for n in nodes), **full)
            except TypeMismatch as error:
                types = ", ".join(repr(n.type) for n in nodes)
                line = f" (from {_origin.get().line})" if _origin.get().line else ""
                raise TypeMismatch(f"{self.name}({types}): {error}{line}") from None
            except TypeError as error:
                raise TypeMismatch(f"{self.name}: {error}") from None
            node = Node.__new__(Node)
            for slot, value in (("op", self), ("inputs", nodes), ("attrs", MappingProxyType(full)), ("type", inferred),
                                ("origin", _origin.get())):  # fmt: skip
                object.__setattr__(node, slot, value)
            _nodes[key] = node
        return node

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def type_bytes(type: Type) -> list[SizeLike]:
    """Stored bytes of each tensor of a type."""
    return [t.bytes for t in tensors_of(type)]


def _as_node(op: Op, value: object, like: Node | None) -> Node:
    if isinstance(value, Node):
        return value
    if isinstance(value, (int, float)) and like is not None:
        return OPS["constant"](value=value, dtype=like.dtype)
    raise TypeMismatch(f"{op.name}: {value!r} is not a node.")


def freeze(value: Any) -> Any:
    """Lists become tuples; other attribute values must be immutable already."""
    return tuple(freeze(v) for v in value) if isinstance(value, (list, tuple)) else value


def _key(value: Any) -> Any:
    """A hashable identity of an attribute value that tells 1, 1.0, True and -0.0 apart."""
    if isinstance(value, tuple):
        return tuple(_key(v) for v in value)
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, value)
