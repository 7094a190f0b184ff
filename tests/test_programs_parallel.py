"""Programs that run several texts side by side, against transcriptions that run one text after the other; laws of all programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma import program as p
from stemma.ir import Module, World, interpret, parse_module, print_module, verify
from stemma.ir.ops.choose import filtered, gumbel_noise
from stemma.ir.ops.program import OutputValue, ReferenceModel

pytestmark = pytest.mark.quick
VOCAB, WIDTH, END, NEWLINES = 12, 4, 7, (3, 5)
PROMPTS = ([5], [1, 2, 4], [7, 7, 8, 9, 1, 0])
SPEC = p.ModelSpec(VOCAB, WIDTH, (END,), 256)


def reference(salt: int) -> ReferenceModel:
    def compute(tokens: tuple[Any, ...]) -> tuple[Any, Any]:
        flat = [round(1000 * x) % 2**31 for t in tokens for x in (np.ravel(t) + 1.0)]  # mixed embeddings count as tokens
        rng = np.random.default_rng([salt, *flat])
        return (1.3 * rng.standard_normal(VOCAB)).astype(np.float32), rng.standard_normal(WIDTH).astype(np.float32)

    return ReferenceModel(compute, VOCAB, WIDTH)


MODELS = {"model": reference(1), "draft": reference(2)}
MODEL = MODELS["model"]


def run(name: str, host: dict[str, Callable[..., Any]] | None = None, fixed: Any = None, **inputs: Any) -> dict[str, Any]:
    traced = p.trace(p.PROGRAMS[name], dict.fromkeys(MODELS, SPEC), **(fixed or {}))
    given = {**traced.defaults, **inputs, "output": OutputValue()}
    result = interpret(traced.function, given, float_type=np.float32, world=World(models=MODELS, host=host or {}))
    return {**result, "tokens": list(result["output"].tokens)}


# ---- transcriptions ---------------------------------------------------------------------------------------------------


def next_token(history: list[int], stream: int, heat: float, seed: int) -> int:
    scores = filtered(MODEL(tuple(history))[0], history, heat, 0, 1.0, 0.0, 1.0, 0.0)
    return int(np.argmax(scores + (gumbel_noise(seed, stream, len(history), VOCAB) if heat > 0 else 0.0)))


def sample(prompt: list[int], stream: int, longest: int, heat: float = 0.9, seed: int = 3) -> list[int]:
    """One text to its end or to `longest` tokens."""
    text: list[int] = []
    while len(text) < longest and END not in text:
        text.append(next_token(prompt + text, stream, heat, seed))
    return text


def mean_likelihood(prompt: list[int], text: list[int]) -> float:
    total = 0.0
    for i, token in enumerate(text):
        logits = MODEL((*prompt, *text[:i]))[0].astype(np.float64)
        total += logits[token] - math.log(np.exp(logits).sum())
    return total / len(text)


def padded(texts: list[list[int]], longest: int) -> Any:
    return np.array([text + [-1] * (longest - len(text)) for text in texts], np.int32)


def answer(tokens: Any) -> Any:
    """The sum of a text modulo 3, less one: -1 is no answer."""
    return (np.where(tokens < 0, 0, tokens).sum(1) % 3 - 1).astype(np.int32)


def quality(tokens: Any, *_: Any) -> Any:
    """A number per text that depends on all of it."""
    return np.array([(sum((i + 1) * int(t) for i, t in enumerate(row) if t >= 0) % 17) / 4 for row in tokens], np.float32)


OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.9, "seed": 3}


@pytest.mark.parametrize("sequence", [0, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_best_of_n(prompt: list[int], sequence: int) -> None:
    texts = [sample(prompt, 5 * sequence + i, 9) for i in range(5)]
    scores = [mean_likelihood(prompt, text) for text in texts]
    found = run("best_of_n", fixed={"n": 5}, prompt=prompt, sequence=sequence, **OPTIONS)
    assert found["tokens"] == texts[int(np.argmax(scores))]
    np.testing.assert_allclose(found["scores"], scores, rtol=1e-5)
    found = run(
        "best_of_n", {"reward": quality}, {"n": 5, "reward": True, "longest": 9}, prompt=prompt, sequence=sequence, **OPTIONS
    )
    rewards = quality(padded(texts, 9))
    assert found["tokens"] == texts[int(np.argmax(rewards))] and found["scores"].tolist() == rewards.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_self_consistency(prompt: list[int], seed: int) -> None:
    texts = [sample(prompt, i, 9, seed=seed) for i in range(6)]
    answers = answer(padded(texts, 12)).tolist()
    votes = [answers.count(a) if a >= 0 else 0 for a in answers]
    found = run("self_consistency", {"answer": answer}, {"n": 6, "longest": 12}, prompt=prompt, **OPTIONS | {"seed": seed})
    assert found["tokens"] == texts[votes.index(max(votes))]
    assert found["answers"].tolist() == answers and found["votes"].tolist() == votes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_first_finish(prompt: list[int], seed: int) -> None:
    texts = [sample(prompt, i, 9, seed=seed) for i in range(4)]
    found = run("first_finish", prompt=prompt, **OPTIONS | {"seed": seed})
    assert found["tokens"] == min(texts, key=len)  # the first of the shortest
    longest = run("first_finish", prompt=prompt, **OPTIONS | {"seed": seed, "ignore_eos": True})
    assert len(longest["tokens"]) == 9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("m", [1, 3, 6])
def test_short_m_at_k(prompt: list[int], seed: int, m: int) -> None:
    texts = [sample(prompt, i, 9, seed=seed) for i in range(6)]
    first = sorted(range(6), key=lambda i: len(texts[i]))[:m]
    answers = answer(padded(texts, 9)).tolist()
    votes = {i: sum(answers[i] == answers[j] for j in first) if answers[i] >= 0 else 0 for i in first}
    best = next(i for i in first if votes[i] == max(votes.values()))
    found = run("short_m_at_k", {"answer": answer}, {"m": m, "k": 6, "longest": 9}, prompt=prompt, **OPTIONS | {"seed": seed})
    assert found["tokens"] == texts[best]
    assert found["votes"].tolist() == [votes.get(i, 0) for i in range(6)]


def test_long_texts_are_emitted_whole() -> None:
    history = [5]
    while len(history) < 101:
        history.append(next_token(history, 1, 0.9, 3))
    for name, prompt in (("first_finish", [5]), ("best_of_n", [5])):
        options = OPTIONS | {"prompt": prompt, "ignore_eos": True, "max_new_tokens": 100, "sequence": 1}
        assert run(name, fixed={"n": 1}, **options)["tokens"] == history[1:]


@pytest.mark.parametrize(
    "name, fixed, message",
    [
        ("beam_search", {"beams": 0}, "beams=0 must be an integer of at least 1"),
        ("beam_search", {"early_stopping": "sometimes"}, 'must be True, False or "never"'),
        ("diverse_beam_search", {"beams": 4, "groups": 3}, "4 beams are not 3 groups"),
        ("short_m_at_k", {"m": 4, "k": 3}, "m must be at most k"),
        ("step_beam", {"width": True}, "width=True"),
        ("a_star", {"frontier": 1.5}, "frontier=1.5"),
    ],
)
def test_fixed_options_are_checked(name: str, fixed: dict[str, Any], message: str) -> None:
    with pytest.raises(p.TraceError, match=message):
        p.trace(p.PROGRAMS[name], {"model": SPEC}, **fixed)


# ---- step by step -----------------------------------------------------------------------------------------------------


def over(text: list[int], longest: int) -> bool:
    return bool(text) and (text[-1] == END or len(text) == longest)


def one_step(prompt: list[int], text: list[int], stream: int, longest: int, span: int) -> list[int]:
    """The text with a step more."""
    new = list(text)
    while not over(new, longest) and len(new) - len(text) < span and (len(new) == len(text) or new[-1] not in NEWLINES):
        new.append(next_token(prompt + new, stream, 0.9, 3))
    return new


def scored(texts: list[list[int]], longest: int) -> list[float]:
    return [float(x) for x in quality(padded(texts, longest))]


@pytest.mark.parametrize("sequence", [0, 1, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_particle_filter(prompt: list[int], sequence: int) -> None:
    texts: list[list[int]] = [[] for _ in range(4)]
    turn = 0
    while True:
        texts = [one_step(prompt, text, 4 * sequence + i, 14, 5) for i, text in enumerate(texts)]
        scores = scored(texts, 14)
        if all(over(text, 14) for text in texts):
            break
        weights = np.exp(np.array(scores) - max(scores))
        shares = np.cumsum(weights / weights.sum())
        uniform = math.exp(-math.exp(-gumbel_noise(3, sequence + (1 << 40), turn, 1)[0]))
        parents = [int(np.searchsorted(shares, (i + uniform) / 4)) for i in range(4)]
        texts, turn = [texts[min(j, 3)] for j in parents], turn + 1
    inputs = OPTIONS | {"prompt": prompt, "newlines": NEWLINES, "span": 5, "max_new_tokens": 14, "sequence": sequence}
    found = run("particle_filter", {"score": quality}, {"longest": 14}, **inputs)
    assert found["tokens"] == texts[int(np.argmax(scores))] and found["scores"].tolist() == scores and turn > 0


@pytest.mark.parametrize("sequence", [0, 1, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_step_beam(prompt: list[int], sequence: int) -> None:
    beams: list[list[int]] = [[], []]
    while True:
        every = []
        for i, text in enumerate(beams):
            for j in range(3 if not over(text, 14) else 1):
                every.append(one_step(prompt, text, 6 * sequence + 3 * i + j, 14, 4))
        ranks = scored(every, 14)
        best = sorted(range(len(every)), key=lambda i: -ranks[i])[:2]
        beams = [every[i] for i in best]
        if all(over(text, 14) for text in beams):
            break
    inputs = OPTIONS | {"prompt": prompt, "newlines": NEWLINES, "span": 4, "max_new_tokens": 14, "sequence": sequence}
    found = run("step_beam", {"score": quality}, {"beams": 2, "width": 3, "longest": 20}, **inputs)
    assert found["tokens"] == beams[0] and found["scores"].tolist() == [ranks[i] for i in best]


@pytest.mark.parametrize("expansions", [1, 4, 40])
@pytest.mark.parametrize("sequence", [0, 1, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_star(prompt: list[int], sequence: int, expansions: int) -> None:
    known: list[tuple[float, list[int]]] = [(0.0, [])]
    count = 0
    while True:
        (_, text), *rest = known
        new = [one_step(prompt, text, (5 + 3) * sequence + 5 + j, 14, 4) for j in range(3)]
        count += 1
        known = sorted([*rest, *zip(scored(new, 14), new, strict=True)], key=lambda c: -c[0])[:5]
        if over(known[0][1], 14) or count == expansions:
            break
    score, text = next((c for c in known if over(c[1], 14)), known[0])
    inputs = OPTIONS | {"prompt": prompt, "newlines": NEWLINES, "span": 4, "max_new_tokens": 14, "sequence": sequence}
    found = run("a_star", {"score": quality}, {"width": 3, "frontier": 5, "longest": 14}, **inputs, expansions=expansions)
    assert found["tokens"] == text and found["score"] == score and found["expanded"] == count


# ---- laws of all programs ---------------------------------------------------------------------------------------------

HOST: dict[str, Callable[..., Any]] = {
    "answer": answer, "reward": quality, "score": quality,
    "ngrams": lambda texts, tokens: ((texts.sum(1, keepdims=True) + tokens) % 5 / -2.0).astype(np.float32),
}  # fmt: skip
# An automaton that allows every text without the tokens 0 and 1 and ends nowhere.
ALLOWED = np.arange(2, VOCAB, dtype=np.int32)
AUTOMATON = {"indptr": np.array([0, len(ALLOWED)], np.int32), "tokens": ALLOWED, "targets": np.zeros(len(ALLOWED), np.int32)}
INPUTS: dict[str, Any] = {"newlines": NEWLINES, "stops": NEWLINES, "ends": NEWLINES, **AUTOMATON}


@pytest.mark.parametrize("name", p.PROGRAMS)
def test_programs_are_modules_that_can_be_printed(name: str) -> None:
    traced = p.trace(p.PROGRAMS[name], dict.fromkeys(MODELS, SPEC))
    module = Module([traced.function], {"programs": (name,)})
    verify(module)
    text = print_module(module)
    assert parse_module(text) is module and "ir/trace" not in text
    assert p.PROGRAMS[name].__doc__ and p.PROGRAMS[name].name == name
    assert p.trace(p.PROGRAMS[name], dict.fromkeys(MODELS, SPEC)).function is traced.function


@pytest.mark.parametrize("name", p.PROGRAMS)
@settings(max_examples=12, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), limit=st.integers(1, 9), seed=st.integers(0, 2**63 - 1),
    heat=st.sampled_from([0.0, 0.7, 1.5]), ignore=st.booleans(),
)  # fmt: skip
def test_programs_emit_what_they_may(name: str, prompt: list[int], limit: int, seed: int, heat: float, ignore: bool) -> None:
    """At least one token, at most max_new_tokens; tokens of the vocabulary; nothing after an end token; the same again."""
    given = {"max_new_tokens": limit, "seed": seed, "temperature": heat, "ignore_eos": ignore, "prompt": prompt, **INPUTS}
    traced = p.trace(p.PROGRAMS[name], dict.fromkeys(MODELS, SPEC))
    inputs = {q.attrs["name"]: given[q.attrs["name"]] for q in traced.function.params if q.attrs["name"] in given}
    tokens = run(name, HOST, **inputs)["tokens"]
    assert 1 <= len(tokens) <= (limit if "max_new_tokens" in inputs else 16) and all(0 <= t < VOCAB for t in tokens)
    if "max_new_tokens" in inputs and not ("ignore_eos" in inputs and ignore):
        assert END not in tokens[:-1]
    assert tokens == run(name, HOST, **inputs)["tokens"]
