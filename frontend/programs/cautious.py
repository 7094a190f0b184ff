"""Cautious next token prediction: several trials where the model is unsure, the most confident one is kept."""

from __future__ import annotations

from typing import Annotated

from stemma.ir import trace as p

Stops = Annotated[p.Value, p.Array("i32", "stops_length")]


@p.program
def cautious(
    model: p.Model, prompt: p.Tokens, stops: Stops, *, max_new_tokens: int = 128, temperature: float = 1.0, unsure: float = 3.0,
    seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False, trials: p.Fixed[int] = 5, span: p.Fixed[int] = 16,
) -> None:  # fmt: skip
    """Cautious next token prediction (Wang et al. 2025, CNTP). Where the entropy H (nats) of the next token is high, up to `trials`
    continuations are sampled to the next of the `stops` (punctuation), at most `span` tokens, and the one of the lowest perplexity
    is kept. Their number is 1 + floor((trials - 1) * min(H / unsure, 1)): the paper says only that it grows with H."""
    text = model.start(prompt[:-1])

    def ends(tokens: p.Value) -> p.Value:
        stop = (tokens[:, None] == stops[None, :]).any(1)
        return stop | (model.is_end(tokens) & ~p.as_value(ignore_eos))

    def body(text: p.Sequences, token: p.Value) -> tuple[object, ...]:
        logits = text.step(token)
        share = p.minimum(p.entropy(logits)[0] / unsure, 1.0)
        used = p.arange(trials) <= p.floor(share * float(trials - 1)).int()
        tries = text.fork([0] * trials)
        logits = logits.broadcast_to(trials, model.vocab)
        first = choose(logits, tries)

        def extend(tokens: p.Value, total: p.Value, count: p.Value, going: p.Value, logits: p.Value) -> tuple[object, ...]:
            likely = p.take_along(p.log_softmax(logits), tokens[:, None])[:, 0]
            total, count = p.where(going, total + likely, total), p.where(going, count + 1, count)
            going = going & ~ends(tokens) & (count < span)
            after = tries.step(p.where(going, tokens, -1))
            return going.any(), p.where(going, choose(after, tries), tokens), total, count, going, after

        zero = p.full(trials, 0.0)
        last, total, count, _, _ = p.loop(extend, first, zero, p.full(trials, 0), used, logits)
        best = p.where(used, total / p.maximum(count, 1).float(), float("-inf")).argmax()
        room = max_new_tokens - p.emitted()
        kept = tries.fork(best[None])
        written = kept.history(text.length()[0], span)[0]
        p.emit(p.where(p.arange(span) < room, written, -1))
        p.emit(p.where(count[best] <= room, last[best], -1))
        over = model.is_end(last[best][None])[0] & ~p.as_value(ignore_eos)
        return (p.emitted() < max_new_tokens) & ~over, kept, last[best][None]

    def choose(logits: p.Value, tries: p.Sequences) -> p.Value:
        return p.select(logits, tries, temperature=temperature, seed=seed, sequence=sequence * trials)

    p.loop(body, text, prompt[-1:])
