"""What a lossy pass costs: the changed module against the one it came from, on the same inputs, by the reference semantics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stemma.ir import Array, Function, Module, PassError, WeightStore, dtype, interpret, size


@dataclass(frozen=True)
class Loss:
    """Differences of the next-token distributions (causal language models) over `tokens` calibration positions.

    kl: mean Kullback-Leibler divergence KL(before || after) in nats per token; kl_max: its maximum over positions.
    top1: share of positions with the same most likely token. perplexity_before, perplexity_after: exp of the mean negative log
    likelihood of the next calibration token. first_divergence: number of positions before the first one whose most likely token
    differs; None when none does. error: relative L2 difference of the outputs.
    """

    tokens: int
    error: float
    kl: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    first_divergence: int | None = None


class Meter:
    """Compares changed modules with the module that a compile started from, on the same inputs.

    Both are evaluated in float32 by the interpreter; weights are streamed, a block of one tensor in memory.
    calibration: integer arrays [tokens], at least one of two tokens or more for a language model; other models are compared on
    seeded random inputs. PassError when there is nothing to measure on.
    """

    def __init__(self, before: Module, weights: WeightStore, calibration: Sequence[Array]) -> None:
        self.before, self.weights = before["forward"], weights
        self.language = before.properties.get("kind") == "causal_lm"
        self.documents = [np.asarray(d) for d in calibration if len(d) > 1]
        self._reference: list[Array] = []
        if self.language and not self.documents:
            raise PassError(
                "A lossy pass needs at least two tokens of calibration text to measure its cost. Give --calibration FILE."
            )

    def __call__(self, after: Module) -> Loss:
        """What the changes so far cost."""
        if not self.language:
            return _compare_outputs(self.before, after["forward"], self.weights)
        if not self._reference:
            self._reference = _logits(self.before, self.documents, self.weights)
            check_logits(self._reference)
        changed = _logits(after["forward"], self.documents, self.weights)
        check_logits(changed, "After this pass, the")
        return _compare_logits(self.documents, self._reference, changed)


def _compare_logits(documents: Sequence[Array], before: Sequence[Array], after: Sequence[Array]) -> Loss:
    divergences, agreement, likelihood = [], [], []
    difference = energy = 0.0
    for document, reference, changed in zip(documents, before, after, strict=True):
        for a, b, token in zip(reference, changed, [*document[1:], None], strict=True):
            difference += float(np.sum((b - a) ** 2, dtype=np.float64))
            energy += float(np.sum(a**2, dtype=np.float64))
            p, q = log_softmax(a), log_softmax(b)
            divergences.append(max(0.0, float(divergence(p, q))))
            agreement.append(bool(np.argmax(a) == np.argmax(b)))
            if token is not None:
                likelihood.append((-p[token], -q[token]))
    perplexity = np.exp(np.mean(likelihood, axis=0))
    return Loss(
        tokens=len(divergences),
        error=float(np.sqrt(difference / energy)) if energy else 0.0,
        kl=float(np.mean(divergences)),
        kl_max=float(np.max(divergences)),
        top1=float(np.mean(agreement)),
        perplexity_before=float(perplexity[0]),
        perplexity_after=float(perplexity[1]),
        first_divergence=agreement.index(False) if False in agreement else None,
    )


def _logits(forward: Function, documents: Sequence[Array], weights: WeightStore) -> list[Array]:
    """[tokens, vocabulary] in float32 of each document; those of one length run together, as every run reads all weights."""
    found: dict[int, Array] = {}
    for length in {len(d): None for d in documents}:
        group = [i for i, d in enumerate(documents) if len(d) == length]
        inputs = {forward.params[0].attrs["name"]: np.stack([documents[i] for i in group])}
        logits = interpret(forward, inputs, weights, float_type=np.float32)[forward.result_names[0]]
        found |= dict(zip(group, logits, strict=True))
    return [found[i] for i in range(len(documents))]


def check_logits(logits: Sequence[Array], whose: str = "The") -> None:
    """PassError when a row of logits has a NaN, an infinity or no finite number: comparing with it says nothing."""
    largest = np.concatenate([x.max(axis=-1).reshape(-1) for x in logits])
    if wrong := int(np.count_nonzero(~np.isfinite(largest))):
        raise PassError(
            f"{whose} model's logits are not finite (NaN or infinity) at {wrong} of {len(largest)} calibration tokens, so no "
            "loss can be measured."
        )


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    shifted: Array = x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
    return shifted


def divergence(p: Array, q: Array) -> Array:
    """KL(p || q) in nats over the last axis, of log-probabilities; what p rules out (-inf) adds nothing."""
    difference = np.subtract(p, q, out=np.zeros_like(p), where=p > -np.inf)
    return np.asarray(np.sum(np.exp(p) * difference, axis=-1))


def _compare_outputs(before: Function, after: Function, weights: WeightStore) -> Loss:
    inputs = random_inputs(before)
    results = [interpret(f, inputs, weights, float_type=np.float32) for f in (before, after)]
    pairs = [(results[0][n], results[1][n]) for n in before.result_names]
    difference = sum(float(np.sum((b - a) ** 2, dtype=np.float64)) for a, b in pairs)
    energy = sum(float(np.sum(a**2, dtype=np.float64)) for a, _ in pairs)
    return Loss(tokens=0, error=float(np.sqrt(difference / energy)) if energy else 0.0)


def random_inputs(function: Function, extent: int = 8, seed: int = 0) -> dict[str, Array]:
    """Seeded inputs for every parameter; symbolic sizes become `extent`, brought into their ranges. Integers are 0 or 1."""
    rng = np.random.default_rng(seed)
    values = {d.name: min(max(extent, d.lo), d.hi) for d in function.dims()}
    inputs: dict[str, Array] = {}
    for param in function.params:
        shape = [size.evaluate(s, values) for s in param.shape]
        if dtype(param.dtype).kind == "float":
            inputs[param.attrs["name"]] = rng.standard_normal(shape).astype(np.float32)
        else:
            inputs[param.attrs["name"]] = rng.integers(0, 2, shape)
    return inputs
