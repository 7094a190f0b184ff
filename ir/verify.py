"""The verifier: reruns every type rule and checks what is legal at a level."""

from __future__ import annotations

from stemma.ir.errors import TypeMismatch, VerifyError
from stemma.ir.function import Function, Module
from stemma.ir.node import Node
from stemma.ir.text import print_module
from stemma.ir.types import tensors_of

LEVELS = {
    "program": frozenset({"program", "tensor"}),
    "tensor": frozenset({"tensor"}),
    "kernel": frozenset({"tensor", "kernel"}),
}


def verify(module: Module, level: str = "tensor") -> None:
    """Raise VerifyError unless every node obeys its type rule, is legal at `level`, and every parameter is declared.

    Functions that the property `programs` names are decoding programs, at the level "program" whatever the others' level.
    """
    programs = module.properties.get("programs", ())
    names = [f.name for f in module]
    if len(set(names)) != len(names):
        raise VerifyError(f"The module has two functions of one name: {', '.join(names)}.")
    for function in module:
        _verify_function(function, module, LEVELS["program" if function.name in programs else level])


def _verify_function(function: Function, module: Module, legal: frozenset[str]) -> None:
    declared = set(function.params)
    for node in function.nodes:
        if node.op.name == "param" and node not in declared:
            raise VerifyError(_report(module, node, f"the parameter {node.attrs['name']!r} is not declared"))
        if node.op.level not in legal:
            raise VerifyError(_report(module, node, f"{node.op.name} is not legal at this level"))
        try:
            inferred = node.op.infer(*(i.type for i in node.inputs), **node.attrs)
        except TypeMismatch as error:
            raise VerifyError(_report(module, node, str(error))) from None
        if inferred != node.type:
            raise VerifyError(_report(module, node, f"its type is {node.type!r}, the rule says {inferred!r}"))
        for value in node.attrs.values():
            if isinstance(value, Function):
                _verify_function(value, module, legal)


def _report(module: Module, node: Node, problem: str) -> str:
    """The problem, the user's line, and the five printed lines on either side of the node."""
    marker = f"= {node.op.name}("
    lines = print_module(module).splitlines()
    index = next((i for i, line in enumerate(lines) if marker in line and repr(node.type) in line), 0)
    around = "\n".join(f"  {line}" for line in lines[max(0, index - 5) : index + 6])
    origin = f" (from {node.origin.line})" if node.origin.line else ""
    return f"{node.op.name}: {problem}{origin}.\n{around}"


def constant_nodes(function: Function) -> set[Node]:
    """Nodes of `function` that depend on no parameter and no size: constant expressions."""
    constant: set[Node] = set()
    for node in function.nodes:
        if node.op.name in ("param", "size_value", "iota"):
            continue
        if all(i in constant for i in node.inputs) and all(isinstance(s, int) for s in _sizes(node)):
            constant.add(node)
    return constant


def _sizes(node: Node) -> list[object]:
    return [s for t in tensors_of(node.type) for s in t.shape]
