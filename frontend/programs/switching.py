"""Two models that write one text in turns."""

from __future__ import annotations

from math import log
from typing import Annotated

from stemma.ir import trace as p

Stops = Annotated[p.Value, p.Array("i32", "ends_length")]


@p.program
def entropy_adaptive(
    model: p.Model, draft: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, threshold: float = 1.0, min_stay: int = 10,
    temperature: float = 0.0, top_p: float = 1.0, seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False,
    window: p.Fixed[int] = 5,
) -> dict[str, p.Value]:  # fmt: skip
    """Entropy-adaptive decoding (EAD, Simonds 2025): `model` writes while the mean entropy (bits, before temperature) of the last
    `window` tokens is above the threshold, else `draft`; after a switch at least `min_stay` tokens stay with it (the published text
    asks for stability and gives no rule). The models share their vocabulary. `large` counts the tokens of `model`."""
    large, small = model.start(prompt[:-1]), draft.start(prompt[:-1])

    def body(token: p.Value, recent: p.Value, use: p.Value, stay: p.Value, count: p.Value) -> tuple[object, ...]:
        logits = p.cond(use, lambda: _turn(large, small, token), lambda: _turn(small, large, token))
        token = p.select(logits, large, temperature=temperature, top_p=top_p, seed=seed, sequence=sequence)
        p.emit(token)
        recent = p.concat(recent[1:], p.entropy(logits) / log(2))
        count, stay = count + use.int(), stay + 1
        change = ((recent.sum() / float(window) > threshold) != use) & (stay >= min_stay)
        more = (p.emitted() < max_new_tokens) & (ignore_eos | ~model.is_end(token)[0])
        return more, token, recent, use != change, p.where(change, 0, stay), count

    start = (p.full(window, 0.0), p.as_value(False), p.as_value(0), p.as_value(0))
    *_, count = p.loop(body, prompt[-1:], *start)
    return {"large": count}


@p.program
def leader_follows(
    model: p.Model, draft: p.Model, prompt: p.Tokens, ends: Stops, *, max_new_tokens: int = 128, lead: int = 15, gate: float = 1.0,
    temperature: float = 0.0, top_p: float = 1.0, seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False,
) -> dict[str, p.Value]:  # fmt: skip
    """FoReaL decoding (2025): `model` writes the first `lead` tokens of a sentence with probability `gate`, `draft` the rest of it.
    A sentence ends with one of `ends`. `large` counts the tokens of `model`."""
    large, small = model.start(prompt[:-1]), draft.start(prompt[:-1])

    def body(token: p.Value, place: p.Value, led: p.Value, count: p.Value) -> tuple[object, ...]:
        leads = led & (place < lead)
        logits = p.cond(leads, lambda: _turn(large, small, token), lambda: _turn(small, large, token))
        token = p.select(logits, large, temperature=temperature, top_p=top_p, seed=seed, sequence=sequence)
        p.emit(token)
        over = (token == ends).any()
        more = (p.emitted() < max_new_tokens) & (ignore_eos | ~model.is_end(token)[0])
        return more, token, p.where(over, 0, place + 1), p.where(over, led_now(), led), count + leads.int()

    def led_now() -> p.Value:
        """A counted coin: the uniform number behind the Gumbel noise of a stream that `select` does not use."""
        noise = p.noise(seed, sequence + (1 << 40), large.length()[0], 1)[0, 0]
        return p.exp(-p.exp(-noise)) < gate

    *_, count = p.loop(body, prompt[-1:], p.as_value(0), led_now(), p.as_value(0))
    return {"large": count}


def _turn(writes: p.Sequences, waits: p.Sequences, token: p.Value) -> p.Value:
    """One token by one model; the other catches up when it writes again."""
    logits = writes.step(token)
    waits.sync(writes)
    return logits
