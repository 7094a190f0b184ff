"""Plain decoding: one token after another, the likeliest or sampled."""

from __future__ import annotations

from stemma.ir import trace as p


@p.program
def generate(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0, repetition_penalty: float = 1.0, presence_penalty: float = 0.0, seed: p.Long = 0, sequence: p.Long = 0,
    ignore_eos: bool = False,
) -> None:  # fmt: skip
    """Greedy decoding at temperature 0, else sampling; up to an end token or max_new_tokens."""
    text = model.start(prompt[:-1])

    def body(token: p.Value) -> tuple[p.Value, p.Value]:
        logits = text.step(token)
        token = p.select(
            logits, text, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, seed=seed, sequence=sequence,
        )  # fmt: skip
        p.emit(token)
        return (p.emitted() < max_new_tokens) & (ignore_eos | ~model.is_end(token[0])), token

    p.loop(body, prompt[-1:])
