"""Beam searches: the likeliest texts, kept side by side."""

from __future__ import annotations

from typing import Any

from stemma.frontend.programs.common import at_least_one, emit_from
from stemma.ir import trace as p

NEVER = -1e9  # what transformers adds to the score of a hypothesis that must not be chosen


@p.program
def beam_search(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, length_penalty: float = 1.0, beams: p.Fixed[int] = 4,
    early_stopping: p.Fixed[bool | str] = False,
) -> dict[str, p.Value]:  # fmt: skip
    """Beam search with the rules of transformers' `generate(num_beams=beams)`: of each step's 2 * beams best continuations (more
    for models with several end tokens) the best `beams` without an end go on, and those that end are kept while they are among the
    best `beams` by log-probability / length ** length_penalty. early_stopping: True stops once `beams` texts have ended, False
    when no running one can be better at its present length, "never" when none can at its best length. `scores` f32[beams]."""
    at_least_one(beams=beams)
    if early_stopping not in (True, False, "never"):
        raise p.TraceError(f'early_stopping={early_stopping!r} must be True, False or "never".')
    begin, keep = p.as_value(prompt.shape[0]), max(2, 1 + len(model.eos)) * beams
    text = model.start(prompt[:-1]).fork([0] * (2 * beams))  # running ones, then those that have ended, without their last token

    def body(token: p.Value, running: p.Value, ended: p.Value, done: p.Value, last: p.Value, size: p.Value) -> tuple[Any, ...]:
        logits = text.step(p.concat(token, p.full(beams, -1)))[:beams]
        size = size + 1
        each, tokens = p.top_k(logits, keep)
        values, flat = p.top_k((each + (running - p.logsumexp(logits))[:, None]).reshape(beams * keep), keep)
        parent, token = flat // keep, tokens.reshape(beams * keep)[flat]
        hit = model.is_end(token) | (size >= max_new_tokens)
        full = done.all() & (early_stopping is True)
        running, go_on = p.top_k(p.where(hit, values + NEVER, values), beams)
        finishing = hit & (p.arange(keep) < beams)
        scores = values / size.float() ** length_penalty + p.where(full, NEVER, 0.0) + p.where(finishing, 0.0, NEVER)
        ended, best = p.top_k(p.concat(ended, scores), beams)
        text.keep(p.concat(parent[go_on], p.concat(p.arange(beams) + beams, parent)[best]))
        done, last = p.concat(done, finishing)[best], p.concat(last, token)[best]
        longest = p.where(length_penalty > p.as_value(0.0), max_new_tokens, size) if early_stopping == "never" else size
        hope = running[0] / longest.float() ** length_penalty
        better = (hope > p.where(done, ended.min(), NEVER)).any()
        again = better & ~(done.all() & (early_stopping is True)) & ~hit.all()
        return again, token[go_on], running, ended, done, last, size

    first = p.array([0.0] + [NEVER] * (beams - 1))
    start = (p.full(beams, NEVER), p.full(beams, False), p.full(beams, 0), 0)
    _, _, ended, _, last, _ = p.loop(body, prompt[-1:].broadcast_to(beams), first, *start)
    emit_from(text.fork([beams]), begin)
    p.emit(last[0])
    return {"scores": ended}


@p.program
def diverse_beam_search(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128, diversity: float = 0.5, length_penalty: float = 1.0,
    beams: p.Fixed[int] = 4, groups: p.Fixed[int] = 2,
) -> dict[str, p.Value]:  # fmt: skip
    """Diverse beam search (Vijayakumar et al. 2018): `groups` beam searches side by side. A group chooses by log-probability minus
    `diversity` for every time that an earlier group chose the token at this position (Hamming). A text that has ended keeps its
    place. Emits the best by log-probability / length ** length_penalty; `scores` f32[beams] are those of all."""
    at_least_one(beams=beams, groups=groups)
    if beams % groups:
        raise p.TraceError(f"{beams} beams are not {groups} groups of one size.")
    each, begin, text = beams // groups, p.as_value(prompt.shape[0]), model.start(prompt[:-1]).fork([0] * beams)

    def body(last: p.Value, score: p.Value, done: p.Value, size: p.Value) -> tuple[Any, ...]:
        likely = p.log_softmax(text.step(p.where(done, -1, last)))
        stay = p.where(p.arange(model.vocab) == 0, 0.0, float("-inf"))  # an ended text has one continuation: itself
        total = score[:, None] + p.where(done[:, None], stay[None, :], likely)
        used, parents, tokens, scores = p.full(model.vocab, 0.0), [], [], []
        for group in range(groups):
            own = slice(group * each, (group + 1) * each)
            penalty = p.where(done[own][:, None], 0.0, used[None, :] * diversity)
            _, flat = p.top_k((total[own] - penalty).reshape(each * model.vocab), each)
            parents.append(flat // model.vocab + group * each)
            tokens.append(p.where(done[parents[-1]], -1, flat % model.vocab))
            scores.append(total[own].reshape(each * model.vocab)[flat])
            used = used + (tokens[-1][:, None] == p.arange(model.vocab)[None, :]).float().sum(0)
        parent, token = p.concat(*parents), p.concat(*tokens)
        text.keep(parent)
        size, last = size[parent] + (token >= 0).int(), p.where(token < 0, last[parent], token)
        done = done[parent] | model.is_end(last) | (size >= max_new_tokens)
        return ~done.all(), last, p.concat(*scores), done, size

    first = p.array(([0.0] + [float("-inf")] * (each - 1)) * groups)
    state = (prompt[-1:].broadcast_to(beams), first, p.full(beams, False), p.full(beams, 0))
    last, score, _, size = p.loop(body, *state)
    score = score / size.float() ** length_penalty
    emit_from(text.fork(score.argmax()[None]), begin)
    p.emit(last[score.argmax()])
    return {"scores": score}
