"""STAND: n-grams with the probabilities that the model gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import State as StateType
from stemma.ir import Type
from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.ir.trace_scope import build
from stemma.passes.drafters.base import DraftContext, Drafter, State

NGRAMS = "stand_ngrams"


@dataclass(frozen=True)
class Stand(Drafter):
    """STAND (Song et al. 2025, arXiv:2506.04708): for each run of 2 to `order` tokens the average of the model's distributions
    after it, of which the `k` likeliest tokens are kept.

    The tree has the likeliest paths; the counted noise of sampling is known and taken in, where the paper draws its own. The table
    outlives requests, so the samples of one prompt draft for each other.
    """

    order: int = 4
    k: int = 10
    name: ClassVar[str] = "stand"

    def persistent(self, context: DraftContext) -> Mapping[str, Type]:
        return {NGRAMS: StateType("ngrams", (self.order, self.k))}

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        coupled = context.settings if context.verify == "identical" else {}
        temperature = coupled.get("temperature", p.as_value(0.0)).node
        seed, sequence = (coupled.get(name, p.as_value(0, "i64")).node for name in ("seed", "sequence"))
        inputs = (state[NGRAMS].node, text.node, tree.node, temperature, seed, sequence)
        tree.node = build("ngrams_draft", *inputs, source=context.source)

    def observe(self, context: DraftContext, text: Sequences, tree: Tree, logits: Value, hidden: Value, state: State) -> None:
        state[NGRAMS].node = build("ngrams_learn", state[NGRAMS].node, text.node)
