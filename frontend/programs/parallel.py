"""Several texts sampled side by side, and one of them chosen.

Host functions get the new tokens of all texts, i32[n, longest], filled with -1; texts end after `longest` tokens at the latest.
"""

from __future__ import annotations

from stemma.frontend.programs.common import Sampling, Texts, at_least_one, votes
from stemma.ir import trace as p


@p.program
def best_of_n(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
    seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False, n: p.Fixed[int] = 4, reward: p.Fixed[bool] = False,
    longest: p.Fixed[int] = 512,
) -> dict[str, p.Value]:  # fmt: skip
    """The best of n samples: of the highest mean log-probability under the model, or, with reward=True, of the highest value of the
    host function `reward(tokens) -> f32[n]`. Of equal ones the first. `scores` f32[n]."""
    at_least_one(n=n, longest=longest)
    limit = p.minimum(max_new_tokens, longest) if reward else max_new_tokens
    sampling = Sampling(model, limit, ignore_eos, temperature, top_k, top_p, seed, sequence)
    texts = Texts.of(model, prompt, n)

    def body(total: p.Value, *state: p.Value) -> tuple[p.Value, ...]:
        open = ~state[1]
        now, logits = sampling.extend(texts.at(*state), open)
        likely = p.take_along(logits, now.last[:, None])[:, 0] - p.logsumexp(logits)
        return ~now.done.all(), p.where(open, total + likely, total), *now.state

    if reward:
        texts = sampling.run(texts, lambda now: now.done.all())
        scores = p.host("reward", texts.tokens(longest), type=("f32", (n,)))
    else:
        total, *state = p.loop(body, p.full(n, 0.0), *texts.state)
        texts = texts.at(*state)
        scores = total / texts.size.float()
    texts.emit(scores.argmax())
    return {"scores": scores}


@p.program
def self_consistency(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
    seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False, n: p.Fixed[int] = 8, longest: p.Fixed[int] = 512,
) -> dict[str, p.Value]:  # fmt: skip
    """Self-consistency (Wang et al. 2022): the first of n samples whose answer most samples have. The host function
    `answer(tokens) -> i32[n]` numbers the answers; a negative one is none and has no vote. `answers`, `votes` i32[n]."""
    at_least_one(n=n, longest=longest)
    sampling = Sampling(model, p.minimum(max_new_tokens, longest), ignore_eos, temperature, top_k, top_p, seed, sequence)
    texts = sampling.run(Texts.of(model, prompt, n), lambda now: now.done.all())
    answers = p.host("answer", texts.tokens(longest), type=("i32", (n,)))
    count = votes(answers, answers >= 0)
    texts.emit(count.argmax())
    return {"answers": answers, "votes": count}


@p.program
def first_finish(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
    seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False, n: p.Fixed[int] = 4,
) -> None:  # fmt: skip
    """First finish search (Agarwal et al. 2025): n samples side by side; the first to end is the answer, the others are dropped."""
    at_least_one(n=n)
    sampling = Sampling(model, max_new_tokens, ignore_eos, temperature, top_k, top_p, seed, sequence)
    texts = sampling.run(Texts.of(model, prompt, n), lambda now: now.done.any())
    texts.emit(texts.done.int().argmax())


@p.program
def short_m_at_k(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
    seed: p.Long = 0, sequence: p.Long = 0, ignore_eos: bool = False, m: p.Fixed[int] = 3, k: p.Fixed[int] = 8,
    longest: p.Fixed[int] = 512,
) -> dict[str, p.Value]:  # fmt: skip
    """short-m@k (Hassid et al. 2025): k samples side by side until m have ended; the majority of the answers of these m, of equal
    ones that with the shortest text. The host function `answer(tokens) -> i32[k]` numbers the answers; a negative one is none and
    has no vote. `answers`, `votes` i32[k]: votes are 0 for texts that are not among the m."""
    at_least_one(m=m, k=k, longest=longest)
    if m > k:
        raise p.TraceError(f"m={m} of k={k} texts: m must be at most k.")
    sampling = Sampling(model, p.minimum(max_new_tokens, longest), ignore_eos, temperature, top_k, top_p, seed, sequence)
    texts = sampling.run(Texts.of(model, prompt, k), lambda now: now.done.int().sum() >= m)
    answers = p.host("answer", texts.tokens(longest), type=("i32", (k,)))
    _, order = p.top_k(p.where(texts.done, -texts.size.float(), float("-inf")), m)  # shortest first, then in order
    chosen = (p.arange(k)[:, None] == order[None, :]).any(1)
    count = votes(answers, chosen & (answers >= 0))
    texts.emit(order[count[order].argmax()])
    return {"answers": answers, "votes": count}
