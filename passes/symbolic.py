"""Exact reading of small integer and boolean tensors: the value of one element as an expression over its indices.

`Elements().of(node, index)` walks from a node down to iotas, sizes and constants, and gives the element at a symbolic index: a
`Formula` for booleans, `Cases` (guarded polynomials or numbers) otherwise. Index arithmetic is `ir.size` arithmetic on dimensions
made for the purpose. Whatever depends on data raises `NotUnderstood` with the reason. Used to understand attention masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stemma.ir import Node, Size, SizeLike, dim, dtype, size

MAX_CASES = 16


class NotUnderstood(Exception):
    """The element cannot be written over its indices; the message says which node is in the way."""


@dataclass(frozen=True)
class AtLeastZero:
    """The atom `value >= 0`."""

    value: Size

    def __str__(self) -> str:
        return f"{self.value} >= 0"


@dataclass(frozen=True)
class Every:
    """A conjunction."""

    parts: tuple[Formula, ...]

    def __str__(self) -> str:
        return "(" + " and ".join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class Either:
    """A disjunction."""

    parts: tuple[Formula, ...]

    def __str__(self) -> str:
        return "(" + " or ".join(map(str, self.parts)) + ")"


Formula = bool | AtLeastZero | Every | Either
Number = SizeLike | float
Cases = tuple[tuple[Formula, Number], ...]  # guards exclude each other and together always hold


class Ranges:
    """Index variables and what is known of them: 0 <= variable < extent."""

    def __init__(self) -> None:
        self.extents: dict[str, SizeLike] = {}

    def variable(self, extent: SizeLike) -> Size:
        """A new index variable below `extent`."""
        name = f"_i{len(self.extents)}"
        self.extents[name] = extent
        return dim(name, 0, max(size.bounds(extent)[1] - 1, 0))

    def never_negative(self, value: SizeLike) -> bool:
        """Whether `value >= 0` for all indices and sizes; False when that is not provable."""
        for name, extent in self.extents.items():
            factor = _factor(value, name)
            if factor:
                value = size.substitute(value, {name: extent - 1 if factor < 0 else 0})
        return size.bounds(value)[0] >= 0

    def at_least_zero(self, value: Number) -> Formula:
        """The formula `value >= 0`, decided where that is provable."""
        if isinstance(value, Size):
            if self.never_negative(value):
                return True
            return False if self.never_negative(value * -1 - 1) else AtLeastZero(value)
        return bool(value >= 0)

    def divide(self, value: SizeLike, by: SizeLike) -> tuple[SizeLike, SizeLike] | None:
        """Quotient and remainder of an index by an extent, when provable term by term; else None."""
        if by == 1:
            return value, 0
        quotient: SizeLike = 0
        rest: SizeLike = 0
        for monomial, coefficient in size._terms(value):
            term = size._canonical({monomial: coefficient})
            part = size.floordiv(term, by)
            if part * by == term:
                quotient = quotient + part
            else:
                rest = rest + term
        fits = self.never_negative(rest) and self.never_negative(by - 1 - rest)
        return (quotient, rest) if fits else None


def _factor(value: SizeLike, name: str) -> int:
    """The integer factor of a dimension that occurs only linearly and alone; 0 otherwise."""
    found = 0
    for monomial, coefficient in size._terms(value):
        if any(d.name == name for d in size.dims(size._canonical({monomial: 1}))):
            if len(monomial) != 1 or found or not hasattr(monomial[0], "name"):
                return 0
            found = coefficient
    return found


def negation(formula: Formula) -> Formula:
    match formula:
        case bool():
            return not formula
        case AtLeastZero(value=value):
            return AtLeastZero(_size(value * -1 - 1))
        case Every(parts=parts):
            return either(*map(negation, parts))
        case Either(parts=parts):
            return every(*map(negation, parts))


def every(*parts: Formula) -> Formula:
    """The conjunction, simplified."""
    flat = _flatten(parts, Every)
    if False in flat or any(negation(p) in flat for p in flat):
        return False
    kept = tuple(p for p in flat if p is not True)
    return True if not kept else kept[0] if len(kept) == 1 else Every(kept)


def either(*parts: Formula) -> Formula:
    """The disjunction, simplified."""
    flat = _flatten(parts, Either)
    if True in flat or any(negation(p) in flat for p in flat):
        return True
    kept = tuple(p for p in flat if p is not False)
    return False if not kept else kept[0] if len(kept) == 1 else Either(kept)


def _flatten(parts: Sequence[Formula], kind: type[Every] | type[Either]) -> tuple[Formula, ...]:
    flat: dict[Formula, None] = {}
    for part in parts:
        flat.update(dict.fromkeys(part.parts if isinstance(part, kind) else (part,)))
    return tuple(flat)


def _size(value: SizeLike) -> Size:
    assert isinstance(value, Size)
    return value


def merged(cases: Sequence[tuple[Formula, Number]]) -> Cases:
    """Cases without impossible ones, those of equal value joined."""
    found: dict[Any, tuple[Formula, Number]] = {}
    for guard, value in cases:
        if guard is False:
            continue
        key = value if isinstance(value, Size) else (type(value), value)
        found[key] = (either(found[key][0], guard), value) if key in found else (guard, value)
    if len(found) > MAX_CASES:
        raise NotUnderstood(f"the element has more than {MAX_CASES} cases")
    return tuple(found.values())


def number(value: float | int | bool) -> Number:
    """A number as a leaf: an int when it is one."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return int(value) if isinstance(value, bool) else value


class Elements:
    """Reads elements of nodes; remembers what it has read."""

    def __init__(self) -> None:
        self.ranges = Ranges()
        self._memo: dict[tuple[Node, tuple[SizeLike, ...]], Formula | Cases] = {}

    def formula(self, node: Node, index: tuple[SizeLike, ...]) -> Formula:
        found = self.of(node, index)
        return self.nonzero(found) if isinstance(found, tuple) else found

    def nonzero(self, cases: Cases) -> Formula:
        """Whether a number is not zero."""
        return either(*(every(g, self.compare("ne", v, 0)) for g, v in cases))

    def cases(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        found = self.of(node, index)
        return found if isinstance(found, tuple) else merged([(found, 1), (negation(found), 0)])

    def of(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        """The element of `node` at `index`; NotUnderstood when it depends on data."""
        key = (node, index)
        if key not in self._memo:
            reader = getattr(self, "_" + node.op.name, None)
            if reader is None:
                raise NotUnderstood(f"it depends on {_describe(node)}")
            self._memo[key] = reader(node, index)
        return self._memo[key]

    def _constant(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        value = node.attrs["value"]
        return bool(value) if node.dtype == "bool" else ((True, number(value)),)

    def _size_value(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        return ((True, node.attrs["size"]),)

    def _iota(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        return ((True, index[0]),)

    def _cast(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        source, target = (dtype(n.dtype).kind for n in (node.inputs[0], node))
        if target == "bool":
            return self.nonzero(self.cases(node.inputs[0], index))
        found = self.cases(node.inputs[0], index)
        if source == "float" and target == "int" and any(isinstance(v, float) for _, v in found):
            raise NotUnderstood(f"a fraction is rounded by {_describe(node)}")
        return found

    # Movement of elements.

    def _broadcast_to(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        return self.of(node.inputs[0], aligned(node.inputs[0], index))

    def _transpose(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        axes = node.attrs["axes"]
        return self.of(node.inputs[0], tuple(index[axes.index(i)] for i in range(len(axes))))

    def _slice(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        axis = node.attrs["axis"]
        moved = node.attrs["start"] + index[axis] * node.attrs["step"]
        return self.of(node.inputs[0], (*index[:axis], moved, *index[axis + 1 :]))

    def _reshape(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        x = node.inputs[0]
        before, after = list(x.shape), [(s, i) for s, i in zip(node.shape, index, strict=True) if s != 1]
        found: list[SizeLike] = []
        while before:
            extent = before.pop()
            if extent == 1:
                found.append(0)
                continue
            if after and after[-1][0] == extent:
                found.append(after.pop()[1])
                continue
            flat: SizeLike = 0
            stride: SizeLike = 1
            for s, i in reversed(after):
                flat, stride = flat + i * stride, stride * s
            group = [extent, *reversed(before)]
            before, after = [], []
            for s in group[:-1]:
                split = self.ranges.divide(flat, s)
                if split is None:
                    raise NotUnderstood(f"the indices of {_describe(node)} cannot be taken apart")
                flat, inner = split
                found.append(inner)
            found.append(flat)
        return self.of(x, tuple(reversed(found)))

    def _concat(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        axis, start, guarded = node.attrs["axis"], 0, []
        for part in node.inputs:
            stop: SizeLike = start + part.shape[axis]
            here = every(self.ranges.at_least_zero(index[axis] - start), self.ranges.at_least_zero(stop - 1 - index[axis]))
            if here is not False:
                guarded.append((here, part, (*index[:axis], index[axis] - start, *index[axis + 1 :])))
            start = stop  # type: ignore[assignment]
        return self._guarded(node, guarded)

    def _guarded(self, node: Node, parts: Sequence[tuple[Formula, Node, tuple[SizeLike, ...]]]) -> Formula | Cases:
        if node.dtype == "bool":
            return either(*(every(g, self.formula(p, i)) for g, p, i in parts))
        return merged([(every(g, inner), v) for g, p, i in parts for inner, v in self.cases(p, i)])

    def _take(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        x, indices = node.inputs
        axis, rank = node.attrs["axis"], node.inputs[1].tensor.rank
        picked = self.cases(indices, index[axis : axis + rank])
        return self._picked(node, x, picked, index[:axis], index[axis + rank :])

    def _take_along(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        x, indices = node.inputs
        axis = node.attrs["axis"]
        return self._picked(node, x, self.cases(indices, aligned(indices, index)), index[:axis], index[axis + 1 :])

    def _picked(
        self, node: Node, x: Node, picked: Cases, before: tuple[SizeLike, ...], after: tuple[SizeLike, ...]
    ) -> Formula | Cases:
        if any(isinstance(v, float) for _, v in picked):
            raise NotUnderstood(f"{_describe(node)} is indexed by fractions")
        return self._guarded(node, [(g, x, (*before, v, *after)) for g, v in picked])  # type: ignore[arg-type]

    def _cumsum(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        axis, x = node.attrs["axis"], node.inputs[0]
        step = self.ranges.variable(x.shape[axis])
        found = self.cases(x, (*index[:axis], step, *index[axis + 1 :]))
        if len(found) != 1 or isinstance(found[0][1], float) or size.dims(found[0][1]) & size.dims(step):
            raise NotUnderstood(f"{_describe(node)} adds up values that vary")
        return ((True, found[0][1] * (index[axis] + 1)),)

    # Elementwise.

    def _pairs(self, node: Node, index: tuple[SizeLike, ...]) -> Iterator[tuple[Formula, Number, Number]]:
        """The possible combinations of two operands' elements, each with its guard."""
        a, b = (self.cases(x, aligned(x, index)) for x in node.inputs)
        for guard_a, x in a:
            for guard_b, y in b:
                if (guard := every(guard_a, guard_b)) is not False:
                    yield guard, x, y

    def _arithmetic(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        return merged([(g, _calculate(node.op.name, x, y)) for g, x, y in self._pairs(node, index)])

    _add = _sub = _mul = _arithmetic

    def _comparison(self, node: Node, index: tuple[SizeLike, ...]) -> Formula:
        return either(*(every(g, self.compare(node.op.name, x, y)) for g, x, y in self._pairs(node, index)))

    _lt = _le = _gt = _ge = _comparison

    def _ne(self, node: Node, index: tuple[SizeLike, ...]) -> Formula:
        if node.inputs[0].dtype == "bool":
            a, b = (self.formula(x, aligned(x, index)) for x in node.inputs)
            return either(every(a, negation(b)), every(negation(a), b))
        return self._comparison(node, index)

    def _eq(self, node: Node, index: tuple[SizeLike, ...]) -> Formula:
        return negation(self._ne(node, index))

    def compare(self, name: str, x: Number, y: Number) -> Formula:
        """A comparison of two elements; `eq` is the negation of anything that is not a known comparison of order."""
        match name:
            case "gt" | "ge":
                return self.compare({"gt": "lt", "ge": "le"}[name], y, x)
            case "lt" | "le":
                if not isinstance(x, Size) and not isinstance(y, Size):
                    return bool(x < y if name == "lt" else x <= y)
                return self.ranges.at_least_zero(_calculate("sub", _calculate("sub", y, x), int(name == "lt")))
            case _:
                if not isinstance(x, Size) and not isinstance(y, Size):
                    return bool(x != y)
                return either(self.compare("lt", x, y), self.compare("lt", y, x))

    def _neg(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        return merged([(g, _calculate("mul", v, -1)) for g, v in self.cases(node.inputs[0], index)])

    def _floordiv(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        return merged([(g, self._divided(node, x, y)[0]) for g, x, y in self._pairs(node, index)])

    def _mod(self, node: Node, index: tuple[SizeLike, ...]) -> Cases:
        return merged([(g, self._divided(node, x, y)[1]) for g, x, y in self._pairs(node, index)])

    def _divided(self, node: Node, x: Number, y: Number) -> tuple[SizeLike, SizeLike]:
        if isinstance(x, int) and isinstance(y, int) and y != 0:
            return divmod(x, y)
        if not isinstance(x, float) and not isinstance(y, float) and size.bounds(y)[0] > 0:
            if (found := self.ranges.divide(x, y)) is not None:
                return found
        raise NotUnderstood(f"the division of {x} by {y} in {_describe(node)} has no simple form")

    def _where(self, node: Node, index: tuple[SizeLike, ...]) -> Formula | Cases:
        condition, a, b = node.inputs
        chosen = self.formula(condition, aligned(condition, index))
        parts = [(chosen, a, aligned(a, index)), (negation(chosen), b, aligned(b, index))]
        return self._guarded(node, [p for p in parts if p[0] is not False])

    def _logical_not(self, node: Node, index: tuple[SizeLike, ...]) -> Formula:
        return negation(self.formula(node.inputs[0], index))

    def _logical_and(self, node: Node, index: tuple[SizeLike, ...]) -> Formula:
        return every(*(self.formula(x, aligned(x, index)) for x in node.inputs))

    def _logical_or(self, node: Node, index: tuple[SizeLike, ...]) -> Formula:
        return either(*(self.formula(x, aligned(x, index)) for x in node.inputs))


def _calculate(name: str, x: Number, y: Number) -> Number:
    if isinstance(x, float) or isinstance(y, float):
        if isinstance(x, Size) or isinstance(y, Size):
            raise NotUnderstood("an index is combined with a fraction or a huge number")
        return number(float(x + y if name == "add" else x - y if name == "sub" else x * y))
    return x + y if name == "add" else x - y if name == "sub" else x * y


def aligned(x: Node, index: tuple[SizeLike, ...]) -> tuple[SizeLike, ...]:
    """The index into an operand that broadcasts to the shape `index` belongs to."""
    own = index[len(index) - x.tensor.rank :]
    return tuple(0 if s == 1 else i for s, i in zip(x.shape, own, strict=True))


def _describe(node: Node) -> str:
    kind = {"param": "the input", "weight": "the weight"}.get(node.op.name)
    what = f"{kind} {node.attrs['name']!r}" if kind else f"{node!r}"
    return what + (f" from {node.origin.line}" if node.origin.line else "")
