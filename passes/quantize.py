"""Weight quantization, round to nearest, and rounding of activations: the lossy passes every model can take.

linear(x, w)  ->  linear(x, quantize(w, "int4_g64"))         Quantize
linear(x, w)  ->  linear(quantize(x, "q8_g64"), w)           RoundActivations
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Function, Module, Node, PassError, constant_nodes, dtype, ops
from stemma.passes.base import Label, Pass, PassContext


@dataclass(frozen=True)
class Quantize(Pass):
    """Store weights of linears and embeddings in fewer bits: bits=8 per output channel, bits=4 by groups along the input.

    Symmetric, round to nearest (see `stemma.ir.quantize_array`). A tied embedding stays tied. `embeddings=False` leaves embeddings
    and what is tied to them alone.
    """

    bits: int = 4
    group: int = 64
    embeddings: bool = True
    name: ClassVar[str] = "quantize"
    label: ClassVar[Label] = "lossy"

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with quantized weights; PassError when a weight's rows are no multiple of the group."""
        if self.bits not in (4, 8):
            raise PassError(f"quantize: bits={self.bits} is not available; use 8 or 4.")
        return module.map(self._function)

    def _function(self, function: Function) -> Function:
        constant = constant_nodes(function)
        embedded = {n.inputs[0] for n in function.nodes if n.op.name == "embedding"}

        def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
            index = {"linear": 1, "embedding": 0}.get(node.op.name)
            if index is None or node.inputs[index] not in constant or dtype(node.inputs[index].dtype).kind != "float":
                return node.rebuild(*inputs)
            if node.inputs[index] in embedded and not self.embeddings:
                return node.rebuild(*inputs)
            weight = self._weight(inputs[index], node)
            return node.rebuild(*inputs[:index], weight, *inputs[index + 1 :])

        return function.rewrite(replace)

    def _weight(self, weight: Node, user: Node) -> Node:
        columns = weight.shape[1]
        if self.bits == 4 and isinstance(columns, int) and columns % self.group:
            where = f" (at {user.origin.line})" if user.origin.line else ""
            raise PassError(
                f"quantize: a weight {weight.type!r}{where} has rows of {columns}, no multiple of group={self.group}. "
                "Choose a group that divides every row, or bits=8."
            )
        wide = weight if weight.dtype == "f32" else ops.cast(weight, dtype="f32")
        return ops.quantize(wide, dtype="int8" if self.bits == 8 else f"int4_g{self.group}")


@dataclass(frozen=True)
class RoundActivations(Pass):
    """Round the inputs of linears while running, so that narrow products can be used: bf16, or int8 by groups of 64.

    bf16 is used with float weights, int8 (`q8_gN` with the group of the weight, 64 for weights scaled by channel) with quantized
    weights; a linear whose weight does not fit keeps f32 inputs.
    """

    dtype: str = "int8"
    name: ClassVar[str] = "round_activations"
    label: ClassVar[Label] = "lossy"

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with rounded inputs of linears."""
        if self.dtype not in ("int8", "bf16"):
            raise PassError(f"round_activations: dtype={self.dtype!r} is not available; use int8 or bf16.")
        return module.map(lambda f: f.rewrite(self._replace))

    def _replace(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.op.name != "linear" or inputs[0].dtype != "f32":
            return node.rebuild(*inputs)
        weight = dtype(inputs[1].dtype)
        if self.dtype == "bf16" and weight.name == "bf16":
            return ops.linear(ops.cast(inputs[0], dtype="bf16"), *inputs[1:])
        columns = inputs[0].shape[-1]
        group = weight.group or 64
        if self.dtype == "int8" and weight.kind == "quantized" and isinstance(columns, int) and columns % group == 0:
            return ops.linear(ops.quantize(inputs[0], dtype=f"q8_g{group}"), *inputs[1:])
        return node.rebuild(*inputs)
