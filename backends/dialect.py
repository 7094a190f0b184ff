"""What differs between C-family languages, for the shared renderer of generated kernels (`codegen/render.py`)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stemma.ir import CompileError, SizeLike, dtype

CALL = re.compile(r"[\w<>{}]+\(\{\d\}(, \{\d\})*\)$")
"""Forms in which every operand is an argument of its own and needs no parentheses."""


def bare(text: str) -> str:
    """Without one pair of parentheses around the whole."""
    if not text.startswith("(") or not text.endswith(")"):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1]


@dataclass(frozen=True)
class Buffer:
    """A buffer of a kernel: its name in the source, element type, and whether the kernel writes it."""

    name: str
    dtype: str
    written: bool


@dataclass(frozen=True)
class Reduction:
    """A reduction to write: its kind (sum, max, min, argmax), element types of the terms and the result, the name of the result
    and of a second variable, loops as (variable, extent) from the outermost, and whether the innermost is known to be short."""

    kind: str
    term: str
    type: str
    result: str
    spare: str
    loops: tuple[tuple[str, str], ...]
    short: bool


@dataclass(frozen=True)
class Dialect(ABC):
    """One language. `memory` and `value` map element types to the type of a buffer's element and of a scalar variable.

    functions maps an operation to an expression with {0}, {1}, {2} for its operands and {T} for their type; an entry "op:f64" or
    "op:int" (a kind of element type) goes before "op". reserved: words that no buffer or size may be called. block: work items of
    one group (1: no groups). independent: what to write before an innermost loop without dependences between its iterations.
    size_prefix: what to write before the name of a size. max_buffers: buffers that a kernel may bind, 0 for any number.
    index_bits: width of the integers that stand for i64.
    """

    name: str
    memory: Mapping[str, str]
    value: Mapping[str, str]
    index: str
    functions: Mapping[str, str]
    reserved: frozenset[str]
    preamble: str
    block: int = 1
    independent: str = ""
    size_prefix: str = ""
    max_buffers: int = 0
    index_bits: int = 64

    def value_type(self, name: str) -> str:
        """Type of a scalar variable; CompileError when the language has no such type."""
        if name not in self.value:
            raise CompileError(f"{self.name} has no element type {name}; cast the values first.")
        return self.value[name]

    def memory_type(self, name: str) -> str:
        """Type of a buffer's element; CompileError when the language cannot store it."""
        if name not in self.memory:
            raise CompileError(f"{self.name} cannot store elements of type {name}; cast the values first.")
        return self.memory[name]

    def call(self, op: str, kind: str, *operands: str) -> str:
        """The expression of an operation on scalars of element type `kind`."""
        keys = (f"{op}:{kind}", f"{op}:{dtype(kind).kind}", op)
        form = next((self.functions[key] for key in keys if key in self.functions), None)
        if form is None:
            raise CompileError(f"{self.name} has no function {op}.")
        if CALL.match(form):
            operands = tuple(map(bare, operands))
        return form.format(*operands, T=self.value_type(kind))

    def serial_reduction(self, reduction: Reduction, variable: str) -> tuple[list[str], str, list[str]]:
        """`reduce` as plain nested loops in one work item; `variable` is the form {T} {name} {value} of a mutable definition."""
        kind, result, spare = reduction.kind, reduction.result, reduction.spare
        term, last = self.value_type(reduction.term), len(reduction.loops)
        if kind == "argmax":
            loop = reduction.loops[0][0]
            first = [("i64", result, self.literal(0, "i64")), (reduction.term, spare, self.extreme("max", reduction.term))]
            form = f"if ({{value}} > {spare}) {{ {spare} = {{bare}}; {result} = {loop}; }}"
        elif kind == "sum":
            first = [(reduction.term, result, f"{term}(0)")]
            form = f"{result} = {result} + {{value}};"
        else:
            first = [(reduction.term, result, self.extreme(kind, reduction.term))]
            combined = self.call("maximum" if kind == "max" else "minimum", reduction.term, result, "{bare}")
            form = f"{result} = {combined};"
        opening = [variable.format(T=self.value_type(t), name=n, value=v) for t, n, v in first]
        opening += ["  " * depth + self.loop(v, "0", extent) for depth, (v, extent) in enumerate(reduction.loops)]
        return opening, form, ["  " * depth + "}" for depth in reversed(range(last))]

    def extreme(self, kind: str, name: str) -> str:
        """What `max` or `min` starts from: nothing is below, or above, it."""
        element = dtype(name)
        sign = -1 if kind == "max" else 1
        if element.kind == "float":
            return self.literal(sign * float("inf"), name)
        bits = min(element.bits, self.index_bits)
        low, high = (0, 2**bits - 1) if name == "u8" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return self.literal(low if kind == "max" else high, name)

    # -- what each language says in its own way --------------------------------------------------------------------

    @abstractmethod
    def literal(self, value: float | int | bool, kind: str) -> str:
        """A constant of element type `kind`."""

    @abstractmethod
    def convert(self, text: str, source: str, target: str) -> str:
        """A scalar of one element type as another (rounded as the target demands)."""

    @abstractmethod
    def load(self, buffer: Buffer, offset: str) -> str:
        """The element at an offset, as a scalar."""

    @abstractmethod
    def store(self, buffer: Buffer, offset: str, value: str) -> str:
        """The statement that writes an element."""

    @abstractmethod
    def define(self, type: str, name: str, value: str) -> str:
        """The statement that introduces a constant."""

    @abstractmethod
    def loop(self, variable: str, begin: str, end: str) -> str:
        """The head of a counted loop, up to its opening brace."""

    @abstractmethod
    def reduce(self, reduction: Reduction) -> tuple[list[str], str, list[str]]:
        """Opening lines of a reduction, the statement for one term, and closing lines, each indented.

        In the statement {value} stands for the term, safe beside an operator, and {bare} for the same where nothing can bind to it.
        """

    @abstractmethod
    def kernel(
        self, name: str, buffers: Sequence[Buffer], dims: Sequence[str], nests: Sequence[tuple[Grid, list[str]]]
    ) -> list[str]:
        """The whole kernel around the bodies of its loop nests."""


@dataclass(frozen=True)
class Grid:
    """The parallel loops of a nest, outermost first, as (variable, extent text), and how the rest is shaped.

    inner: (variable, extent text) of an innermost loop that may be split over work items as well, None when it may not.
    work: rough operations of one parallel iteration, as text. threads: product of the parallel extents. note: a comment.
    """

    loops: tuple[tuple[str, str], ...]
    inner: tuple[str, str] | None
    work: str
    threads: SizeLike
    note: str
