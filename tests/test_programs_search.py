"""Contrastive, cautious, two-model and superposed decoding against direct transcriptions in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stemma.frontend.programs.cautious import cautious
from stemma.frontend.programs.contrastive import contrastive_search
from stemma.frontend.programs.superposed import superposed
from stemma.frontend.programs.switching import entropy_adaptive, leader_follows
from stemma.ir import Array, Module, World, interpret, parse_module, print_module, verify
from stemma.ir.ops.choose import filtered, gumbel_noise
from stemma.ir.ops.program import OutputValue, ReferenceModel
from stemma.ir.trace import ModelSpec, Program, trace

pytestmark = pytest.mark.quick
VOCAB, WIDTH, END = 12, 6, 3
PROMPTS = ([5], [1, 2, 4], [7, 7, 8, 9, 1, 0])


def reference(salt: int, sharpness: float = 1.5) -> ReferenceModel:
    """Logits and hidden states that depend on every token; mixed embeddings count as tokens."""

    def compute(tokens: tuple[Any, ...]) -> tuple[Array, Array]:
        flat = [round(1000 * x) % 2**31 for t in tokens for x in (np.ravel(t) + 1.0)]
        rng = np.random.default_rng([salt, *flat])
        return (sharpness * rng.standard_normal(VOCAB)).astype(np.float32), rng.standard_normal(WIDTH).astype(np.float32)

    return ReferenceModel(compute, VOCAB, WIDTH)


LARGE, SMALL = reference(1), reference(2, 0.7)
SPEC = ModelSpec(VOCAB, WIDTH, (END,), 256)


def run(program: Program, host: dict[str, Callable[..., Any]] | None = None, **inputs: Any) -> dict[str, Any]:
    """The program on the reference interpreter, after a round trip through text."""
    names = [n for n in ("model", "draft") if n in program.run.__annotations__]
    traced = trace(program, {n: SPEC for n in names})
    module = Module([traced.function], {"programs": (program.name,)})
    verify(module)
    assert parse_module(print_module(module)) is module
    world = World(models={"model": LARGE, "draft": SMALL}, host=host or {})
    given = {**traced.defaults, **inputs, "output": OutputValue()}
    result = interpret(traced.function, given, float_type=np.float32, world=world)
    return {**result, "tokens": list(result["output"].tokens)}


def log_softmax(x: Any) -> Any:
    x = np.asarray(x, np.float64)
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_contrastive_search(prompt: list[int], alpha: float) -> None:
    history, seen = tuple(prompt), []
    expected: list[int] = []
    for i in range(len(prompt)):
        seen.append(LARGE(history[: i + 1])[1])
    while len(expected) < 10:
        probability = np.exp(log_softmax(LARGE(history)[0]))
        best, most = -1, -math.inf
        for token in np.argsort(-probability, kind="stable")[:4]:
            hidden = LARGE((*history, int(token)))[1]
            likeness = max(float(h @ hidden / np.linalg.norm(h) / np.linalg.norm(hidden)) for h in seen)
            score = (1 - alpha) * probability[token] - alpha * likeness
            if score > most:
                best, most = int(token), score
        history = (*history, best)
        seen.append(LARGE(history)[1])
        expected.append(best)
        if best == END:
            break
    assert run(contrastive_search, prompt=prompt, max_new_tokens=10, alpha=alpha)["tokens"] == expected
    if alpha == 0:  # then it is greedy
        assert expected[0] == int(np.argmax(LARGE(tuple(prompt))[0]))


def chosen(logits: Any, history: Any, temperature: float, seed: int, sequence: int, top_p: float = 1.0) -> int:
    x = filtered(logits, history, temperature, 0, top_p, 0.0, 1.0, 0.0)
    return int(np.argmax(x + gumbel_noise(seed, sequence, len(history), VOCAB) if temperature > 0 else x))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("unsure", [0.5, 3.0])
def test_cautious(prompt: list[int], unsure: float) -> None:
    stops, limit, trials, span = [0, 4], 11, 5, 16
    history, used = tuple(prompt), set()
    expected: list[int] = []
    while True:
        logp = log_softmax(LARGE(history)[0])
        entropy = -(np.exp(logp) * logp).sum()
        count = 1 + math.floor((trials - 1) * min(entropy / unsure, 1))
        used.add(count)
        best: tuple[int, ...] = ()
        lowest = math.inf
        for trial in range(count):
            text, total = history, 0.0
            while len(text) - len(history) < span:
                logits = LARGE(text)[0]
                token = chosen(logits, text, 0.9, 5, 2 * trials + trial)
                total += log_softmax(logits)[token]
                text = (*text, token)
                if token in (*stops, END):
                    break
            if -total / (len(text) - len(history)) < lowest:
                best, lowest = text[len(history) :], -total / (len(text) - len(history))
        history = (*history, *best)
        expected += best
        if len(expected) >= limit or expected[-1] == END:
            break
    options: dict[str, Any] = {"max_new_tokens": limit, "temperature": 0.9, "unsure": unsure, "seed": 5, "sequence": 2}
    assert run(cautious, prompt=prompt, stops=stops, **options)["tokens"] == expected[:limit]
    assert unsure > 1 or used == {trials}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("threshold", "min_stay"), [(2.0, 1), (2.4, 3), (99.0, 1), (-1.0, 0)])
def test_entropy_adaptive(prompt: list[int], threshold: float, min_stay: int) -> None:
    history, recent, large, stay, count = tuple(prompt), [0.0] * 5, False, 0, 0
    expected: list[int] = []
    while len(expected) < 14:
        logits = (LARGE if large else SMALL)(history)[0]
        count += large
        logp = log_softmax(logits)
        recent = [*recent[1:], -(np.exp(logp) * logp).sum() / math.log(2)]
        token = chosen(logits, history, 0.8, 3, 0, top_p=0.9)
        history = (*history, token)
        expected.append(token)
        stay += 1
        if (sum(recent) / 5 > threshold) != large and stay >= min_stay:
            large, stay = not large, 0
        if token == END:
            break
    options: dict[str, Any] = {
        "max_new_tokens": 14,
        "threshold": threshold,
        "min_stay": min_stay,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 3,
    }
    result = run(entropy_adaptive, prompt=prompt, **options)
    assert result["tokens"] == expected and result["large"] == count
    assert threshold < 90 or count == 0


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("gate", [0.0, 0.5, 1.0])
def test_leader_follows(prompt: list[int], gate: float) -> None:
    ends, lead = [0, 1, 2], 2

    def coin(history: tuple[int, ...]) -> bool:
        return bool(math.exp(-math.exp(-gumbel_noise(9, 4 + (1 << 40), len(history), 1)[0])) < gate)

    history, place, count = tuple(prompt), 0, 0
    expected: list[int] = []
    led = coin(history[:-1])
    while len(expected) < 14:
        leads = led and place < lead
        count += leads
        logits = (LARGE if leads else SMALL)(history)[0]
        token = chosen(logits, history, 1.0, 9, 4)
        expected.append(token)
        place += 1
        if token in ends:
            place, led = 0, coin(history)
        history = (*history, token)
        if token == END:
            break
    options: dict[str, Any] = {"max_new_tokens": 14, "lead": lead, "gate": gate, "temperature": 1.0, "seed": 9, "sequence": 4}
    result = run(leader_follows, prompt=prompt, ends=ends, **options)
    assert result["tokens"] == expected and result["large"] == count
    assert gate > 0 or count == 0


def ngrams(texts: Any, candidates: Any) -> Any:
    """A made-up n-gram model: the score of a candidate after the last token of a draft."""
    table = np.log(np.random.default_rng(0).dirichlet(np.ones(VOCAB), VOCAB)).astype(np.float32)
    last = [int(row[row >= 0][-1]) for row in texts]
    return table[np.array(last)][:, candidates]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_superposed(prompt: list[int]) -> None:
    drafts, tops, length, alpha = 3, 9, 6, 0.54
    history: tuple[Any, ...] = tuple(prompt[:-1])
    history = (*history, ((prompt[-1], 1.0), (0, 0.0), (0, 0.0)))
    logp = log_softmax(LARGE(history)[0])
    order = np.argsort(-logp, kind="stable")[:drafts]
    scores, texts = logp[order].astype(np.float32), [[int(t)] for t in order]
    while len(texts[0]) < length:
        weights = np.exp(log_softmax(scores)).astype(np.float32)
        history = (*history, tuple((t[-1], float(w)) for t, w in zip(texts, weights, strict=True)))
        logp = log_softmax(LARGE(history)[0])
        found = np.argsort(-logp, kind="stable")[:tops]
        grams = ngrams(np.array(texts), found)
        every = [
            (scores[i] + (1 - alpha) * logp[f] + alpha * grams[i, j], i, int(f)) for i in range(drafts) for j, f in enumerate(found)
        ]
        every.sort(key=lambda e: -e[0])
        scores = np.array([e[0] for e in every[:drafts]], np.float32)
        texts = [[*texts[i], f] for _, i, f in every[:drafts]]
    result = run(superposed.fix(tokens=length), host={"ngrams": ngrams}, prompt=prompt)
    assert result["tokens"] == texts[0]
    assert result["drafts"].tolist() == texts
