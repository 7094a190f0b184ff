"""Decoding under a constraint: regular expressions, JSON, closed sets of sequences, as an automaton over tokens."""

from __future__ import annotations

from typing import Annotated

from stemma.ir import trace as p
from stemma.ir.trace_constraint import Automaton

Indptr = Annotated[p.Value, p.Array("i32", "states")]
Edges = Annotated[p.Value, p.Array("i32", "edges")]


@p.program
def constrained(
    model: p.Model, prompt: p.Tokens, indptr: Indptr, tokens: Edges, targets: Edges, *, max_new_tokens: int = 128,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0, seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False,
) -> None:  # fmt: skip
    """Greedy or sampled decoding of what an automaton allows; ends where it allows nothing more, or at an end token.

    The automaton's state is carried by the loop, so speculation carries it from node to node of a tree.
    """
    text, automaton = model.start(prompt[:-1]), Automaton(indptr, tokens, targets)

    def body(token: p.Value, state: p.Value) -> tuple[p.Value, p.Value, p.Value]:
        logits = automaton.allow(text.step(token), state, text)
        token = p.select(
            logits, text, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, seed=seed, sequence=sequence,
        )  # fmt: skip
        p.emit(token)
        state = automaton.advance(state, token)
        over = automaton.done(state)[0] | (model.is_end(token)[0] & ~p.as_value(ignore_eos))
        return (p.emitted() < max_new_tokens) & ~over, token, state

    p.loop(body, prompt[-1:], p.full(1, 0))


@p.program
def constrained_beam(
    model: p.Model, prompt: p.Tokens, indptr: Indptr, tokens: Edges, targets: Edges, *, beams: p.Fixed[int] = 8,
    width: p.Fixed[int] = 256, length: p.Fixed[int] = 8,
) -> dict[str, p.Value]:  # fmt: skip
    """Beam search in a closed set of sequences of `length` tokens (generative retrieval; Su et al. 2026, STATIC: a trie in packed
    sparse rows). Only allowed logits are read after their normaliser; no state may allow more than `width` tokens. Emits the best
    sequence; the results `texts` i32[beams, length] and `scores` f32[beams] have all, best first (-inf: there are fewer)."""
    text, automaton = model.start(prompt[:-1]).fork([0] * beams), Automaton(indptr, tokens, targets)
    dead = p.full(beams, float("-inf")).put(0, 0.0)

    def body(last: p.Value, state: p.Value, scores: p.Value, texts: p.Value, place: p.Value) -> tuple[p.Value, ...]:
        values, found, after = automaton.candidates(p.log_softmax(text.step(last)), p.maximum(state, 0), width)
        scores, at = p.top_k((values + scores[:, None]).reshape(beams * width), beams)
        beam, alive = at // width, scores > float("-inf")
        text.keep(beam)
        chosen = p.where(alive, found.reshape(beams * width)[at], 0)
        texts = texts[beam].put(place, chosen[:, None], axis=1)
        return place + 1 < length, chosen, after.reshape(beams * width)[at], scores, texts, place + 1

    start = (prompt[-1:].broadcast_to(beams), p.full(beams, 0), dead, p.full((beams, length), -1), p.as_value(0))
    _, _, scores, texts, _ = p.loop(body, *start)
    p.emit(texts[0])
    return {"texts": texts, "scores": scores}
