"""Constraints of decoding programs while they are traced: automata in compressed sparse rows."""

from __future__ import annotations

from dataclasses import dataclass

from stemma.ir.trace_scope import build
from stemma.ir.trace_states import Sequences
from stemma.ir.trace_values import Value


@dataclass(frozen=True)
class Automaton:
    """What texts may be: state s allows tokens[indptr[s]:indptr[s + 1]] and goes on to the targets beside them; 0 is the first.

    indptr i32[states + 1], tokens i32[edges], targets i32[edges], as `stemma.runtime.constraint` makes them.
    """

    indptr: Value
    tokens: Value
    targets: Value

    def allow(self, logits: Value, states: Value, text: Sequences) -> Value:
        """Logits f32[c, vocab], those of tokens that the states i32[c] do not allow -inf."""
        inputs = (self.indptr.node, self.tokens.node, text.length().node)
        return Value(build("allow", logits.node, states.node, *inputs))

    def advance(self, states: Value, tokens: Value) -> Value:
        """The states after one token each, i32[c]; -1 after one that is not allowed."""
        return Value(build("advance", states.node, tokens.node, self.indptr.node, self.tokens.node, self.targets.node))

    def candidates(self, logits: Value, states: Value, width: int) -> tuple[Value, Value, Value]:
        """(logits f32[c, width], tokens i32[c, width], next states i32[c, width]) of the allowed tokens, then -inf and -1."""
        inputs = (self.indptr.node, self.tokens.node, self.targets.node)
        node = build("candidates", logits.node, states.node, *inputs, width=width)
        return Value(build("get", node, index=0)), Value(build("get", node, index=1)), Value(build("get", node, index=2))

    def done(self, states: Value) -> Value:
        """Which states allow nothing more, bool[c]."""
        return self.indptr[states + 1] == self.indptr[states]
