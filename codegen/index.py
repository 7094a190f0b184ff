"""Index arithmetic of a kernel under construction, done with sizes.

A loop variable, or an index that was read from memory, is a dimension of size arithmetic with a known extent. So index maps of
views compose as polynomials, divisions that a reshape introduces cancel, and comparisons with the ends of a part are often decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stemma.ir import Dim, Node, Size, SizeLike, dim, ops, size
from stemma.ir.size import Call

Index = tuple[SizeLike, ...]
LIMIT = size.UNBOUNDED


class Indices:
    """The variables of one kernel and arithmetic on them. An index is a size over these variables and the kernel's dimensions."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._prefix = "_i"
        while any(name.startswith(self._prefix) for name in taken):
            self._prefix = "_" + self._prefix
        self._nodes: dict[Dim, Node] = {}
        self._extents: dict[Dim, SizeLike] = {}
        self._known: dict[Node, SizeLike] = {}

    def loop(self, name: str, extent: SizeLike, axis: int) -> SizeLike:
        """The variable of a loop; 0 when the loop runs once."""
        return 0 if extent == 1 else self.wrap(ops.loop_index(name=name, extent=extent, axis=axis), extent)

    def wrap(self, node: Node, extent: SizeLike) -> SizeLike:
        """An i64 scalar with values 0 .. extent-1 as an index."""
        if node not in self._known:
            high = min(max(size.bounds(extent)[1] - 1, 0), LIMIT)
            variable = dim(f"{self._prefix}{len(self._nodes)}", 0, high)
            (found,) = size.dims(variable)
            self._nodes[found], self._extents[found], self._known[node] = node, extent, variable
        return self._known[node]

    def variable(self, index: SizeLike) -> tuple[Node, SizeLike] | None:
        """(loop, offset) when the index is a loop variable plus sizes; None for any other form."""
        variables = [(m, c) for m, c in _terms(index) if any(self._varies(atom) for atom in m)]
        if len(variables) != 1 or variables[0][1] != 1 or len(variables[0][0]) != 1:
            return None
        atom = variables[0][0][0]
        if not isinstance(atom, Dim) or self._nodes[atom].op.name != "loop_index":
            return None
        return self._nodes[atom], index - Size((((atom,), 1),))

    def _varies(self, atom: Dim | Call) -> bool:
        if isinstance(atom, Dim):
            return atom in self._extents
        return bool((size.dims(atom.a) | size.dims(atom.b)) & self._extents.keys())

    def _extreme(self, index: SizeLike, top: bool) -> SizeLike | None:
        """The largest or smallest value as a size of the kernel's dimensions, None when unknown. Dimensions are >= 0."""
        total: SizeLike = 0
        for monomial, coefficient in _terms(index):
            term: SizeLike = coefficient
            upward = top == (coefficient > 0)
            for atom in monomial:
                if not self._varies(atom):
                    term = term * Size((((atom,), 1),))
                elif isinstance(atom, Dim):
                    term = term * ((self._extents[atom] - 1) if upward else 0)
                else:
                    inner = self._extreme(atom.a, upward)
                    if atom.kind != "floordiv" or inner is None or any(self._varies(d) for d in size.dims(atom.b)):
                        return None
                    term = term * size.floordiv(inner, atom.b)
            total = total + term
        return total

    def below(self, index: SizeLike, bound: SizeLike) -> bool:
        """Whether index < bound is certain."""
        largest = self._extreme(index, True)
        return largest is not None and size.bounds(bound - largest)[0] >= 1

    def at_least(self, index: SizeLike, bound: SizeLike) -> bool:
        """Whether index >= bound is certain."""
        smallest = self._extreme(index, False)
        return smallest is not None and size.bounds(smallest - bound)[0] >= 0

    def divide(self, index: SizeLike, divisor: SizeLike) -> tuple[SizeLike, SizeLike]:
        """Quotient and remainder of a non-negative index."""
        if divisor == 1:
            return index, 0
        if self.at_least(index, 0) and self.below(index, divisor):
            return 0, index
        quotient: SizeLike = 0
        rest: SizeLike = 0
        for monomial, coefficient in _terms(index):
            term: SizeLike = coefficient
            for atom in monomial:
                term = term * Size((((atom,), 1),))
            whole = size.floordiv(term, divisor)
            if whole * divisor == term:
                quotient = quotient + whole
            else:
                rest = rest + term
        if self.at_least(rest, 0) and self.below(rest, divisor):
            return quotient, rest
        if self.at_least(rest, 0):
            more = size.floordiv(rest, divisor)
            return quotient + more, rest - more * divisor
        whole = size.floordiv(index, divisor)
        return whole, index - whole * divisor

    def reshape(self, index: Index, source: Sequence[SizeLike], target: Sequence[SizeLike]) -> Index:
        """The index into `target` of the element that has `index` in `source`, a shape of as many elements."""
        found: list[SizeLike] = []
        for inside, outside in _groups(source, target):
            flat: SizeLike = 0
            for axis in inside:
                flat = flat * source[axis] + index[axis]
            group: list[SizeLike] = []
            for axis in reversed(outside[1:]):
                flat, rest = self.divide(flat, target[axis])
                group.append(rest)
            if outside:
                group.append(0 if target[outside[0]] == 1 else flat)
            found += reversed(group)
        return tuple(found)

    def scalar(self, index: SizeLike) -> Node:
        """The index as an i64 scalar of the kernel-level IR."""
        if isinstance(index, int):
            return ops.constant(value=index, dtype="i64")
        fixed: SizeLike = 0
        total: Node | None = None
        for monomial, coefficient in _terms(index):
            varying = [atom for atom in monomial if self._varies(atom)]
            factor: SizeLike = coefficient
            for atom in monomial:
                if not self._varies(atom):
                    factor = factor * Size((((atom,), 1),))
            if not varying:
                fixed = fixed + factor
                continue
            term = self._atom(varying[0])
            for atom in varying[1:]:
                term = ops.mul(term, self._atom(atom))
            if factor != 1:
                term = ops.mul(term, _size(factor))
            total = term if total is None else ops.add(total, term)
        if total is None:
            return _size(fixed)
        return total if fixed == 0 else ops.add(total, _size(fixed))

    def _atom(self, atom: Dim | Call) -> Node:
        if isinstance(atom, Dim):
            return self._nodes[atom]
        op = {"floordiv": ops.floordiv, "min": ops.minimum, "max": ops.maximum}[atom.kind]
        return op(self.scalar(atom.a), self.scalar(atom.b))


def _terms(index: SizeLike) -> Iterable[tuple[tuple[Dim | Call, ...], int]]:
    if isinstance(index, Size):
        return index.terms
    return (((), index),) if index else ()


def _size(value: SizeLike) -> Node:
    return ops.constant(value=value, dtype="i64") if isinstance(value, int) else ops.size_value(size=value)


def _groups(source: Sequence[SizeLike], target: Sequence[SizeLike]) -> Iterable[tuple[range, range]]:
    """Runs of axes of both shapes with equal products, as small as the sizes show."""
    ends = [size.product(target[:j]) for j in range(len(target) + 1)]
    first_a = first_b = 0
    for a in range(1, len(source) + 1):
        product = size.product(source[:a])
        b = next((j for j in range(first_b, len(ends)) if ends[j] == product), None)
        if b is not None:
            yield range(first_a, a), range(first_b, b)
            first_a, first_b = a, b
    if first_a < len(source) or first_b < len(target):
        yield range(first_a, len(source)), range(first_b, len(target))
