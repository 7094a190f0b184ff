"""Constrained decoding against direct enumeration and transcription."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.frontend.programs.constrained import constrained, constrained_beam
from stemma.ir import StemmaError
from tests.test_programs_search import LARGE, PROMPTS, VOCAB, chosen, log_softmax, run

pytestmark = pytest.mark.quick
Trie = dict[int, Any]


def rows_of(trie: Trie) -> dict[str, Any]:
    """The automaton of a nested dictionary token -> rest; leaves are empty."""
    states, indptr, tokens, targets = [trie], [0], [], []
    for state in states:  # grows while it is read
        for token, rest in sorted(state.items()):
            tokens.append(token)
            targets.append(len(states))
            states.append(rest)
        indptr.append(len(tokens))
    return {"indptr": indptr, "tokens": tokens, "targets": targets}


def trie_of(sequences: list[tuple[int, ...]]) -> Trie:
    trie: Trie = {}
    for sequence in sequences:
        node = trie
        for token in sequence:
            node = node.setdefault(token, {})
    return trie


sequences = st.lists(st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=4).map(tuple), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(sequences, st.sampled_from(PROMPTS), st.sampled_from([0.0, 0.8]), st.integers(0, 5))
def test_constrained_text_is_always_allowed(texts: list[tuple[int, ...]], prompt: list[int], temperature: float, seed: int) -> None:
    trie, history, expected = trie_of(texts), tuple(prompt), []
    node = trie
    while node:
        logits = np.full(VOCAB, -np.inf, np.float32)
        logits[list(node)] = LARGE(history)[0][list(node)]
        token = chosen(logits, history, temperature, seed, 0)
        expected.append(token)
        history, node = (*history, token), node[token]
    result = run(constrained, prompt=prompt, **rows_of(trie), temperature=temperature, seed=seed)["tokens"]
    assert result == expected
    assert any(tuple(result) == t[: len(result)] for t in texts)


def test_constraints_that_admit_nothing() -> None:
    with pytest.raises(StemmaError, match="admits no token"):
        run(constrained, prompt=[5], indptr=[0, 0], tokens=[4], targets=[0])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_beam_search_of_a_closed_set_finds_the_best(prompt: list[int]) -> None:
    """With beams for every prefix, the result is the order of all sequences by their probability."""
    rng = np.random.default_rng(3)
    every = sorted({tuple(int(t) for t in rng.integers(0, VOCAB, 3)) for _ in range(14)})
    scores = {}
    for text in every:
        total, history = 0.0, tuple(prompt)
        for token in text:
            total += log_softmax(LARGE(history)[0])[token]
            history = (*history, token)
        scores[text] = total
    expected = sorted(every, key=lambda t: -scores[t])
    result = run(constrained_beam.fix(beams=16, width=VOCAB, length=3), prompt=prompt, **rows_of(trie_of(every)))
    assert [tuple(t) for t in result["texts"][: len(every)].tolist()] == expected
    np.testing.assert_allclose(result["scores"][: len(every)], [scores[t] for t in expected], rtol=1e-5)
    assert (result["scores"][len(every) :] == -math.inf).all()
    assert result["tokens"] == list(expected[0])


def test_few_beams_are_a_beam_search() -> None:
    every = list(itertools.product([4, 5, 6], repeat=3))
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(3):
        grown = []
        for text, score in beams:
            logp = log_softmax(LARGE((5, *text))[0])
            grown += [((*text, t), score + logp[t]) for t in (4, 5, 6)]
        beams = sorted(grown, key=lambda b: -b[1])[:2]
    result = run(constrained_beam.fix(beams=2, width=4, length=3), prompt=[5], **rows_of(trie_of(every)))
    assert [tuple(t) for t in result["texts"].tolist()] == [b[0] for b in beams]
