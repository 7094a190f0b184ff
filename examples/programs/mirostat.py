"""Mirostat: sampling that keeps the surprise of the text near a target."""

from __future__ import annotations

from stemma import program as p


@p.program
def mirostat(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, target: float = 3.0, rate: float = 0.1, seed: p.Long = 0,
    sequence: p.Long = 0, ignore_eos: bool = False,
) -> dict[str, p.Value]:  # fmt: skip
    """Mirostat 2.0 (Basu et al. 2021): tokens more surprising than a bound (bits) are left out, and the bound moves by `rate`
    times the distance of each token's surprise from the target. The result `surprise` is the mean over the text."""
    text = model.start(prompt[:-1])

    def body(token: p.Value, bound: p.Value, total: p.Value) -> tuple[p.Value, ...]:
        logits = text.step(token)
        bits = p.log_softmax(logits) * -1.442695
        allowed = (bits <= bound) | (bits == bits.min())
        token = p.select(p.where(allowed, logits, float("-inf")), text, temperature=1.0, seed=seed, sequence=sequence)
        p.emit(token)
        surprise = p.take_along(bits, token[:, None])[0, 0]
        more = (p.emitted() < max_new_tokens) & (ignore_eos | ~model.is_end(token)[0])
        return more, token, bound - rate * (surprise - target), total + surprise

    _, _, total = p.loop(body, prompt[-1:], target * 2.0, 0.0)
    return {"surprise": total / p.emitted().float()}
