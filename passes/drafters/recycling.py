"""Token Recycling: the likeliest next tokens of every token that the model ever computed, put together to a fixed tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import State as StateType
from stemma.ir import Type
from stemma.ir.trace import Sequences, Tree, Value
from stemma.ir.trace_scope import build
from stemma.passes.drafters.base import DraftContext, Drafter, State
from stemma.passes.drafters.shapes import in_order, published

TABLE = "recycling_table"


@dataclass(frozen=True)
class Recycling(Drafter):
    """Token Recycling (Luo et al. 2024, arXiv:2408.08696).

    A table has the k likeliest tokens after each token, as they were computed last, and (which is not in the paper) how likely they
    were then. It outlives requests. Nodes of the published tree beyond the budget are left out.
    """

    k: int = 8
    name: ClassVar[str] = "recycling"

    def persistent(self, context: DraftContext) -> Mapping[str, Type]:
        return {TABLE: StateType("recycling", (context.vocab, min(self.k, context.vocab)))}

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        parents, ranks = in_order(published(context.size - 1, min(self.k, context.vocab)))
        table, source = state[TABLE].node, context.source
        tree.node = build("recycling_draft", table, tree.node, parents=parents, ranks=ranks, source=source)

    def observe(self, context: DraftContext, text: Sequences, tree: Tree, logits: Value, hidden: Value, state: State) -> None:
        state[TABLE].node = build("recycling_learn", state[TABLE].node, text.node)
