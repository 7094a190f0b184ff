"""Automata for constrained decoding, as the operations `allow`, `advance` and `candidates` read them.

    indptr, tokens, targets = csr_trie(sequences)               # a closed set of token sequences
    indptr, tokens, targets = csr_regex("yes|no", words, end)   # a regular expression
    indptr, tokens, targets = csr_json(schema, words, end)      # a JSON schema

The edges of state s are indptr[s] .. indptr[s + 1] - 1: an allowed token (ascending) and the state after it, all i32. State 0 is
the beginning. `words` are the bytes of each token, as `stemma.runtime.export.token_bytes` gives them. Regular expressions and
schemas need the package outlines-core (pip install 'stemma-compiler[constraints]'); sets of sequences need numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.runtime.errors import InputError, StemmaRuntimeError

Automaton = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def csr_trie(sequences: Sequence[Sequence[int]] | NDArray[Any], end: int | None = None) -> Automaton:
    """The automaton that admits exactly these token sequences: an array [n, length], or rows of any lengths.

    A complete sequence admits nothing more; with `end`, the end token, and after that nothing. Repeated ones count once. InputError
    for an empty set or a token below 0.
    """
    rows = _rows(sequences, end)
    order = np.lexsort(rows.T[::-1])
    rows = rows[order]
    parent = np.zeros(len(rows), np.int64)  # of the next token of each row: its node, numbered level by level
    fresh = np.zeros(len(rows), bool)  # where the row's prefix differs from that of the row before
    fresh[0] = True
    tokens: list[NDArray[Any]] = []
    parents: list[NDArray[Any]] = []
    states = 1
    for column in rows.T:
        fresh[1:] |= column[1:] != column[:-1]
        made = fresh & (column >= 0)
        tokens.append(column[made])
        parents.append(parent[made])
        parent = states - 1 + np.cumsum(made)
        states += len(tokens[-1])
    if states > np.iinfo(np.int32).max:
        raise InputError(f"The set has {states} different prefixes; at most {np.iinfo(np.int32).max} can be numbered.")
    indptr = np.zeros(states + 1, np.int32)
    np.cumsum(np.bincount(np.concatenate(parents), minlength=states), out=indptr[1:])
    return indptr, np.concatenate(tokens).astype(np.int32), np.arange(1, states, dtype=np.int32)


def _rows(sequences: Sequence[Sequence[int]] | NDArray[Any], end: int | None) -> NDArray[Any]:
    """The sequences as rows that are filled with -1, the end token behind each."""
    if isinstance(sequences, np.ndarray) and sequences.ndim == 2:
        rows, lengths = sequences, np.full(len(sequences), sequences.shape[1])
    else:
        lengths = np.array([len(s) for s in sequences], np.int64)
        rows = np.full((len(lengths), int(lengths.max(initial=0))), -1, np.int64)
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = [t for s in sequences for t in s]
    given = np.arange(rows.shape[1]) < lengths[:, None]
    if not len(rows) or (end is None and not given.any()):
        raise InputError("The constraint admits no token: the set of sequences is empty.")
    if rows.dtype.kind not in "iu" or (rows[given] < 0).any():
        raise InputError("A sequence of the constraint has something that is no token id (an integer of at least 0).")
    if end is not None:
        rows = np.concatenate([rows, np.full((len(rows), 1), -1, rows.dtype)], 1)
        rows[np.arange(len(rows)), lengths] = end
    return rows


def csr_regex(pattern: str, words: Sequence[bytes], end: int | Sequence[int]) -> Automaton:
    """The automaton that admits the texts of a regular expression (of the Rust crate regex), token by token.

    `end` tokens are admitted after a whole match, and after them only `end` tokens. InputError for a broken pattern, or for one
    that no tokens of the vocabulary can match.
    """
    return _csr(pattern, words, end, f"The pattern {_shown(pattern)}")


def csr_json(schema: str | Mapping[str, Any], words: Sequence[bytes], end: int | Sequence[int]) -> Automaton:
    """The automaton that admits the JSON texts of a JSON schema (text or dictionary), as `csr_regex`; InputError for a bad one."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise InputError(f"The JSON schema is no JSON: {_sentence(error)}") from None
    try:
        pattern = _library().json_schema.build_regex_from_schema(text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The JSON schema {_shown(text)} cannot be used: {_sentence(error)}") from None
    return _csr(pattern, words, end, f"The JSON schema {_shown(text)}")


def _csr(pattern: str, words: Sequence[bytes], end: int | Sequence[int], what: str) -> Automaton:
    core = _library()
    ends = sorted({int(e) for e in ([end] if isinstance(end, (int, np.integer)) else end)})
    if not ends or not 0 <= ends[0] <= ends[-1] < len(words):
        raise InputError(f"The end tokens {ends} are not tokens of the vocabulary, 0 to {len(words) - 1}.")
    by_text: dict[bytes, list[int]] = {}
    for token, word in enumerate(words):
        if word and token not in ends:
            by_text.setdefault(bytes(word), []).append(token)
    try:
        index = core.Index(pattern, core.Vocabulary(ends[0], by_text))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} cannot be used: {_sentence(error)}") from None
    found: dict[int, dict[int, int]] = index.get_transitions()
    final = index.get_final_states()
    first = index.get_initial_state()
    names = [first, *(s for s in dict.fromkeys([*found, *(t for row in found.values() for t in row.values())]) if s != first)]
    place = {name: i for i, name in enumerate(names)}
    over = len(names)  # the state after an end token
    rows = []
    for name in names:
        row = {t: place[s] for t, s in found.get(name, {}).items() if t not in ends}
        rows.append(sorted((row | dict.fromkeys(ends, over) if name in final else row).items()))
    rows.append([(e, over) for e in ends])
    if not rows[0]:
        raise InputError(f"{what} admits no token of this vocabulary.")
    indptr = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=indptr[1:])
    edges = np.array([edge for row in rows for edge in row], np.int32)
    return indptr, edges[:, 0].copy(), edges[:, 1].copy()


def _library() -> Any:
    try:
        import_module("outlines_core.json_schema")
        return import_module("outlines_core")
    except ImportError:
        raise StemmaRuntimeError(
            "Regular expressions and JSON schemas need the package outlines-core: pip install 'stemma-compiler[constraints]'."
        ) from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith(".") else text + "."
