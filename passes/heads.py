"""Draft heads: small functions over the hidden state that guess the tokens after the next one.

    medusa(hidden f32[drafts, width]) -> logits f32[drafts, heads, vocab]                     all heads at once
    hydra_I(hidden f32[drafts, width], path i32[drafts, I + 1]) -> logits f32[drafts, vocab]    one function for each head

Head I guesses the token I + 2 places after the last one that the hidden state has seen; `path` has the I + 1 tokens between, the
first of which the model chose. Logits go through the model's own output head. Formulas and tensors:

    medusa  (Cai et al. 2024)     head(h + silu(W h + b))                   medusa.I.weight, .bias
    hydra   (Ankner et al. 2024)  x = [h, emb(path)];  y = h + silu(in x);  hydra.I.in.weight, .bias
                                  head(y + silu(block y))                   hydra.I.block.weight, .bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from stemma.ir import Function, Module, Node, PassError, Tensor, WeightStore, dim, ops
from stemma.passes.base import Pass, PassContext

Kind = Literal["medusa", "hydra"]
KINDS: tuple[Kind, ...] = ("medusa", "hydra")


@dataclass(frozen=True)
class Heads(Pass):
    """Add the functions of draft heads. `folder`: where their weights are; by default beside the checkpoint."""

    kind: Kind = "medusa"
    folder: str = ""
    name: ClassVar[str] = "heads"
    requires: ClassVar[frozenset[str]] = frozenset({"causal"})

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with the functions; PassError when weights are missing or do not fit the model."""
        forward = module["forward"]
        linears = [n for n in forward.nodes if n.op.name == "linear"]
        if not linears:
            raise PassError("heads: the model has no linear output head, which draft heads need.")
        output = _Output(linears[-1])
        if self.kind == "medusa":
            return module.replace(_medusa(output, context.weights))
        tables = [n.inputs[0] for n in forward.nodes if n.op.name == "embedding" and n.inputs[1] in _token_ids(forward)]
        if not tables:
            raise PassError("heads: the embedding of the model's tokens was not found, which the heads of hydra need.")
        count = _count("hydra.{}.in.weight", context.weights)
        return module.replace(*(_hydra(i, output, tables[0], context.weights) for i in range(count)))


def _token_ids(forward: Function) -> set[Node]:
    """The parameter and its casts."""
    found = set(forward.params)
    for node in forward.nodes:
        if node.op.name in ("cast", "reshape") and node.inputs[0] in found:
            found.add(node)
    return found


class _Output:
    """The output head of a model, for other values: f32[..., width] -> f32[..., vocab]."""

    def __init__(self, linear: Node) -> None:
        self.linear, self.width = linear, linear.inputs[0].shape[-1]

    def __call__(self, value: Node) -> Node:
        rounding = self.linear.inputs[0]
        if rounding.op.name in ("quantize", "cast") and rounding.dtype != "f32":
            value = rounding.op(value, **rounding.attrs)
        node: Node = ops.linear(value, *self.linear.inputs[1:])
        return node


def _count(pattern: str, weights: WeightStore) -> int:
    count = 0
    while pattern.format(count) in weights:
        count += 1
    if not count:
        raise PassError(f"heads: there is no weight {pattern.format(0)!r}. Name the folder of the heads: heads{{folder=...}}.")
    return count


def _layer(x: Node, name: str, width: object, weights: WeightStore) -> Node:
    """silu(x @ weight.T + bias) with the weights `name`."""
    parts = []
    for part, shape in (("weight", (width, x.shape[-1])), ("bias", (width,))):
        full = f"{name}.{part}"
        if full not in weights or weights.type(full).shape != shape:
            found = f"has the shape {weights.type(full).shape}" if full in weights else "is missing"
            raise PassError(f"heads: the weight {full!r} {found}; this model needs {shape}. Train heads for this very model.")
        node = ops.weight(name=full, type=weights.type(full))
        parts.append(node if part == "weight" or node.dtype == "f32" else ops.cast(node, dtype="f32"))
    value: Node = ops.silu(ops.linear(x, *parts))
    return value


def _medusa(output: _Output, weights: WeightStore) -> Function:
    drafts, width = dim("drafts", 1), output.width
    hidden = ops.param(name="hidden", type=Tensor("f32", (drafts, width)))
    count = _count("medusa.{}.weight", weights)
    states = [hidden + _layer(hidden, f"medusa.{i}", width, weights) for i in range(count)]
    stacked = [ops.reshape(s, shape=(drafts, 1, width)) for s in states]
    joined = ops.concat(*stacked, axis=1) if count > 1 else stacked[0]
    return Function("medusa", [hidden], {"logits": output(joined)})


def _hydra(number: int, output: _Output, table: Node, weights: WeightStore) -> Function:
    drafts, width = dim("drafts", 1), output.width
    hidden = ops.param(name="hidden", type=Tensor("f32", (drafts, width)))
    path = ops.param(name="path", type=Tensor("i32", (drafts, number + 1)))
    seen = ops.reshape(ops.embedding(table, path), shape=(drafts, (number + 1) * int(str(width))))
    y = hidden + _layer(ops.concat(hidden, seen, axis=1), f"hydra.{number}.in", width, weights)
    return Function(f"hydra_{number}", [hidden, path], {"logits": output(y + _layer(y, f"hydra.{number}.block", width, weights))})
