"""What differs between C-family languages, for the shared renderer of generated kernels (`codegen/render.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stemma.ir import CompileError, Node, SizeLike, dtype


@dataclass(frozen=True)
class Buffer:
    """A buffer of a kernel: its name in the source, element type, and whether the kernel writes it."""

    name: str
    dtype: str
    written: bool


@dataclass(frozen=True)
class Dialect(ABC):
    """One language. `memory` and `value` map element types to the type of a buffer's element and of a scalar variable.

    functions maps an operation to an expression with {0}, {1}, {2} for its operands; an entry "op:f64" goes before "op".
    {T} in such an expression is the type of the operands. reserved: words that no buffer or size may be called. block: work items of
    one group (1: no groups). independent: what to write before an innermost loop without dependences between its iterations.
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
        form = self.functions.get(f"{op}:{kind}", self.functions.get(op))
        if form is None:
            raise CompileError(f"{self.name} has no function {op}.")
        return form.format(*operands, T=self.value_type(kind))

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
    def reduce(
        self, kind: str, node: Node, result: str, variables: Sequence[tuple[str, str]], small: bool
    ) -> tuple[list[str], str, list[str]]:
        """Lines that open a reduction over (variable, extent) loops into `result`, a form for the term, and closing lines.

        The form has {value} for the term of one iteration. `small`: the innermost extent is known to be small.
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


def bytes_of(name: str) -> int:
    """Bytes of one stored element."""
    return dtype(name).bits // 8
