"""Prompt lookup: what followed the same words earlier in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.ir.trace_scope import build
from stemma.passes.drafters.base import DraftContext, Drafter, State


@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Prompt lookup decoding (Saxena 2023): a chain of what followed the latest earlier occurrence of the longest suffix,
    the more certain the longer that is.

    longest: tokens of a suffix at most. length: of the chain. Keeps nothing.
    """

    longest: int = 4
    length: int = 12
    name: ClassVar[str] = "prompt_lookup"

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        length = min(self.length, context.size - 1)
        looked = build("suffix_lookup", text.node, token.node, longest=self.longest, length=length)
        found, matched = Value(build("get", looked, index=0)), Value(build("get", looked, index=1))
        certain = p.array([1.0 - 0.5**n for n in range(self.longest + 1)], "f32")[matched]
        context.extend(tree, p.arange(length), found, certain.broadcast_to(length))
