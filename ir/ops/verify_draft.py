"""Choosing among drafted tokens: verifiers that replace plain selection while a tree is followed."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.ops.choose import SETTINGS, expect_settings, filtered, gumbel_noise, philox
from stemma.ir.ops.program import F32, ProgramOp, SequencesValue, expect, sequences_type
from stemma.ir.types import Tensor, Type

RESIDUAL = 0x9E3779B97F4A7C15
"""What the seed of residual noise is combined with, so that it is independent of the noise that drafters may have used."""


def children(sequences: SequencesValue) -> list[int]:
    """The nodes under the last followed one, in their order."""
    if sequences.tree is None or not sequences.visited:
        return []
    return [i for i in range(sequences.ran) if sequences.tree.parents[i] == sequences.visited[-1]]


def uniform(seed: int, sequence: int, position: int, number: int) -> float:
    """Counted uniform number of a choice: word 0 of Philox4x32-10 with counter (2^32 - 1 - number, position, sequence)."""
    return (int(philox(seed, sequence, position, np.array([0xFFFFFFFF - number], np.uint64))[0, 0]) + 0.5) / 2**32


def one_row(logits: Tensor, sequences: Type, settings: tuple[Type, ...]) -> Tensor:
    """The type i32[1] of a choice; TypeMismatch unless the inputs are those of `select` for one sequence."""
    _, _, vocab, _ = sequences_type(sequences, 1)
    expect(logits, Tensor("f32", (1, vocab)), "the logits")
    if len(settings) != len(SETTINGS):
        raise TypeMismatch(f"there are {len(settings)} settings; needed: {', '.join(SETTINGS)}")
    expect_settings(settings)
    return Tensor("i32", (1,))


class SelectRecursive(ProgramOp):
    """`select_recursive(logits f32[1, vocab], sequences of 1, *8 settings as select, [q f32[n, vocab]], rule="scores") -> i32[1]`.

    Recursive rejection sampling over the children of the followed node, in their order (Yang et al. 2024, Recursive Speculative
    Decoding; Chen et al. 2024, Sequoia). p is the softmax of what `select` chooses from; the token has exactly the distribution p.

    rule "point": child x is accepted with probability p[x], else p[x] becomes 0. Exact for children that were chosen in any way.
    rule "scores": row i of q has the distribution from which the children of node i were sampled without replacement: x is accepted
    with probability p[x] / q[x], else p becomes max(p - q, 0) and q[x] becomes 0, both renormalized. Children that q does not have,
    or of nodes whose row is 0 or missing, go by "point". Needs the children of a node to come from one drafter.

    Uniform numbers and the noise of the last choice are counted, by other counters than the noise of `select` and drafters.
    Temperature 0 takes the likeliest token. Without children, a token of distribution p.
    """

    name = "select_recursive"

    def infer(self, logits: Tensor, sequences: Type, *settings: Type, rule: str = "scores") -> Type:
        if rule not in ("scores", "point"):
            raise TypeMismatch(f'the rule is "scores" or "point", not {rule!r}')
        row = one_row(logits, sequences, settings[: len(SETTINGS)])
        if rest := settings[len(SETTINGS) :]:
            (q,) = rest
            if not isinstance(q, Tensor) or q.dtype != "f32" or q.rank != 2 or q.shape[1] != logits.shape[1]:
                raise TypeMismatch(f"the draft distributions are f32[n, {logits.shape[1]}], not {q!r}")
        return row

    def evaluate(self, ctx: Any, logits: Any, sequences: Any, *settings: Any, rule: str) -> Any:
        temperature, top_k, top_p, min_p, repetition, presence, seed, sequence = (s.item() for s in settings[:8])
        x = filtered(logits[0], sequences.histories[0], temperature, top_k, top_p, min_p, repetition, presence)
        if temperature <= 0:
            return np.array([np.argmax(x)], np.int32)
        p = np.exp(x - x.max())
        p /= p.sum()
        drafts = settings[8] if len(settings) > 8 and rule == "scores" else np.zeros((0, p.size), np.float32)
        node = sequences.visited[-1] if sequences.visited else -1
        q = drafts[node].astype(np.float64) if 0 <= node < len(drafts) else np.zeros(p.size)
        position = len(sequences.histories[0])
        for number, child in enumerate(children(sequences)):
            token = sequences.tree.tokens[child]
            u = uniform(seed, sequence, position, number)
            q = q / q.sum() if q.sum() > 0 else q
            chance = q[token] if q[token] > 0 else 1.0
            if u * chance < p[token]:
                return np.array([token], np.int32)
            if q[token] > 0:
                p = np.maximum(p - q, 0)
                q[token] = 0
            p[token] = 0
            if not p.sum() > 0:  # rounding alone can lead here: the residual is empty
                return np.array([token], np.int32)
            p /= p.sum()
        with np.errstate(divide="ignore"):
            return np.array([np.argmax(np.log(p) + gumbel_noise(seed ^ RESIDUAL, sequence, position, p.size))], np.int32)


class SelectTypical(ProgramOp):
    """`select_typical(logits f32[1, vocab], sequences of 1, *8 settings as select, epsilon f32(), delta f32()) -> i32[1]`.

    Typical acceptance (Cai et al. 2024, Medusa): of the children x of the followed node with p[x] > min(epsilon, delta * exp(-H)),
    the likeliest; else the token that `select` gives. p is the softmax of what `select` chooses from, H = -sum p log(p + 1e-5).
    Lossy: the text follows the drafter where the model finds it plausible. Temperature 0 takes the likeliest token.
    """

    name = "select_typical"

    def infer(self, logits: Tensor, sequences: Type, *settings: Type) -> Type:
        row = one_row(logits, sequences, settings[: len(SETTINGS)])
        if len(settings) != len(SETTINGS) + 2:
            raise TypeMismatch("needs epsilon and delta after the settings")
        for name, type in zip(("epsilon", "delta"), settings[len(SETTINGS) :], strict=True):
            expect(type, F32, name)
        return row

    def evaluate(self, ctx: Any, logits: Any, sequences: Any, *settings: Any) -> Any:
        temperature, top_k, top_p, min_p, repetition, presence, seed, sequence, epsilon, delta = (s.item() for s in settings)
        history = sequences.histories[0]
        x = filtered(logits[0], history, temperature, top_k, top_p, min_p, repetition, presence)
        if temperature <= 0:
            return np.array([np.argmax(x)], np.int32)
        p = np.exp(x - x.max())
        p /= p.sum()
        bound = min(epsilon, delta * np.exp((p * np.log(p + 1e-5)).sum()))
        tokens = [sequences.tree.tokens[i] for i in children(sequences)]
        if accepted := [t for t in tokens if p[t] > bound]:
            return np.array([max(accepted, key=lambda t: p[t])], np.int32)
        return np.array([np.argmax(x + gumbel_noise(seed, sequence, len(history), x.size))], np.int32)


select_recursive, select_typical = SelectRecursive(), SelectTypical()
