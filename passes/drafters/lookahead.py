"""The trie of Lookahead: how often runs of tokens were seen, in the text and in earlier requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import State as StateType
from stemma.ir import Type
from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.ir.trace_scope import Cell, build
from stemma.passes.drafters.base import DraftContext, Drafter, State

TRIE, SEEN = "lookahead_trie", "lookahead_seen"


@dataclass(frozen=True)
class Lookahead(Drafter):
    """Lookahead (Zhao et al. 2023, arXiv:2312.12728): a trie of all runs of up to `branch` tokens, of prompts and outputs.

    Guesses are the continuations of the longest suffix that the trie knows, the most frequent ones first. capacity: nodes of the
    trie, which outlives requests; when it is full, counts are halved and what has none left is forgotten.
    """

    branch: int = 12
    capacity: int = 65536
    name: ClassVar[str] = "lookahead"

    def persistent(self, context: DraftContext) -> Mapping[str, Type]:
        return {TRIE: StateType("trie", (self.capacity,))}

    def begin(self, context: DraftContext) -> Mapping[str, Value | Cell]:
        return {SEEN: p.as_value(0)}

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        trie, seen = state[TRIE], state[SEEN]
        trie.node = build("trie_learn", trie.node, text.node, seen.value.node, branch=self.branch)
        seen.value = text.length()[0]
        tree.node = build("trie_draft", trie.node, text.node, tree.node, branch=self.branch, source=context.source)
