"""A second look at a drafted chain: the best chain of a tree, forgetting nodes that ran, and logits of two looks together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from stemma.ir.errors import StemmaError, TypeMismatch
from stemma.ir.ops.governor import governor_size, subset
from stemma.ir.ops.program import F32, ProgramOp, expect, sequences_type, tree_size
from stemma.ir.types import State, Tensor, Type


class BestChain(ProgramOp):
    """`best_chain(tree, [governor]) -> tree`: the root and the path under it of which most nodes can be expected to be accepted.

    A node is reached with the product of the chances along its path; a path's value is the sum over its nodes. Chances are the
    drafters' scores, or what the governor measured. Of equal paths the one that ends at the lowest node.
    """

    name = "best_chain"

    def infer(self, tree: State, governor: State | None = None) -> Type:
        tree_size(tree)
        if governor is not None:
            governor_size(governor)
        return tree

    def evaluate(self, ctx: Any, tree: Any, governor: Any = None) -> Any:
        reached, values = [1.0], [0.0]
        measured = None if governor is None else governor.scores(tree)
        for node in range(1, len(tree.tokens)):
            parent = tree.parents[node]
            reached.append(reached[parent] * tree.scores[node] if measured is None else measured[node])
            values.append(values[parent] + reached[node])
        return subset(tree, list(tree.path(int(np.argmax(values))))[1:])


class Retract(ProgramOp):
    """`retract(sequences of 1, tree) -> sequences`: forgets expanded nodes, as if the tree had been expanded without them.

    The tree must be the first nodes of the expanded one, of which none was followed yet.
    """

    name = "retract"

    def infer(self, sequences: State, tree: State) -> Type:
        sequences_type(sequences, 1)
        tree_size(tree)
        return sequences

    def evaluate(self, ctx: Any, sequences: Any, tree: Any) -> Any:
        count, ran = len(tree.tokens), sequences.tree
        if sequences.visited:
            raise StemmaError("retract: a path of the tree was already followed.")
        if ran is None or count > sequences.ran or (ran.tokens[:count], ran.parents[:count]) != (tree.tokens, tree.parents):
            raise StemmaError("retract: the tree is not the beginning of one that was expanded.")
        return replace(sequences, tree=tree, ran=count)


class MixLogits(ProgramOp):
    """`mix_logits(a f32[n, v], b f32[n, v], weight f32()) -> f32[n, v]`: logits of (1 - weight) softmax(a) + weight softmax(b).

    log((1 - weight) exp(a) + weight exp(b + c)), where c makes the row sums of exp(a) and exp(b + c) equal: the scale is that of a,
    so that penalties and filters go on meaning the same, and weight 0 gives a, to the bit. The weight is between 0 and 1.
    """

    name = "mix_logits"

    def infer(self, a: Tensor, b: Tensor, weight: Tensor) -> Type:
        if not isinstance(a, Tensor) or a.dtype != "f32" or a.rank != 2:
            raise TypeMismatch(f"mix_logits takes f32[n, v], not {a!r}")
        expect(b, a, "the other logits")
        expect(weight, F32, "the weight")
        return a

    def evaluate(self, ctx: Any, a: Any, b: Any, weight: Any) -> Any:
        w = float(weight)
        if not 0 <= w <= 1:
            raise StemmaError(f"mix_logits: the weight is {w:g}; it must be between 0 and 1.")
        if w == 0:
            return a
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(divide="ignore"):
            return np.logaddexp(x + np.log1p(-w), y + (_total(x) - _total(y)) + np.log(w)).astype(a.dtype)


def _total(x: Any) -> Any:
    """log sum exp of each row, [n, 1]."""
    most = x.max(1, keepdims=True)
    return most + np.log(np.exp(x - most).sum(1, keepdims=True))


best_chain, retract, mix_logits = BestChain(), Retract(), MixLogits()
