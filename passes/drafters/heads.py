"""Drafting with heads: small trained functions of the target's hidden state that guess the tokens after the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import PassError
from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.ir.trace_scope import Cell
from stemma.passes.base import Needs
from stemma.passes.drafters.base import DraftContext, Drafter, State, best_layer

HIDDEN = "draft_hidden"


@dataclass(frozen=True)
class Medusa(Drafter):
    """Medusa (Cai et al. 2024, arXiv:2401.10774): head i guesses the token i + 1 places after the root from the same hidden state.

    Calls medusa(hidden f32[1, model width]) -> f32[1, heads, vocab]. The tree has the likeliest combinations: `width` nodes a layer
    at most, with a probability of 1 / budget or more. folder: of the heads' weights, when they are not beside the checkpoint.
    """

    heads: int = 4
    width: int = 16
    folder: str = ""
    name: ClassVar[str] = "medusa"

    def needs(self) -> Needs:
        return Needs(heads=((self.name, self.folder),), hidden=True)

    def check(self, context: DraftContext) -> None:
        if not context.width:
            raise PassError(
                f"The drafter {self.name!r} needs the hidden state of {context.model!r}, which its step does not return."
            )

    def begin(self, context: DraftContext) -> Mapping[str, Value | Cell]:
        return {HIDDEN: p.full((1, context.width), 0.0)}

    def observe(self, context: DraftContext, text: Sequences, tree: Tree, logits: Value, hidden: Value, state: State) -> None:
        state[HIDDEN].value = hidden

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        logits = p.call("medusa", state[HIDDEN].value, type=("f32", (1, self.heads, context.vocab)))[0]
        likely = context.likely(logits, text.length() + 1 + p.arange(self.heads))
        nodes, paths, width = p.array([0]), p.full(1, 1.0), min(self.width, context.size - 1)
        for i in range(self.heads):
            best = best_layer(paths, likely[i : i + 1].broadcast_to(len(nodes), context.vocab), width, 1.0 / context.size)
            nodes, paths = context.extend(tree, nodes[best.places], best.tokens, best.scores), best.paths


@dataclass(frozen=True)
class Hydra(Medusa):
    """Hydra (Ankner et al. 2024, arXiv:2402.05109): as Medusa, but head i also sees the tokens before the one it guesses.

    Calls hydra_I(hidden f32[n, model width], path i32[n, I + 1]) -> f32[n, vocab] on every node of a layer.
    """

    name: ClassVar[str] = "hydra"
    slow: ClassVar[bool] = True

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        nodes, paths, path, width = p.array([0]), p.full(1, 1.0), token[None], min(self.width, context.size - 1)
        for i in range(self.heads):
            count = len(nodes)
            hidden = state[HIDDEN].value.broadcast_to(count, context.width)
            logits = p.call(f"hydra_{i}", hidden, path, type=("f32", (count, context.vocab)))
            likely = context.likely(logits, (text.length() + 1 + i).broadcast_to(count))
            best = best_layer(paths, likely, width, 1.0 / context.size)
            nodes, paths = context.extend(tree, nodes[best.places], best.tokens, best.scores), best.paths
            path = p.concat(path[best.places], p.maximum(best.tokens, 0)[:, None], axis=1)
