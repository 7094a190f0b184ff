"""Searches over steps of a text, such as lines of a proof, led by a host function that scores unfinished texts.

The host function `score(tokens i32[n, longest], sizes i32[n]) -> f32[n]` gets the new tokens of n texts, filled with -1, and their
numbers; higher is better. A step ends with one of the tokens `newlines`, or after `span` tokens.
"""

from __future__ import annotations

from typing import Any

from stemma.frontend.programs.common import Sampling, Texts, at_least_one
from stemma.ir import trace as p

OTHER_STREAM = 1 << 40  # added to the sequence, it names noise that no sampled token has


def host_scores(texts: Texts, longest: int) -> p.Value:
    """The host function's scores of all texts."""
    return p.host("score", texts.tokens(longest), texts.size, type=("f32", (texts.sequences.count,)))


@p.program
def particle_filter(
    model: p.Model, prompt: p.Tokens, newlines: p.StopTokens, *, max_new_tokens: int = 128, span: int = 32,
    temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False,
    n: p.Fixed[int] = 4, longest: p.Fixed[int] = 512,
) -> dict[str, p.Value]:  # fmt: skip
    """Particle filtering (Puri et al. 2025): after every step the n texts are drawn anew with probabilities softmax(score), by
    systematic resampling with counted noise; those that have ended stay as they are. Emits the best at the end. `scores` f32[n]."""
    at_least_one(n=n, longest=longest)
    sampling = Sampling(model, p.minimum(max_new_tokens, longest), ignore_eos, temperature, top_k, top_p, seed, sequence)
    texts = Texts.of(model, prompt, n)

    def body(turn: p.Value, _: p.Value, *state: p.Value) -> tuple[Any, ...]:
        now = sampling.step(texts.at(*state), newlines, span)
        scores = host_scores(now, longest)
        gumbel = p.noise(seed, sequence + p.as_value(OTHER_STREAM, "i64"), turn, 1)[0, 0]
        places = (p.arange(n).float() + p.exp(-p.exp(-gumbel))) / float(n)
        below = p.softmax(scores).cumsum()[None, :] < places[:, None]
        parents = p.minimum(below.int().sum(1), n - 1)
        parents = p.where(now.done.all(), p.arange(n), parents)
        return ~now.done.all(), turn + 1, scores[parents], *now.keep(parents).state

    _, scores, *state = p.loop(body, 0, p.full(n, 0.0), *texts.state)
    texts.at(*state).emit(scores.argmax())
    return {"scores": scores}


@p.program
def step_beam(
    model: p.Model, prompt: p.Tokens, newlines: p.StopTokens, *, max_new_tokens: int = 128, span: int = 32,
    temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False,
    beams: p.Fixed[int] = 2, width: p.Fixed[int] = 2, longest: p.Fixed[int] = 512,
) -> dict[str, p.Value]:  # fmt: skip
    """Beam search over steps (Snell et al. 2024): each of `beams` texts gets `width` sampled next steps, and the best `beams` of
    all by score go on; a text that has ended competes once. Emits the best at the end. `scores` f32[beams], best first."""
    at_least_one(beams=beams, width=width, longest=longest)
    sampling = Sampling(model, p.minimum(max_new_tokens, longest), ignore_eos, temperature, top_k, top_p, seed, sequence)
    rows = beams * width
    texts = Texts.of(model, prompt, rows)  # every text `width` times in a row

    def body(_: p.Value, *state: p.Value) -> tuple[Any, ...]:
        copies = texts.at(*state)
        again = copies.done & (p.arange(rows) % width != 0)
        now = sampling.step(copies, newlines, span)
        scores, best = p.top_k(p.where(again, float("-inf"), host_scores(now, longest)), beams)
        over = now.done[best].all()
        return ~over, scores, *now.keep(best[p.arange(rows) // width]).state

    scores, *state = p.loop(body, p.full(beams, 0.0), *texts.state)
    texts.at(*state).emit(p.as_value(0))
    return {"scores": scores}


@p.program
def a_star(
    model: p.Model, prompt: p.Tokens, newlines: p.StopTokens, *, max_new_tokens: int = 128, span: int = 32, expansions: int = 64,
    temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False,
    width: p.Fixed[int] = 4, frontier: p.Fixed[int] = 16, longest: p.Fixed[int] = 512,
) -> dict[str, p.Value]:  # fmt: skip
    """A*-decoding (Chatziveroglou 2025): best-first search. The unfinished text of the highest score gets `width` sampled next
    steps, which join the `frontier` best known texts, until an ended text is the best, or after `expansions` of them; then the
    best ended text is emitted, or the best one if none has ended. score: minus the cost so far and the estimated cost to come.
    `score` f32(), `expanded` i32()."""
    at_least_one(width=width, frontier=frontier, longest=longest)
    sampling = Sampling(model, p.minimum(max_new_tokens, longest), ignore_eos, temperature, top_k, top_p, seed, sequence)
    texts = Texts.of(model, prompt, frontier + width)  # the frontier, best first, then the next steps of its first
    places, new = p.arange(frontier + width), slice(frontier, None)

    def body(rank: p.Value, count: p.Value, *state: p.Value) -> tuple[Any, ...]:
        now = texts.at(*state).keep(p.where(places < frontier, places, 0))
        now = sampling.step(now, newlines, span, frontier)
        known = p.where(p.arange(frontier) == 0, float("-inf"), rank)  # the one that was expanded leaves
        rank, best = p.top_k(p.concat(known, host_scores(now, longest)[new]), frontier)
        now = now.keep(p.concat(best, p.full(width, 0)))
        return ~now.done[0] & (count + 1 < expansions), rank, count + 1, *now.state

    empty = p.full(frontier, float("-inf"))
    rank, count, *state = p.loop(body, empty, 0, *texts.state)
    texts = texts.at(*state)
    ended = texts.done[:frontier] & (rank > float("-inf"))
    chosen = p.where(ended.any(), ended.int().argmax(), 0)
    texts.emit(chosen)
    return {"score": rank[chosen], "expanded": count}
