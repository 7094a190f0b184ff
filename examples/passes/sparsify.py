"""A pass of your own: magnitude pruning, the simplest sparsity.

    stemma compile CHECKPOINT -o small.stemma --pass "examples/passes/sparsify.py:Sparsify{alpha=0.5}"

Every weight below alpha times the root mean square of its matrix becomes zero. The graph stays as it is: the weights are rewritten
as expressions in the IR, which are evaluated one by one when the artifact is packed. `lossy` makes the compiler measure the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Function, Module, Node, ops, size
from stemma.passes import Label, Pass, PassContext


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set the weights of linears to zero where they are smaller than alpha times the root mean square."""

    alpha: float = 0.25
    name: ClassVar[str] = "sparsify"
    label: ClassVar[Label] = "lossy"

    def run(self, module: Module, context: PassContext) -> Module:
        return module.map(self.prune)

    def prune(self, function: Function) -> Function:
        weights = {n.inputs[1] for n in function.nodes if n.op.name == "linear" and n.inputs[1].op.name == "weight"}
        return function.substitute({w: self.pruned(w) for w in weights})

    def pruned(self, w: Node) -> Node:
        mean = ops.reduce_sum(w * w, axes=(0, 1), keepdims=True) / size.evaluate(w.tensor.elements, {})
        return ops.where(ops.lt(ops.abs(w), ops.sqrt(mean) * self.alpha), ops.constant(value=0.0, dtype=w.dtype), w)
