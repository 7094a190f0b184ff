"""Shared by the tests."""

from __future__ import annotations

from collections.abc import Mapping

from stemma.ir import Function, Module, Node, parse_module, print_module, verify
from stemma.passes.selftest import example

__all__ = ["example", "function", "module", "roundtrip"]


def roundtrip(module: Module) -> Module:
    """The module itself, after checking that it verifies and that its text reads back to the very same object."""
    verify(module)
    assert parse_module(print_module(module)) is module
    return module


def function(name: str = "forward", **results: Node) -> Function:
    """A function of the given results; its parameters are those the results use, in order of appearance."""
    nodes = Function("", (), results).nodes
    return Function(name, [n for n in nodes if n.op.name == "param"], results)


def module(results: Mapping[str, Node] | None = None, **named: Node) -> Module:
    """A module of one function `forward`; it has passed `roundtrip`."""
    return roundtrip(Module([function("forward", **{**(results or {}), **named})]))
