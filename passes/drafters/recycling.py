"""Token Recycling: the likeliest next tokens of every token that the model ever computed, put together to a fixed tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Tensor, Type
from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.passes.drafters.base import DraftContext, Drafter, State
from stemma.passes.drafters.shapes import published

TABLE = "recycling_table"


@dataclass(frozen=True)
class Recycling(Drafter):
    """Token Recycling (Luo et al. 2024, arXiv:2408.08696).

    A table i32[vocab + 1, k] has the k likeliest tokens after each token, as they were computed last, plus one (0: never seen; the
    last row is for nodes that do not exist). It outlives requests. Nodes of the published tree beyond the budget are left out.
    """

    k: int = 8
    name: ClassVar[str] = "recycling"

    def persistent(self, context: DraftContext) -> Mapping[str, Type]:
        return {TABLE: Tensor("i32", (context.vocab + 1, self.k))}

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        table = state[TABLE].value.reshape((context.vocab + 1) * self.k)
        nodes, tokens = p.array([0]), token
        for level in published(context.size - 1, self.k):
            places, ranks = p.array([place for place, _ in level]), p.array([rank for _, rank in level])
            rows = p.where(tokens < 0, context.vocab, tokens)[places]
            tokens = table[rows * self.k + ranks] - 1
            nodes = context.extend(tree, nodes[places], tokens, p.full(len(level), 1.0))

    def observe(self, context: DraftContext, text: Sequences, tree: Tree, logits: Value, hidden: Value, state: State) -> None:
        """Every node that ran gives a row; of equal tokens the last node counts."""
        _, likeliest = text.node_top_k(self.k, context.size)
        tokens = tree.nodes()[1][: context.size]
        rows = p.where(tokens < 0, context.vocab, tokens)
        state[TABLE].value = state[TABLE].value.put(rows, likeliest + 1)
