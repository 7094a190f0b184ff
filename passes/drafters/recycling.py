"""Token Recycling: the likeliest next tokens of every token that the model ever computed, put together to a fixed tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stemma.ir import Tensor, Type
from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.passes.drafters.base import DraftContext, Drafter, State

LEVELS = (8, 21, 25, 15, 8, 3)
TABLE = "recycling_table"


def template(levels: tuple[int, ...] = LEVELS, k: int = 8) -> list[list[tuple[int, int]]]:
    """The tree's shape: for each level its nodes as (place of the parent in the level before, rank among the parent's guesses).

    The published tree has 80 nodes in levels of 8, 21, 25, 15, 8 and 3. Which nodes those are is RECONSTRUCTED: of all paths of
    ranks (0-based) the ones with the smallest sum of (rank + 1) ** 0.5, ties to smaller ranks first; a node's parent is there.
    """
    found: list[list[tuple[int, int]]] = []
    paths: list[tuple[int, ...]] = [()]
    for count in levels:
        grown = [(place, (*path, rank)) for place, path in enumerate(paths) for rank in range(k)]
        grown.sort(key=lambda x: (sum((r + 1) ** 0.5 for r in x[1]), x[1]))
        grown = sorted(grown[:count], key=lambda x: x[1])
        found.append([(place, path[-1]) for place, path in grown])
        paths = [path for _, path in grown]
    return found


@dataclass(frozen=True)
class Recycling(Drafter):
    """Token Recycling (Luo et al. 2024, arXiv:2408.08696).

    A table i32[vocab + 1, k] has the k likeliest tokens after each token, as they were computed last, plus one (0: never seen; the
    last row is for nodes that do not exist). It outlives requests. Nodes of the template beyond the budget are left out.
    """

    k: int = 8
    name: ClassVar[str] = "recycling"

    def persistent(self, context: DraftContext) -> Mapping[str, Type]:
        return {TABLE: Tensor("i32", (context.vocab + 1, self.k))}

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        table = state[TABLE].value.reshape((context.vocab + 1) * self.k)
        nodes, tokens, left = p.array([0]), token, context.size - 1
        for level in template(k=self.k):
            level = level[:left]
            left -= len(level)
            if not level:
                break
            places, ranks = p.array([place for place, _ in level]), p.array([rank for _, rank in level])
            parents = nodes[places]
            known = p.where(tokens < 0, context.vocab, tokens)[places]
            tokens = table[known * self.k + ranks] - 1
            nodes = context.extend(tree, parents, tokens, p.full(len(level), 1.0))

    def observe(self, context: DraftContext, text: Sequences, tree: Tree, logits: Value, hidden: Value, state: State) -> None:
        """Every node that ran gives a row; of equal tokens the last node counts."""
        _, likeliest = p.top_k(logits, self.k)
        _, tokens, _ = tree.nodes()
        rows: Any = p.where(tokens < 0, context.vocab, tokens)
        state[TABLE].value = state[TABLE].value.put(rows, likeliest + 1)
