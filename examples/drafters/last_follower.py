"""A drafter in a few lines: guess that every token is followed by what followed it last time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stemma import program as p
from stemma.ir import Tensor, Type
from stemma.passes.drafters import DraftContext, Drafter, State

TABLE = "last_follower"


@dataclass(frozen=True)
class LastFollower(Drafter):
    """A chain of `length` guesses from a table i32[vocab]: the token that came last after each token, plus one (0: none yet)."""

    length: int = 4
    name: ClassVar[str] = "last_follower"

    def persistent(self, context: DraftContext) -> Mapping[str, Type]:
        return {TABLE: Tensor("i32", (context.vocab,))}

    def draft(self, context: DraftContext, text: p.Sequences, token: p.Value, tree: p.Tree, state: State) -> None:
        node = p.array([0])  # the root
        for _ in range(self.length):
            token = state[TABLE].value[p.maximum(token, 0)] - 1
            node = context.extend(tree, node, token, [1.0])

    def observe(
        self, context: DraftContext, text: p.Sequences, tree: p.Tree, logits: p.Value, hidden: p.Value, state: State
    ) -> None:
        """After each drafted node, accepted or not, the model's likeliest token."""
        _, tokens, _ = tree.nodes()
        likeliest = logits.argmax(-1) + 1
        rows = p.where(tokens < 0, tokens[0], tokens)  # places without a node say again what the root says
        state[TABLE].value = state[TABLE].value.put(rows, p.where(tokens < 0, likeliest[0], likeliest))
