"""Contextual sparsity: of a gated MLP only the neurons with the largest gate values are computed for a token.

    linear(gated(linear(x, G), linear(x, U)), D)
->  a = act(linear(x, G)), at = top_neurons(a), linear_from(take(a, at) * linear_at(x, U, at), transpose(D), at)

As a change of the model it is lossy (CATS, Lee et al. 2024). As a model of its own beside the whole one it drafts, and the whole
one corrects: Sirius (Zhou et al. 2024, arXiv:2409.03856), with `speculate{draft=sparse}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Function, Module, Node, PassError, constant_nodes, dtype, ops
from stemma.passes.base import Label, Pass, PassContext

UNIT = 16


@dataclass(frozen=True)
class ContextualSparsity(Pass):
    """Compute only a share of the neurons of every gated MLP, chosen for each token by the gate's values.

    keep: the share. model: "" changes the model itself, which is lossy; another name adds a model of that name beside it, for
    programs to step and for `speculate` to draft with.
    """

    keep: float = 0.3
    model: str = ""
    name: ClassVar[str] = "contextual_sparsity"
    label: ClassVar[Label] = "lossy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", "identical" if self.model else "lossy")

    def makes(self) -> str:
        return self.model

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with sparse MLPs, or with the function MODEL_forward beside it; PassError when there is no gated MLP."""
        if not 0 < self.keep <= 1:
            raise PassError(f"contextual_sparsity: keep={self.keep} is no share of the neurons; give more than 0, at most 1.")
        name = f"{self.model}_forward" if self.model else "forward"
        if self.model and any(f.name == name for f in module):
            raise PassError(f"contextual_sparsity: there is a model {self.model!r} already.")
        sparse = self.sparsify(module["forward"])
        return module.replace(Function(name, sparse.params, zip(sparse.result_names, sparse.results, strict=True)))

    def sparsify(self, function: Function) -> Function:
        """The function with every gated MLP replaced."""
        constant, users = constant_nodes(function), function.users()
        found = 0

        def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
            nonlocal found
            gated = node.inputs[0] if node.op.name == "linear" else node
            if gated is not node and gated.op.name == "quantize":
                gated = gated.inputs[0]
            if gated.op.name != "gated" or gated is node or node.inputs[1] not in constant or len(users[gated]) > 1:
                return node.rebuild(*inputs)
            gate, up = gated.inputs
            if up.op.name != "linear" or gate.op.name != "linear" or len(up.inputs) > 2 or up.inputs[0] is not gate.inputs[0]:
                return node.rebuild(*inputs)
            found += 1
            middle = inputs[0].inputs[0] if inputs[0].op.name == "quantize" else inputs[0]
            return self._sparse(middle.inputs[0], middle.inputs[1], str(gated.attrs["activation"]), inputs[1:])

        changed = function.rewrite(replace)
        if not found:
            raise PassError("contextual_sparsity: the model has no gated MLP: linear(gated(linear(x), linear(x))).")
        return changed

    def _sparse(self, gate: Node, up: Node, activation: str, down: tuple[Node, ...]) -> Node:
        neurons = int(up.shape[-1])  # type: ignore[arg-type]
        count = min(neurons, max(1, round(self.keep * neurons / UNIT)) * UNIT)
        active = (
            ops.silu(gate) if activation == "silu" else ops.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
        )
        at = ops.top_neurons(active, count=count)
        x = up.inputs[0].inputs[0] if up.inputs[0].op.name == "quantize" else up.inputs[0]
        chosen = ops.take_along(active, at, axis=active.tensor.rank - 1)
        result = ops.linear_from(ops.mul(chosen, ops.linear_at(x, up.inputs[1], at)), turned(down[0]), at)
        return ops.add(result, down[1]) if len(down) > 1 else result


def turned(weight: Node) -> Node:
    """The transposed weight in the same format, rounded along its new rows; PassError when there are only codes."""
    if weight.op.name == "quantize":
        return ops.quantize(ops.transpose(weight.inputs[0], axes=(1, 0)), dtype=weight.dtype)
    if dtype(weight.dtype).kind == "quantized":
        raise PassError(
            f"contextual_sparsity: a weight {weight.type!r} is stored in codes already, and its columns cannot be read apart. "
            "Start from float weights."
        )
    return ops.transpose(weight, axes=(1, 0))
