"""Shared by the tests."""

from __future__ import annotations

from collections.abc import Mapping

from stemma.codegen.program import Listed, attach, models_of
from stemma.frontend import programs
from stemma.ir import Function, Module, Node, parse_module, print_module, verify
from stemma.ir.trace import ModelSpec, trace
from stemma.passes.selftest import example

__all__ = ["decoding", "example", "function", "module", "roundtrip"]


def decoding(module: Module) -> Module:
    """A language model's module with the library's plain decoding."""
    (model,) = models_of(module)
    made = trace(programs.generate, {"model": ModelSpec(model.vocab, model.width, model.eos, model.context)})
    return attach(module, [Listed(made.function, made.defaults)])


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
