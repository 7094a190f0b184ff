"""Choosing tokens: counted noise, filters, and the verifiers of speculation that replace plain selection."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir.formats import Array
from stemma.ir.ops.program import F32, I32, I64, ProgramOp, expect, sequences_type
from stemma.ir.types import Tensor, Type

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed", "sequence")
SETTING_TYPES = (F32, I32, F32, F32, F32, F32, I64, I64)


def philox(seed: int, sequence: int, position: int, first: Array) -> Array:
    """Words [n, 4] of Philox4x32-10 (Salmon et al. 2011) with key `seed` and counters (first[i], position, sequence low, high)."""
    low = np.uint64(0xFFFFFFFF)
    words = (position & 0xFFFFFFFF, sequence & 0xFFFFFFFF, sequence >> 32 & 0xFFFFFFFF)
    c = [first.astype(np.uint64), *(np.full(len(first), w, np.uint64) for w in words)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(key[0]), b & low, a >> np.uint64(32) ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1)


def gumbel_noise(seed: int, sequence: int, position: int, size: int) -> Array:
    """Counted Gumbel noise of tokens 0..size-1 in float64: -log(-log(u)), u = (bits + 0.5) / 2^32; the bits of a token are word
    token % 4 of `philox` with the counter (token / 4, position, sequence)."""
    words = philox(seed, sequence, position, np.arange(-(-size // 4)))
    return -np.log(-np.log((words.reshape(-1)[:size].astype(np.float64) + 0.5) / 2**32))


def filtered(
    logits: Array, history: Any, temperature: float, top_k: int, top_p: float, min_p: float, repetition: float, presence: float
) -> Array:
    """Scores in float64 after penalties, temperature and filters; -inf where a token is filtered out.

    repetition_penalty (Keskar et al. 2019): a positive logit of a token in the history is divided by it, another multiplied;
    presence_penalty is subtracted from the logits of tokens in the history. top_k, top_p (Holtzman et al. 2020) and min_p keep
    all tokens that tie with the last one kept.
    """
    x = logits.astype(np.float32).copy()
    seen = np.unique(np.array([t for t in history if isinstance(t, (int, np.integer))], np.int64))
    if repetition not in (0.0, 1.0):
        x[seen] = np.where(x[seen] > 0, x[seen] / np.float32(repetition), x[seen] * np.float32(repetition))
    if presence:
        x[seen] -= np.float32(presence)
    if temperature <= 0:
        return x.astype(np.float64)
    x = (x / np.float32(temperature)).astype(np.float64)
    keep = x > -np.inf
    if 0 < top_k < x.size:
        keep &= x >= np.sort(x)[-top_k]
    if 0 < top_p < 1:
        order = np.argsort(np.where(keep, -x, np.inf), kind="stable")
        p = np.exp(x[order] - x[order[0]]) * keep[order]
        before = np.cumsum(p) - p
        last = x[order][np.flatnonzero((before < top_p * p.sum()) & keep[order])[-1]]
        keep &= x >= last
    if min_p > 0:
        keep &= x >= x.max() + np.log(min_p)
    return np.where(keep, x, -np.inf)


class Select(ProgramOp):
    """`select(logits f32[count, vocab], sequences, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed,
    sequence) -> i32[count]`: the next token of each sequence.

    argmax(filter(logits) / temperature + Gumbel noise counted by (seed, sequence + i, length of the history)), or plain argmax at
    temperature 0; ties go to the lowest token. All settings are scalars: f32 but for top_k i32, seed and sequence i64.
    """

    name = "select"

    def infer(self, logits: Tensor, sequences: Type, *settings: Type) -> Type:
        _, count, vocab, _ = sequences_type(sequences)
        expect(logits, Tensor("f32", (count, vocab)), "the logits")
        expect_settings(settings)
        return Tensor("i32", (count,))

    def evaluate(self, ctx: Any, logits: Any, sequences: Any, *settings: Any) -> Any:
        temperature, top_k, top_p, min_p, repetition, presence, seed, sequence = (s.item() for s in settings)
        chosen = []
        for i, (row, history) in enumerate(zip(logits, sequences.histories, strict=True)):
            x = filtered(row, history, temperature, top_k, top_p, min_p, repetition, presence)
            if temperature > 0:
                x = x + gumbel_noise(seed, sequence + i, len(history), x.size)
            chosen.append(int(np.argmax(x)))
        return np.array(chosen, np.int32)


def expect_settings(settings: tuple[Type, ...]) -> None:
    """TypeMismatch unless the types are those of SETTINGS."""
    for name, type, expected in zip(SETTINGS, settings, SETTING_TYPES, strict=True):
        expect(type, expected, name)


class Noise(ProgramOp):
    """`noise(seed i64(), sequence i64(), positions i32[n], size=) -> f32[n, size]`: counted Gumbel noise of tokens 0..size-1."""

    name = "noise"

    def infer(self, seed: Tensor, sequence: Tensor, positions: Tensor, *, size: int) -> Type:
        expect(seed, I64, "the seed")
        expect(sequence, I64, "the sequence")
        return Tensor("f32", (*positions.shape, size))

    def evaluate(self, ctx: Any, seed: Any, sequence: Any, positions: Any, *, size: int) -> Any:
        return np.array([gumbel_noise(int(seed), int(sequence), int(p), size) for p in positions], np.float32)


select, noise = Select(), Noise()
