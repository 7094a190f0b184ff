"""Symbolic sizes: named, ranged integers and their arithmetic, all in this file.

A size is a Python `int` or an interned `Size`: a polynomial over atoms, where an atom is a named dimension (`dim`) or a floor
division, minimum or maximum of sizes. Equal sizes are the same object, so `is` and `==` agree; a constant result is an `int`.
"""

from __future__ import annotations

import ast
import weakref
from collections.abc import Iterable, Mapping

from stemma.ir.errors import StemmaError, TypeMismatch

UNBOUNDED = 2**31 - 1


class Dim:
    """A named dimension with an inclusive range of values."""

    __slots__ = ("name", "lo", "hi", "__weakref__")
    _table: weakref.WeakValueDictionary[tuple[str, int, int], Dim] = weakref.WeakValueDictionary()
    name: str
    lo: int
    hi: int

    def __new__(cls, name: str, lo: int, hi: int) -> Dim:
        self = cls._table.get((name, lo, hi))
        if self is None:
            if not name.isidentifier():
                raise StemmaError(f"The dimension name {name!r} is not a Python identifier. Choose another name.")
            if not 0 <= lo <= hi:
                raise StemmaError(f"The dimension {name!r} has the empty range {lo}..{hi}.")
            self = super().__new__(cls)
            self.name, self.lo, self.hi = name, lo, hi
            cls._table[name, lo, hi] = self
        return self

    def __repr__(self) -> str:
        return self.name


class Call:
    """An integer function of two sizes that is not a polynomial: `floordiv`, `min` or `max`."""

    __slots__ = ("kind", "a", "b", "__weakref__")
    _table: weakref.WeakValueDictionary[tuple[str, SizeLike, SizeLike], Call] = weakref.WeakValueDictionary()
    kind: str
    a: SizeLike
    b: SizeLike

    def __new__(cls, kind: str, a: SizeLike, b: SizeLike) -> Call:
        self = cls._table.get((kind, a, b))
        if self is None:
            self = super().__new__(cls)
            self.kind, self.a, self.b = kind, a, b
            cls._table[kind, a, b] = self
        return self

    def __repr__(self) -> str:
        if self.kind == "floordiv":
            return f"{_wrap(self.a)}//{_wrap(self.b)}"
        return f"{self.kind}({self.a}, {self.b})"


Atom = Dim | Call
Monomial = tuple[Atom, ...]


class Size:
    """A polynomial with integer coefficients over atoms; never a constant (those are `int`)."""

    __slots__ = ("terms", "__weakref__")
    _table: weakref.WeakValueDictionary[tuple[tuple[Monomial, int], ...], Size] = weakref.WeakValueDictionary()
    terms: tuple[tuple[Monomial, int], ...]

    def __new__(cls, terms: tuple[tuple[Monomial, int], ...]) -> Size:
        self = cls._table.get(terms)
        if self is None:
            self = super().__new__(cls)
            self.terms = terms
            cls._table[terms] = self
        return self

    def __add__(self, other: SizeLike) -> SizeLike:
        return _sum((self, other))

    def __sub__(self, other: SizeLike) -> SizeLike:
        return _sum((self, other * -1))

    def __rsub__(self, other: int) -> SizeLike:
        return _sum((other, self * -1))

    def __neg__(self) -> SizeLike:
        return self * -1

    def __mul__(self, other: SizeLike) -> SizeLike:
        return _product(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: SizeLike) -> SizeLike:
        return floordiv(self, other)

    def __rfloordiv__(self, other: int) -> SizeLike:
        return floordiv(other, self)

    def __mod__(self, other: SizeLike) -> SizeLike:
        return self - floordiv(self, other) * other

    def __repr__(self) -> str:
        text = ""
        for monomial, coefficient in self.terms:
            factors = "*".join(str(a) if isinstance(a, Dim) or a.kind != "floordiv" else f"({a})" for a in monomial)
            magnitude = abs(coefficient)
            term = str(magnitude) if not factors else factors if magnitude == 1 else f"{magnitude}*{factors}"
            sign = "-" if coefficient < 0 else "+"
            text = f"{text} {sign} {term}" if text else (f"-{term}" if sign == "-" else term)
        return text


SizeLike = int | Size


def dim(name: str, lo: int = 1, hi: int = UNBOUNDED) -> Size:
    """A named size between `lo` and `hi`, both included."""
    return Size((((Dim(name, lo, hi),), 1),))


def _wrap(size: SizeLike) -> str:
    simple = isinstance(size, int) or (len(size.terms) == 1 and size.terms[0][1] == 1 and len(size.terms[0][0]) == 1)
    return str(size) if simple else f"({size})"


def _terms(size: SizeLike) -> Iterable[tuple[Monomial, int]]:
    if isinstance(size, Size):
        return size.terms
    return (((), int(size)),) if size else ()


def _canonical(terms: dict[Monomial, int]) -> SizeLike:
    kept = sorted(((m, c) for m, c in terms.items() if c), key=lambda term: (-len(term[0]), str(term[0])))
    if not kept:
        return 0
    if len(kept) == 1 and kept[0][0] == ():
        return kept[0][1]
    return Size(tuple(kept))


def _sum(sizes: Iterable[SizeLike]) -> SizeLike:
    terms: dict[Monomial, int] = {}
    for size in sizes:
        for monomial, coefficient in _terms(size):
            terms[monomial] = terms.get(monomial, 0) + coefficient
    return _canonical(terms)


def _product(a: SizeLike, b: SizeLike) -> SizeLike:
    terms: dict[Monomial, int] = {}
    for ma, ca in _terms(a):
        for mb, cb in _terms(b):
            monomial = tuple(sorted(ma + mb, key=str))
            terms[monomial] = terms.get(monomial, 0) + ca * cb
    return _canonical(terms)


def product(sizes: Iterable[SizeLike]) -> SizeLike:
    """The product of sizes; 1 for none."""
    result: SizeLike = 1
    for size in sizes:
        result = result * size
    return result


def floordiv(a: SizeLike, b: SizeLike) -> SizeLike:
    """`a // b`; exact divisions of polynomials by a monomial are carried out."""
    if b == 0:
        raise TypeMismatch(f"The size {a} is divided by zero.")
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    if b == 1:
        return a
    if a is b:
        return 1
    (divisor, by), *rest = _terms(b)
    if not rest:
        quotient: dict[Monomial, int] = {}
        for monomial, coefficient in _terms(a):
            left = list(monomial)
            for atom in divisor:
                if atom not in left:
                    return Size((((Call("floordiv", a, b),), 1),))
                left.remove(atom)
            if coefficient % by:
                return Size((((Call("floordiv", a, b),), 1),))
            quotient[tuple(left)] = coefficient // by
        return _canonical(quotient)
    return Size((((Call("floordiv", a, b),), 1),))


def minimum(a: SizeLike, b: SizeLike) -> SizeLike:
    """The smaller of two sizes, decided now where the ranges allow it."""
    if bounds(a - b)[1] <= 0:
        return a
    if bounds(a - b)[0] >= 0:
        return b
    return Size((((Call("min", a, b),), 1),))


def maximum(a: SizeLike, b: SizeLike) -> SizeLike:
    """The larger of two sizes, decided now where the ranges allow it."""
    if bounds(a - b)[0] >= 0:
        return a
    if bounds(a - b)[1] <= 0:
        return b
    return Size((((Call("max", a, b),), 1),))


def bounds(size: SizeLike) -> tuple[int, int]:
    """An inclusive range that holds every value of `size` (interval arithmetic: valid, not always tight)."""
    if isinstance(size, int):
        return size, size
    lo = hi = 0
    for monomial, coefficient in size.terms:
        low, high = coefficient, coefficient
        for atom in monomial:
            a, b = _atom_bounds(atom)
            corners = (low * a, low * b, high * a, high * b)
            low, high = min(corners), max(corners)
        lo, hi = lo + low, hi + high
    return lo, hi


def _atom_bounds(atom: Atom) -> tuple[int, int]:
    if isinstance(atom, Dim):
        return atom.lo, atom.hi
    (a, b), (c, d) = bounds(atom.a), bounds(atom.b)
    if atom.kind == "min":
        return min(a, c), min(b, d)
    if atom.kind == "max":
        return max(a, c), max(b, d)
    if c <= 0:
        return -UNBOUNDED, UNBOUNDED
    corners = (a // c, a // d, b // c, b // d)
    return min(corners), max(corners)


def evaluate(size: SizeLike, values: Mapping[str, int]) -> int:
    """The value of `size` for the given values of its dimensions; StemmaError when one is missing."""
    if isinstance(size, int):
        return size
    total = 0
    for monomial, coefficient in size.terms:
        for atom in monomial:
            coefficient *= _atom_value(atom, values)
        total += coefficient
    return total


def _atom_value(atom: Atom, values: Mapping[str, int]) -> int:
    if isinstance(atom, Dim):
        if atom.name not in values:
            raise StemmaError(f"The size of the dimension {atom.name!r} is not known here.")
        return values[atom.name]
    a, b = evaluate(atom.a, values), evaluate(atom.b, values)
    return a // b if atom.kind == "floordiv" else min(a, b) if atom.kind == "min" else max(a, b)


def substitute(size: SizeLike, values: Mapping[str, SizeLike]) -> SizeLike:
    """`size` with dimensions replaced by other sizes, by name."""
    if isinstance(size, int):
        return size
    total: SizeLike = 0
    for monomial, coefficient in size.terms:
        term: SizeLike = coefficient
        for atom in monomial:
            if isinstance(atom, Dim):
                term = term * values.get(atom.name, Size((((atom,), 1),)))
            else:
                a, b = substitute(atom.a, values), substitute(atom.b, values)
                term = term * {"floordiv": floordiv, "min": minimum, "max": maximum}[atom.kind](a, b)
        total = total + term
    return total


def dims(size: SizeLike) -> set[Dim]:
    """The dimensions that `size` mentions."""
    found: set[Dim] = set()
    if isinstance(size, Size):
        for monomial, _ in size.terms:
            for atom in monomial:
                found |= {atom} if isinstance(atom, Dim) else dims(atom.a) | dims(atom.b)
    return found


def parse(text: str, names: Mapping[str, SizeLike]) -> SizeLike:
    """Read a size in Python syntax over the given names; the inverse of `str`."""
    return from_ast(ast.parse(text, mode="eval").body, names)


def from_ast(node: ast.expr, names: Mapping[str, SizeLike]) -> SizeLike:
    """A size from a Python syntax tree; TypeMismatch for anything that is not size arithmetic."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return from_ast(operand, names) * -1
        case ast.BinOp(left=left, op=op, right=right):
            a, b = from_ast(left, names), from_ast(right, names)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return floordiv(a, b)
        case ast.Call(func=ast.Name(id="min" | "max" as kind), args=[left, right]):
            choose = minimum if kind == "min" else maximum
            return choose(from_ast(left, names), from_ast(right, names))
    raise TypeMismatch(f"{ast.unparse(node)!r} is not a size: use integers, known names and + - * // min max.")
