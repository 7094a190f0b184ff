"""Contrastive search: likely continuations that do not repeat what the model already represented."""

from __future__ import annotations

from stemma.ir import trace as p


@p.program
def contrastive_search(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, alpha: float = 0.6, ignore_eos: bool = False,
    candidates: p.Fixed[int] = 4, context: p.Fixed[int] = 1024,
) -> None:  # fmt: skip
    """Contrastive search (Su et al. 2022): of the likeliest `candidates`, the one of the largest (1 - alpha) * probability -
    alpha * (largest cosine of its hidden state with those of all earlier tokens). Reads at most `context` tokens."""
    text = model.start(prompt[:0])
    logits = text.feed(prompt)[-1]
    place = p.arange(prompt.shape[0])
    seen = p.full((context, model.spec.width), 0.0).put(place, _unit(text.hidden))

    def body(text: p.Sequences, logits: p.Value, seen: p.Value, length: p.Value) -> tuple[object, ...]:
        probability, tokens = p.top_k(p.softmax(logits), candidates)
        tries = text.fork([0] * candidates)
        after = tries.step(tokens)
        hidden = _unit(tries.hidden)
        likeness = p.where(p.arange(context) < length, hidden @ seen.transpose(), -1.0).max(1)
        best = ((1.0 - alpha) * probability - likeness * alpha).argmax()
        p.emit(tokens[best])
        more = (p.emitted() < max_new_tokens) & (length + 1 < context) & (ignore_eos | ~model.is_end(tokens[best][None])[0])
        return more, tries.fork(best[None]), after[best], seen.put(length, hidden[best]), length + 1

    p.loop(body, text, logits, seen, p.as_value(prompt.shape[0], "i32"))


def _unit(x: p.Value) -> p.Value:
    return x / p.sqrt((x * x).sum(-1) + 1e-12)[..., None]
