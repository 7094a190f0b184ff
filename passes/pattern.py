"""Patterns: expressions over variables, written with the IR's own operations, and how they match nodes.

A pattern function such as `lambda x, w, eps: ops.rms_norm(x, w, eps=eps)` is called with `Var`s: operations called on a pattern
give a pattern (`Op.__call__` hands over to `trace_op`). Two functions in the IR's own syntax, as in TVM Relax and the onnxscript
rewriter. The same function called with nodes builds the graph it matches, which is how rules are tested.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stemma.ir import OPS, Function, Node, Op

COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "logical_and", "logical_or", "eq", "ne"})


class Pattern:
    """Base of patterns: has the arithmetic operators of nodes, and gives a pattern for every operation applied to it."""

    def trace_op(self, op: Op, inputs: tuple[Any, ...], attrs: Mapping[str, Any]) -> Pattern:
        return OpPattern(op, tuple(_as_pattern(i) for i in inputs if i is not None), dict(attrs))

    def __add__(self, other: Any) -> Any:
        return OPS["add"](self, other)

    def __radd__(self, other: Any) -> Any:
        return OPS["add"](other, self)

    def __sub__(self, other: Any) -> Any:
        return OPS["sub"](self, other)

    def __rsub__(self, other: Any) -> Any:
        return OPS["sub"](other, self)

    def __mul__(self, other: Any) -> Any:
        return OPS["mul"](self, other)

    def __rmul__(self, other: Any) -> Any:
        return OPS["mul"](other, self)

    def __truediv__(self, other: Any) -> Any:
        return OPS["div"](self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return OPS["div"](other, self)

    def __neg__(self) -> Any:
        return OPS["neg"](self)

    def __matmul__(self, other: Any) -> Any:
        return OPS["matmul"](self, other)


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """A variable: any node where it is an input, any value where it is an attribute; the same one everywhere it appears."""

    name: str


class _Any(Pattern):
    """`ANY`: matches any input or attribute value without naming it."""

    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()


@dataclass(frozen=True, eq=False)
class OpPattern(Pattern):
    """An operation on patterns. An attribute that is not mentioned must have its default."""

    op: Op
    inputs: tuple[Pattern, ...]
    attrs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Scalar(Pattern):
    """A `constant` node; `value` is a number it must equal, or a variable that captures the number."""

    value: Any


@dataclass(frozen=True, eq=False)
class Exact(Pattern):
    """One given node."""

    node: Node


@dataclass(frozen=True, eq=False)
class AnyOf(Pattern):
    """The first alternative that matches; later ones are tried when the rest of the pattern fails."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True, eq=False)
class Optional(Pattern):
    """A trailing input that may be absent; its variables are then None."""

    inner: Pattern


def _as_pattern(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    return Exact(value) if isinstance(value, Node) else Scalar(value)


def scalar(value: Any, like: Any = None) -> Any:
    """A constant by value: `scalar(eps)` captures the number of a `constant` node in the variable `eps`.

    `like` gives the element type when the pattern function is called with nodes and no neighbour shows it (as in `where`).
    """
    if isinstance(value, Pattern):
        return Scalar(value)
    return OPS["constant"](value=value, dtype=like.dtype) if isinstance(like, Node) else value


def optional(value: Any) -> Any:
    """A last input that may be missing, as in `ops.linear(x, w, optional(bias))`."""
    return Optional(value) if isinstance(value, Pattern) else value


def any_of(*options: Any) -> Any:
    """Alternatives. Called with nodes (in a rule's test), one alternative at a time is built."""
    if any(isinstance(o, Pattern) for o in options):
        return AnyOf(tuple(_as_pattern(o) for o in options))
    return options[choices.get().pick(len(options))]


def maybe_cast(value: Any) -> Any:
    """The value, or a cast of it."""
    if isinstance(value, Pattern):
        return AnyOf((OpPattern(OPS["cast"], (value,), {"dtype": ANY}), value))
    return value


def maybe_reshape(value: Any) -> Any:
    """The value, or a reshape of it."""
    if isinstance(value, Pattern):
        return AnyOf((OpPattern(OPS["reshape"], (value,), {"shape": ANY}), value))
    return value


def leaf(op: Op, **attrs: Any) -> Any:
    """An operation without inputs whose attributes hold variables: `leaf(ops.iota, size=n, dtype=ANY)`."""
    return OpPattern(op, (), attrs) if any(isinstance(v, Pattern) for v in attrs.values()) else op(**attrs)


class Choices:
    """Which alternative each `any_of` takes when a pattern function is called with nodes; steps through all combinations."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int]] = []
        self._at = 0

    def pick(self, count: int) -> int:
        if self._at == len(self.taken):
            self.taken.append((0, count))
        self._at += 1
        return self.taken[self._at - 1][0]

    def advance(self) -> bool:
        """Go to the next combination; False when there is none."""
        self._at = 0
        while self.taken:
            index, count = self.taken.pop()
            if index + 1 < count:
                self.taken.append((index + 1, count))
                return True
        return False


choices: contextvars.ContextVar[Choices] = contextvars.ContextVar("choices", default=Choices())


class Binding(NamedTuple):
    """What is bound so far: values of variables, and the nodes that operations of the pattern matched."""

    values: dict[str, Any]
    nodes: tuple[Node, ...]


class NotYet(Exception):
    """A check asked for the users of a node that this sweep has just made; the rule is tried again in the next sweep."""


@dataclass
class Match:
    """A match, as a rule's `check` sees it: `match["x"]` is what the variable x is bound to.

    root: the matched node. nodes: every node an operation of the pattern matched, the root first.
    """

    root: Node
    values: Mapping[str, Any]
    nodes: tuple[Node, ...]
    function: Function
    _users: Callable[[], Mapping[Node, list[Node]]] = field(repr=False)
    asked_users: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def users(self, node: Node) -> list[Node]:
        """The nodes of the function that read `node`; results of the function do not count as users."""
        self.asked_users = True
        found = self._users()
        if node not in found:
            raise NotYet
        return found[node]

    def only_used_inside(self, node: Node) -> bool:
        """Whether every reader of `node` is part of the match, and it is no result of the function."""
        return all(u in self.nodes for u in self.users(node)) and node not in self.function.results


class Matcher:
    """Matches patterns against nodes by backtracking; with `explain`, remembers the failure that came furthest."""

    def __init__(self, explain: bool = False) -> None:
        self.explain = explain
        self.furthest: tuple[int, Node, str] | None = None
        self._expected: list[str] = []

    def match(self, pattern: Pattern, node: Node, found: Binding) -> Iterator[Binding]:
        """Every way in which `node` matches, given what is bound already."""
        match pattern:
            case OpPattern():
                yield from self._op(pattern, node, found)
            case Var(name=name):
                yield from self._bind(name, node, found, node)
            case _Any():
                yield found
            case Scalar(value=value):
                if node.op.name != "constant":
                    self._fail(found, node, f"a constant is expected instead of {node.op.name}")
                else:
                    yield from self._attribute("value", value, node.attrs["value"], found, node)
            case AnyOf(options=options):
                for option in options:
                    yield from self.match(option, node, found)
            case Optional(inner=inner):
                yield from self.match(inner, node, found)
            case Exact(node=expected):
                if node is expected:
                    yield found
                else:
                    self._fail(found, node, f"{expected!r} itself is expected instead of {node!r}")

    def _op(self, pattern: OpPattern, node: Node, found: Binding) -> Iterator[Binding]:
        op = pattern.op
        if node.op.name != op.name:
            self._fail(found, node, f"{op.name} is expected instead of {node.op.name}", op.name)
            return
        found = Binding(found.values, (*found.nodes, node))
        required = sum(not isinstance(i, Optional) for i in pattern.inputs)
        if not required <= len(node.inputs) <= len(pattern.inputs):
            self._fail(found, node, f"{op.name} has {len(node.inputs)} inputs instead of {len(pattern.inputs)}")
            return
        for after_attrs in self._attributes(pattern, node, found):
            yield from self._inputs(pattern.inputs, node.inputs, after_attrs)
            if op.name in COMMUTATIVE and node.inputs[0] is not node.inputs[1]:
                yield from self._inputs(pattern.inputs, node.inputs[::-1], after_attrs)

    def _inputs(self, patterns: tuple[Pattern, ...], nodes: tuple[Node, ...], found: Binding) -> Iterator[Binding]:
        if not patterns:
            yield found
        elif not nodes:
            yield Binding({**found.values, **{n: None for p in patterns for n in variables(p)}}, found.nodes)
        else:
            for after in self.match(patterns[0], nodes[0], found):
                yield from self._inputs(patterns[1:], nodes[1:], after)

    def _attributes(self, pattern: OpPattern, node: Node, found: Binding) -> Iterator[Binding]:
        results = [found]
        for name, actual in node.attrs.items():
            expected = pattern.attrs.get(name, node.op.defaults[name])
            results = [r for f in results for r in self._attribute(name, expected, actual, f, node)]
        yield from results

    def _attribute(self, name: str, expected: Any, actual: Any, found: Binding, node: Node) -> Iterator[Binding]:
        if isinstance(expected, Var):
            yield from self._bind(expected.name, actual, found, node)
        elif expected is ANY or (expected == actual and isinstance(expected, bool) == isinstance(actual, bool)):
            yield found
        else:
            self._fail(found, node, f"{node.op.name} has {name}={actual!r} instead of {expected!r}")

    def _bind(self, name: str, value: Any, found: Binding, node: Node) -> Iterator[Binding]:
        if name not in found.values:
            yield Binding({**found.values, name: value}, found.nodes)
        elif found.values[name] is value or (not isinstance(value, Node) and found.values[name] == value):
            yield found
        else:
            self._fail(found, node, f"{name} is bound to {found.values[name]!r} already, here it would be {value!r}")

    def _fail(self, found: Binding, node: Node, reason: str, expected: str | None = None) -> None:
        """Keep the failure after the most operations; alternatives that fail at the same node are named together."""
        if not self.explain:
            return
        depth = len(found.nodes)
        if self.furthest is None or depth > self.furthest[0]:
            self.furthest, self._expected = (depth, node, reason), [expected] if expected else []
        elif depth == self.furthest[0] and node is self.furthest[1] and expected and self._expected:
            if expected not in self._expected:
                self._expected.append(expected)
                self.furthest = (depth, node, f"{' or '.join(self._expected)} is expected instead of {node.op.name}")


def variables(pattern: Any) -> list[str]:
    """Names of the variables of a pattern, in order of appearance."""
    match pattern:
        case Var(name=name):
            return [name]
        case OpPattern(inputs=inputs, attrs=attrs):
            parts: tuple[Any, ...] = (*attrs.values(), *inputs)
        case AnyOf(options=options):
            parts = options
        case Optional(inner=inner) | Scalar(value=inner):
            parts = (inner,)
        case _:
            parts = ()
    return list(dict.fromkeys(n for p in parts for n in variables(p)))


def root_ops(pattern: Pattern) -> frozenset[str] | None:
    """Names of the operations that a pattern's root can be; None when it can be any."""
    match pattern:
        case OpPattern(op=op):
            return frozenset({op.name})
        case Scalar():
            return frozenset({"constant"})
        case AnyOf(options=options):
            found = [root_ops(o) for o in options]
            return None if None in found else frozenset(n for names in found if names for n in names)
        case _:
            return None


def operations(pattern: Any) -> int:
    """How many operations a full match of the pattern has, taking the longest alternatives."""
    match pattern:
        case OpPattern(inputs=inputs):
            return 1 + sum(map(operations, inputs))
        case AnyOf(options=options):
            return max(map(operations, options))
        case Optional(inner=inner):
            return operations(inner)
        case _:
            return 0
