"""Scopes of the tracer: the regions of a program that are being traced, their states, and errors at the user's line.

Regions (bodies of loops, branches) are traced in a `Scope` of their own; what belongs to an enclosing scope and is used inside is
carried in as a parameter of the region.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from stemma.ir.errors import TraceError, TypeMismatch
from stemma.ir.node import OPS, Node, stamp
from stemma.ir.types import Type

if TYPE_CHECKING:
    from stemma.ir.trace_values import Value

_OWN = tuple(os.path.join("ir", f"trace{part}.py") for part in ("", "_constraint", "_scope", "_states", "_values"))
"""Files whose lines are never the user's."""


def user_line() -> str:
    """The innermost line outside the tracer: "file.py:12 in function"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_OWN):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def fail(message: str) -> NoReturn:
    """Raise a TraceError at the user's line."""
    raise TraceError(f"{user_line()}: {message}")


def build(name: str, /, *inputs: Any, **attrs: Any) -> Node:
    """The node of an operation, stamped with the user's line; a type error becomes a TraceError that names it."""
    with stamp(line=user_line()):
        try:
            node: Node = OPS[name](*inputs, **attrs)
            return node
        except TypeMismatch as error:
            raise TraceError(str(error)) from None


class Cell:
    """A name for a state that operations change in place, as the program sees it; underneath, each change is a new node."""

    hint = "state"

    def __init__(self, node: Node) -> None:
        self.home = scope()
        self.home.cells[self] = node

    @property
    def node(self) -> Node:
        """Its present value in the region that is being traced."""
        return scope().read(self)

    @node.setter
    def node(self, node: Node) -> None:
        here = scope()
        here.read(self)
        here.cells[self] = node
        here.changed[self] = None


class Scope:
    """A function or region that is being traced: the present nodes of its cells, and what it took from the enclosing scope."""

    def __init__(self, parent: Scope | None, what: str) -> None:
        self.parent, self.what = parent, what
        self.cells: dict[Cell, Node] = {}
        self.changed: dict[Cell, None] = {}
        self.taken: dict[Cell | tuple[Scope, Node], Node] = {}  # what came from outside -> parameter here
        self.names: set[str] = {"again"}

    def name(self, hint: str) -> str:
        """A name that no other parameter of the region has."""
        found, count = hint, 1
        while found in self.names:
            count += 1
            found = f"{hint}_{count}"
        self.names.add(found)
        return found

    def param(self, hint: str, type: Type) -> Node:
        """A new parameter."""
        return build("param", name=self.name(hint), type=type)

    def read(self, cell: Cell) -> Node:
        """The node of a cell in this scope, taken from the enclosing one when it is first read."""
        if cell not in self.cells:
            if self.parent is None or cell.home is self:
                fail(f"{cell.hint} made inside a loop or a branch is used outside of it. Make it before, or return it.")
            self.cells[cell] = self.taken[cell] = self.param(cell.hint, self.parent.read(cell).type)
        return self.cells[cell]

    def value(self, value: Value) -> Node:
        """The node of a value in this scope."""
        if value.home is self or "leaf" in value.made.op.tags and value.made.op.name != "param":
            return value.made
        key = (value.home, value.made)
        if key not in self.taken:
            if self.parent is None:
                fail("a value made inside a loop or a branch is used outside of it. Return it from the body.")
            outer = self.parent.value(value)
            self.taken[key] = self.param(value.hint, outer.type)
        return self.taken[key]

    def outer(self, thing: Cell | tuple[Scope, Node]) -> Node:
        """The node, in the enclosing scope, of something that was taken from there."""
        assert self.parent is not None
        if isinstance(thing, Cell):
            return self.parent.read(thing)
        home, node = thing
        return node if home is self.parent else self.parent.taken[thing]


_scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("scope", default=None)


def scope() -> Scope:
    """The region that is being traced; TraceError outside of a program."""
    found = _scope.get()
    if found is None:
        fail("this works only inside a program that is being traced. Decorate the function with @program and trace it.")
    return found


@contextlib.contextmanager
def tracing(inner: Scope) -> Iterator[Scope]:
    """Operations inside belong to that scope."""
    token = _scope.set(inner)
    try:
        yield inner
    finally:
        _scope.reset(token)
