"""Superposed decoding: several drafts of a text for the price of one."""

from __future__ import annotations

from stemma.ir import trace as p


@p.program
def superposed(
    model: p.Model, prompt: p.Tokens, *, alpha: float = 0.54, drafts: p.Fixed[int] = 3, tops: p.Fixed[int] = 9,
    tokens: p.Fixed[int] = 16,
) -> dict[str, p.Value]:  # fmt: skip
    """Superposed decoding (Shen et al. 2024): `drafts` texts of `tokens` tokens with one row of the model per position, which
    reads the mean of the drafts' last embeddings, weighted by their probabilities. A draft's next token, among the model's
    `tops` likeliest, is scored (1 - alpha) * log p(model) + alpha * log p(n-grams). The host function `ngrams(texts
    i32[drafts, tokens], candidates i32[tops]) -> f32[drafts, tops]` gives the second, which keeps the drafts apart. Emits the
    best draft; the result `drafts` has all, best first. Approximate: all drafts share one cache. The model must take mixed
    embeddings."""
    text = model.start(prompt[:-1])
    padding = p.full(drafts - 1, 0)
    weights = p.concat(p.full(1, 1.0), p.full(drafts - 1, 0.0))
    logits = text.step_mixed(p.concat(prompt[-1:], padding)[None], weights[None])
    scores, first = p.top_k(p.log_softmax(logits[0]), drafts)
    texts = p.full((drafts, tokens), -1).put(0, first[:, None], axis=1)

    def body(scores: p.Value, texts: p.Value, last: p.Value, place: p.Value) -> tuple[object, ...]:
        logits = text.step_mixed(last[None], p.softmax(scores)[None])
        likely, found = p.top_k(p.log_softmax(logits[0]), tops)
        grams = p.host("ngrams", texts, found, type=("f32", (drafts, tops)))
        every = scores[:, None] + likely[None] * (1.0 - alpha) + grams * alpha
        scores, at = p.top_k(every.reshape(drafts * tops), drafts)
        chosen = found[at % tops]
        texts = texts[at // tops].put(place, chosen[:, None], axis=1)
        return place + 1 < tokens, scores, texts, chosen, place + 1

    if tokens > 1:
        _, texts, _, _ = p.loop(body, scores, texts, first, p.as_value(1))
    p.emit(texts[0])
    return {"drafts": texts}
