"""Properties of modules, which passes require and ensure by name. Each is a function: None when it holds, else the reason."""

from __future__ import annotations

from collections.abc import Callable

from stemma.ir import Module, dtype, walk

Property = Callable[[Module], "str | None"]
PROPERTIES: dict[str, Property] = {}


def module_property(function: Property) -> Property:
    """Register a property under the function's name."""
    PROPERTIES[function.__name__] = function
    return function


@module_property
def causal(module: Module) -> str | None:
    """Every attention is causal by its attributes and has no mask operand."""
    attention = [n for f in module for n in walk(f) if n.op.name == "attention"]
    for node in attention:
        problem = "has a mask operand" if len(node.inputs) == 4 else "" if node.attrs["causal"] else "sees later positions"
        if problem:
            return f"an attention {problem}" + (f" (from {node.origin.line})" if node.origin.line else "")
    return None if attention else "there is no attention in the module"


@module_property
def float_weights(module: Module) -> str | None:
    """No weight and no expression is quantized."""
    for function in module:
        for node in walk(function):
            if not isinstance(getattr(node.type, "dtype", None), str):
                continue
            if dtype(node.dtype).kind == "quantized":
                return f"{node!r} is quantized"
    return None


@module_property
def has_step(module: Module) -> str | None:
    """There is a decode function called `step`."""
    return None if any(f.name == "step" for f in module) else "the module has no function `step`"


@module_property
def has_programs(module: Module) -> str | None:
    """There are decoding programs."""
    return None if module.properties.get("programs") else "the module has no decoding program"


@module_property
def speculated(module: Module) -> str | None:
    """At least one decoding program drafts and verifies trees of tokens."""
    return None if module.properties.get("speculation") else "no decoding program is speculated"
