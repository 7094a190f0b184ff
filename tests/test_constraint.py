"""Automata from sets of sequences, regular expressions and JSON schemas: exactly what they should admit, and clear errors."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.runtime.constraint import Automaton, csr_json, csr_regex, csr_trie
from stemma.runtime.errors import InputError, StemmaRuntimeError

WORDS = [b"", b"a", b"b", b"ab", b"ba", b"0", b"1", b"{", b"}", b'"', b":", b"x", b"12", b'{"', b"<end>", b"\xc3", b"\xa9"]
END = 14


def admitted(automaton: Automaton, longest: int) -> set[tuple[int, ...]]:
    """The token sequences of at most `longest` tokens that lead to a state without edges."""
    indptr, tokens, targets = automaton
    found: set[tuple[int, ...]] = set()
    waiting: list[tuple[tuple[int, ...], int]] = [((), 0)]
    while waiting:
        run, state = waiting.pop()
        edges = range(indptr[state], indptr[state + 1])
        assert all(tokens[e] < tokens[e + 1] for e in edges[:-1])
        if not edges:
            found.add(run)
        if len(run) < longest:
            waiting += [((*run, int(tokens[e])), int(targets[e])) for e in edges]
    return found


SETS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(SETS)
def test_a_trie_admits_its_sequences(sequences: list[list[int]]) -> None:
    automaton = csr_trie(sequences)
    assert all(a.dtype == np.int32 for a in automaton)
    wanted = {tuple(s) for s in sequences}
    longer = {s for s in wanted if any(t[: len(s)] == s and t != s for t in wanted)}
    assert admitted(automaton, 9) == wanted - longer
    assert admitted(csr_trie(sequences, end=7), 9) == {(*s, 7) for s in wanted}
    same = [s for s in sequences if len(s) == len(sequences[0])]
    assert admitted(csr_trie(np.array(same, np.int32)), 9) == {tuple(s) for s in same}


def test_a_trie_shares_prefixes() -> None:
    indptr, tokens, targets = csr_trie([[1, 2, 3], [1, 2, 4], [0, 2, 3], [1, 2, 3]])
    assert tokens.tolist() == [0, 1, 2, 2, 3, 3, 4] and targets.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert indptr.tolist() == [0, 2, 3, 4, 5, 7, 7, 7, 7]


@pytest.mark.parametrize("sequences", [[], np.zeros((0, 3), np.int32), [[]], [[1, -1]], np.array([[1.5]])])
def test_sets_that_are_no_constraint(sequences: Any) -> None:
    with pytest.raises(InputError, match="admits no token: the set|no token id"):
        csr_trie(sequences)


def texts(automaton: Automaton, longest: int) -> set[bytes]:
    """Texts that are admitted with an end token behind them."""
    indptr, tokens, targets = automaton
    found, waiting = set(), [(b"", 0, 0)]
    while waiting:
        text, state, count = waiting.pop()
        for e in range(indptr[state], indptr[state + 1]):
            if tokens[e] == END:
                found.add(text)
                assert tokens[indptr[targets[e]] : indptr[targets[e] + 1]].tolist() == [END]
            elif count < longest:
                waiting.append((text + WORDS[tokens[e]], int(targets[e]), count + 1))
    return found


@pytest.mark.parametrize("pattern", ["a|ba", "(ab)+", "a?b*", "[01]{2,3}", "é?a"])
def test_patterns(pattern: str) -> None:
    """Up to four tokens: the texts that match, each in every way to write it with tokens."""
    found = texts(csr_regex(pattern, WORDS, END), 4)
    some: set[bytes] = {b""}
    for _ in range(4):
        some |= {t + w for t in some for w in WORDS if w and w != b"<end>" and len(t) < 6}

    def matches(text: bytes) -> bool:
        return re.fullmatch(pattern, text.decode(errors="replace")) is not None

    assert {t for t in found if len(t) <= 4} == {t for t in some if len(t) <= 4 and matches(t)}
    assert all(matches(t) for t in found)


def test_several_end_tokens() -> None:
    indptr, tokens, targets = csr_regex("a", WORDS, [END, 0])
    after = int(targets[tokens.tolist().index(1)])
    assert tokens[indptr[after] : indptr[after + 1]].tolist() == [0, END]


def test_json() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    for form in (schema, json.dumps(schema)):
        found = texts(csr_json(form, WORDS, END), 6)
        assert b'{"x":12}' in found
        assert all(isinstance(json.loads(t)["x"], int) for t in found)


def test_broken_constraints() -> None:
    with pytest.raises(InputError, match=r"The pattern '\(' cannot be used: .*DFA"):
        csr_regex("(", WORDS, END)
    with pytest.raises(InputError, match="The pattern 'zz' cannot be used: The vocabulary provided is incompatible"):
        csr_regex("zz", WORDS, END)
    with pytest.raises(InputError, match=r"end tokens \[99\] are not tokens of the vocabulary, 0 to 16"):
        csr_regex("a", WORDS, 99)
    with pytest.raises(InputError, match="The JSON schema '{bad' cannot be used"):
        csr_json("{bad", WORDS, END)
    with pytest.raises(InputError, match="cannot be used: Unsupported type: nonsense"):
        csr_json({"type": "nonsense"}, WORDS, END)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    monkeypatch.delitem(sys.modules, "outlines_core.json_schema", raising=False)
    with pytest.raises(StemmaRuntimeError, match="outlines-core: pip install 'stemma-compiler\\[constraints\\]'"):
        csr_regex("a", WORDS, END)
