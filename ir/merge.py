"""Several models in one module: functions and weights of each get its name in front, so that nothing is in the way of the others.

merge_models({"model": (target, weights), "draft": (small, others)})
  ->  step, draft_step; weights "lm_head.weight", "draft.lm_head.weight"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stemma.ir.function import Function, Module
from stemma.ir.node import Node, stamp
from stemma.ir.weights import WeightStore

MAIN = "model"


def merge_models(parts: Mapping[str, tuple[Module, WeightStore]]) -> tuple[Module, WeightStore]:
    """One module and store; those called "model" keep their names and give the properties.

    Function `f` of another model NAME becomes `NAME_f`, its weight `w` becomes `NAME.w`.
    """
    main, weights = parts[MAIN]
    functions = list(main)
    for name, (module, others) in parts.items():
        if name != MAIN:
            weights.include(others, f"{name}.")
            functions += [_renamed(f, f"{name}_{f.name}", f"{name}.") for f in module]
    return Module(functions, main.properties), weights


def _renamed(function: Function, name: str, prefix: str) -> Function:
    """The function under another name, with `prefix` before the names of its weights, those in regions included."""

    def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
        attrs: dict[str, Any] = {k: _renamed(v, v.name, prefix) if isinstance(v, Function) else v for k, v in node.attrs.items()}
        if node.op.name == "weight":
            attrs["name"] = prefix + attrs["name"]
        elif all(v is node.attrs[k] for k, v in attrs.items()):
            return node.rebuild(*inputs)
        with stamp(line=node.origin.line, by=node.origin.by):
            return node.op(*inputs, **attrs)

    changed = function.rewrite(replace)
    return Function(name, changed.params, zip(changed.result_names, changed.results, strict=True))
