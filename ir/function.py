"""Functions and modules: named parameters and results over nodes, interned like nodes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from stemma.ir import size
from stemma.ir.errors import StemmaError, VerifyError
from stemma.ir.node import Node, _key, freeze
from stemma.ir.types import Tensor, Tuple, Type, tensors_of


def topological(results: Iterable[Node], known: Iterable[Node] = ()) -> list[Node]:
    """Every node that the results depend on, not looking behind `known` ones; inputs first, in a stable order, no recursion."""
    order: list[Node] = []
    done: set[Node] = set(known)
    stack: list[tuple[Node, bool]] = [(r, False) for r in reversed(list(results))]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded:
            done.add(node)
            order.append(node)
        else:
            stack.append((node, True))
            stack.extend((i, False) for i in reversed(node.inputs) if i not in done)
    return order


class Function:
    """A function of tensors: parameter nodes in order, and named results. Regions are functions with the name ""."""

    __slots__ = ("name", "params", "results", "result_names", "_nodes", "__weakref__")
    _table: weakref.WeakValueDictionary[tuple[Any, ...], Function] = weakref.WeakValueDictionary()
    name: str
    params: tuple[Node, ...]
    results: tuple[Node, ...]
    result_names: tuple[str, ...]
    _nodes: tuple[Node, ...] | None

    def __new__(cls, name: str, params: Iterable[Node], results: Mapping[str, Node] | Iterable[tuple[str, Node]]) -> Function:
        pairs = tuple(results.items() if isinstance(results, Mapping) else results)
        key = (name, tuple(params), pairs)
        self = cls._table.get(key)
        if self is None:
            self = super().__new__(cls)
            self.name, self.params = name, key[1]
            self.result_names, self.results = tuple(n for n, _ in pairs), tuple(v for _, v in pairs)
            self._nodes = None
            names = [p.attrs["name"] for p in self.params]
            for repeated in {n for n in names if names.count(n) > 1} | {
                n for n in self.result_names if self.result_names.count(n) > 1
            }:
                raise VerifyError(f"Function {name!r}: the name {repeated!r} is used twice.")
            cls._table[key] = self
        return self

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes the results depend on, inputs first."""
        if self._nodes is None:
            self._nodes = tuple(topological(self.results))
        return self._nodes

    @property
    def type(self) -> Type:
        """The type of the results: a tensor for one, else a tuple."""
        if any(isinstance(r.type, Tuple) for r in self.results):
            raise VerifyError(f"Function {self.name!r} returns a node with several results; read one with get(node, index=i).")
        types = tuple(r.type for r in self.results if not isinstance(r.type, Tuple))
        return types[0] if len(types) == 1 else Tuple(types)

    def users(self) -> dict[Node, list[Node]]:
        """For each node, the nodes of this function that read it."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for i in dict.fromkeys(node.inputs):
                found[i].append(node)
        return found

    def dims(self) -> list[size.Dim]:
        """The named dimensions in parameter order, then those that appear only inside."""
        found: dict[size.Dim, None] = {}
        for node in (*self.params, *self.nodes):
            for tensor in tensors_of(node.type):
                for s in tensor.shape:
                    found.update(dict.fromkeys(sorted(size.dims(s), key=str)))
        return list(found)

    def rewrite(self, replace: Callable[[Node, tuple[Node, ...]], Node]) -> Function:
        """A copy in which each node, inputs first, is what `replace(node, new_inputs)` returns."""
        new: dict[Node, Node] = {}
        for node in self.nodes:
            new[node] = replace(node, tuple(new[i] for i in node.inputs))
        return self.with_results(zip(self.result_names, (new[r] for r in self.results), strict=True))

    def substitute(self, mapping: Mapping[Node, Node]) -> Function:
        """A copy in which the given nodes are replaced."""
        return self.rewrite(lambda node, inputs: mapping.get(node) or node.rebuild(*inputs))

    def with_results(self, results: Iterable[tuple[str, Node]]) -> Function:
        """The same name and parameters with other results."""
        return Function(self.name, self.params, tuple(results))

    def inline(self, *arguments: Node) -> tuple[Node, ...]:
        """The results as nodes over the given arguments instead of the parameters."""
        new = dict(zip(self.params, arguments, strict=True))
        for node in self.nodes:
            if node not in new:
                new[node] = node.rebuild(*(new[i] for i in node.inputs))
        return tuple(new[r] for r in self.results)

    def __repr__(self) -> str:
        return f"<function {self.name or '(region)'}: {len(self.nodes)} nodes>"


class Module:
    """Functions plus constant properties (`kind`, context limit, ...). Holds no weights: those are named leaves."""

    __slots__ = ("functions", "properties", "__weakref__")
    _table: weakref.WeakValueDictionary[tuple[Any, ...], Module] = weakref.WeakValueDictionary()
    functions: tuple[Function, ...]
    properties: Mapping[str, Any]

    def __new__(cls, functions: Iterable[Function], properties: Mapping[str, Any] | None = None) -> Module:
        functions = tuple(functions)
        frozen = {k: freeze(v) for k, v in (properties or {}).items()}
        key = (functions, tuple((k, _key(v)) for k, v in frozen.items()))
        self = cls._table.get(key)
        if self is None:
            self = super().__new__(cls)
            self.functions, self.properties = functions, MappingProxyType(frozen)
            cls._table[key] = self
        return self

    def __iter__(self) -> Iterator[Function]:
        return iter(self.functions)

    def __getitem__(self, name: str) -> Function:
        for function in self.functions:
            if function.name == name:
                return function
        raise StemmaError(f"The module has no function {name!r}; it has {', '.join(f.name for f in self.functions)}.")

    def replace(self, *functions: Function, **properties: Any) -> Module:
        """A copy in which functions of the same name are replaced, new ones appended, and properties updated."""
        new = {f.name: f for f in self.functions} | {f.name: f for f in functions}
        return Module(new.values(), {**self.properties, **properties})

    def map(self, change: Callable[[Function], Function]) -> Module:
        """A copy with every function changed."""
        return Module((change(f) for f in self.functions), self.properties)

    def weights(self) -> dict[str, Tensor]:
        """Name and type of every weight that a function reads, regions included."""
        found: dict[str, Tensor] = {}
        for function in self.functions:
            for node in walk(function):
                if node.op.name == "weight":
                    found[node.attrs["name"]] = node.tensor
        return found

    def __repr__(self) -> str:
        return f"<module: {', '.join(map(repr, self.functions))}>"


def walk(function: Function) -> Iterator[Node]:
    """Every node of a function and of the regions inside it."""
    for node in function.nodes:
        yield node
        for value in node.attrs.values():
            if isinstance(value, Function):
                yield from walk(value)
