"""Constraints: an automaton in rows of allowed tokens, for closed sets of sequences, regular expressions and JSON.

    indptr i32[states + 1], tokens i32[edges], targets i32[edges]

The edges of state s are indptr[s] .. indptr[s + 1] - 1: the token of each, ascending within a state, and the state that it leads to
(Su et al. 2026, STATIC: a trie in compressed sparse rows). State 0 is the beginning; a state without edges admits nothing; state -1
is that of a sequence which left the automaton. `stemma.runtime.constraint` makes such automata.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir.errors import StemmaError, TypeMismatch
from stemma.ir.formats import Array
from stemma.ir.ops.program import ProgramOp
from stemma.ir.types import Tensor, Tuple, Type


def automaton(indptr: Type, *edges: Type) -> None:
    """TypeMismatch unless the types are i32[states + 1] and i32[edges]."""
    for type in (indptr, *edges):
        if not isinstance(type, Tensor) or type.dtype != "i32" or type.rank != 1:
            raise TypeMismatch(f"an automaton is i32 arrays of one axis, not {type!r}")
    if any(e != edges[0] for e in edges):
        raise TypeMismatch(f"the automaton's edges are {edges[0]!r} and {edges[1]!r}")


def rows(logits: Type, states: Type, positions: Type | None) -> None:
    """TypeMismatch unless the types are f32[c, vocab], i32[c] and (or None) i32[c]."""
    if not isinstance(logits, Tensor) or logits.dtype != "f32" or logits.rank != 2:
        raise TypeMismatch(f"the logits are f32[c, vocab], not {logits!r}")
    for type in (states, states if positions is None else positions):
        if type != Tensor("i32", (logits.shape[0],)):
            raise TypeMismatch(f"states and positions are i32[{logits.shape[0]}], not {type!r}")


def edges_of(state: int, indptr: Array, count: int) -> range:
    """The numbers of a state's edges, none for -1; StemmaError for a state or numbers that the automaton does not have."""
    if state < 0:
        return range(0)
    if state + 1 >= len(indptr):
        raise StemmaError(f"The constraint has {len(indptr) - 1} states, and was asked for state {state}.")
    first, last = int(indptr[state]), int(indptr[state + 1])
    if not 0 <= first <= last <= count:
        raise StemmaError(f"The constraint is damaged: state {state} has the edges {first} to {last} of {count}.")
    return range(first, last)


def nothing(row: int, state: int, positions: Array | None) -> StemmaError:
    """The error when a constraint admits no token."""
    place = f" at position {int(positions[row])}" if positions is not None else ""
    return StemmaError(f"The constraint admits no token{place} (sequence {row}, state {state}).")


def token_of(tokens: Array, edge: int, vocab: int) -> int:
    """The token of an edge; StemmaError when the vocabulary lacks it."""
    token = int(tokens[edge])
    if not 0 <= token < vocab:
        raise StemmaError(f"The constraint names the token {token}; the vocabulary has {vocab}.")
    return token


class Allow(ProgramOp):
    """`allow(logits f32[c, vocab], states i32[c], indptr, tokens, [positions i32[c]]) -> f32[c, vocab]`: others get -inf.

    A state that admits nothing is an error, which names the position when positions are given.
    """

    name = "allow"

    def infer(self, logits: Tensor, states: Tensor, indptr: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Type:
        rows(logits, states, positions)
        automaton(indptr, tokens)
        return logits

    def evaluate(self, ctx: Any, logits: Any, states: Any, indptr: Any, tokens: Any, positions: Any = None) -> Any:
        result = np.full_like(logits, -np.inf)
        for row, state in enumerate(states):
            found = [token_of(tokens, e, logits.shape[1]) for e in edges_of(int(state), indptr, len(tokens))]
            if not found:
                raise nothing(row, int(state), positions)
            result[row, found] = logits[row, found]
        return result


class Advance(ProgramOp):
    """`advance(states i32[c], chosen i32[c], indptr, tokens, targets) -> i32[c]`: the states after a token of each sequence.

    -1 when the token is not allowed, and for ever after; a chosen token of -1 leaves its state alone.
    """

    name = "advance"

    def infer(self, states: Tensor, chosen: Tensor, indptr: Tensor, tokens: Tensor, targets: Tensor) -> Type:
        automaton(indptr, tokens, targets)
        if not isinstance(states, Tensor) or states.dtype != "i32" or states.rank != 1 or chosen != states:
            raise TypeMismatch(f"states and tokens are i32[c], not {states!r} and {chosen!r}")
        return states

    def evaluate(self, ctx: Any, states: Any, chosen: Any, indptr: Any, tokens: Any, targets: Any) -> Any:
        result = np.array(states)
        for row, (state, token) in enumerate(zip(states, chosen, strict=True)):
            edges = edges_of(int(state), indptr, len(tokens))
            if token >= 0:
                result[row] = next((targets[e] for e in edges if tokens[e] == token), -1)
        return result


class Candidates(ProgramOp):
    """`candidates(logits f32[c, vocab], states i32[c], indptr, tokens, targets, [positions i32[c]], width=)`
    -> (values f32[c, width], tokens i32[c, width], states i32[c, width]): the logits, tokens and next states of the allowed tokens.

    In the order of the edges, then -inf and -1. Reads nothing but the allowed logits, so a step costs the same for a million
    sequences as for ten. It is an error when no row admits a token, or when a state has more than `width` edges.
    """

    name = "candidates"

    def infer(
        self, logits: Tensor, states: Tensor, indptr: Tensor, tokens: Tensor, targets: Tensor, positions: Tensor | None = None,
        *, width: int,
    ) -> Type:  # fmt: skip
        rows(logits, states, positions)
        automaton(indptr, tokens, targets)
        if width < 1:
            raise TypeMismatch(f"a width of {width} has no room for a token")
        shape = (logits.shape[0], width)
        return Tuple((Tensor("f32", shape), Tensor("i32", shape), Tensor("i32", shape)))

    def evaluate(
        self, ctx: Any, logits: Any, states: Any, indptr: Any, tokens: Any, targets: Any, positions: Any = None, *, width: int
    ) -> Any:
        shape = (len(states), width)
        values, chosen, after = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        for row, state in enumerate(states):
            edges = edges_of(int(state), indptr, len(tokens))
            if len(edges) > width:
                raise StemmaError(f"The constraint admits {len(edges)} tokens in state {state}; `candidates` has width={width}.")
            for column, e in enumerate(edges):
                token = token_of(tokens, e, logits.shape[1])
                values[row, column], chosen[row, column], after[row, column] = logits[row, token], token, targets[e]
        if len(states) and (chosen < 0).all():
            raise nothing(0, int(states[0]), positions)
        return values, chosen, after


allow, advance, candidates = Allow(), Advance(), Candidates()
