"""A model that stops early: the first layers of another one, then its final norm and output head.

    h_0 -> layer 1 -> h_1 -> ... -> h_n -> norm, head          becomes, beside it,          h_0 -> ... -> h_layers -> norm, head

Both share weights, which are packed once. It drafts for the whole model (Zhang et al. 2023, Draft & Verify; Elhoushi et al. 2024,
LayerSkip: models trained to exit early are guessed better).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Function, Module, Node, PassError
from stemma.passes.base import Pass, PassContext


@dataclass(frozen=True)
class EarlyExit(Pass):
    """Add a model that is cut after some layers. `model` is the name that programs know it by."""

    layers: int = 1
    model: str = "early"
    name: ClassVar[str] = "early_exit"
    requires: ClassVar[frozenset[str]] = frozenset({"causal"})

    def makes(self) -> str:
        return self.model

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with the function MODEL_forward; PassError when there are not that many layers, or no residual stream."""
        name = f"{self.model}_forward"
        if any(f.name == name for f in module):
            raise PassError(f"early_exit: there is a model {self.model!r} already.")
        return module.replace(early_exit(module["forward"], self.layers, name))


def early_exit(forward: Function, layers: int, name: str) -> Function:
    """`forward` cut after `layers` layers: the residual stream there goes into what comes after the last layer."""
    streams, attention = residual_stream(forward), [n for n in forward.nodes if n.op.name == "attention"]
    if not 1 <= layers < len(attention):
        raise PassError(f"early_exit: layers={layers} is not between 1 and {len(attention) - 1}; the model has {len(attention)}.")
    before = set(Function("", (), {"value": attention[layers]}).nodes)
    here = [n for n in streams if n in before]
    if not here or here[-1] is streams[-1]:
        raise PassError(f"early_exit: no residual stream between layers {layers} and {layers + 1} was found.")
    cut = forward.substitute({streams[-1]: here[-1]})
    return Function(name, cut.params, zip(cut.result_names, cut.results, strict=True))


def residual_stream(forward: Function) -> list[Node]:
    """The sums that everything after them reads the tokens through, in order: the residual stream after each half of a layer.

    A value is one when every path from the token ids to the first result goes through it: no edge passes over its place in a
    topological order.
    """
    nodes = Function("", (), {"value": forward.results[0]}).nodes
    tokens: set[Node] = set()
    for node in nodes:
        if node.op.name == "param" or any(i in tokens for i in node.inputs):
            tokens.add(node)
    order = [n for n in nodes if n in tokens]
    last = dict.fromkeys(order, 0)
    for place, node in enumerate(order):
        for i in node.inputs:
            if i in last:
                last[i] = place
    found, open_until = [], 0
    for place, node in enumerate(order):
        if open_until <= place and node.op.name == "add" and all(i in tokens for i in node.inputs):
            found.append(node)
        open_until = max(open_until, last[node])
    return found
