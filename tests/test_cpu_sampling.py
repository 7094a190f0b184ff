"""Native sampling against its definition in numpy, with the same token on every ISA variant."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from benchmarks.kernel_harness import NAMES, Library, build, same_bits, source
from stemma.backends.cpu.render_templates import render
from stemma.ir.ops.choose import gumbel_noise

EXTRA = r"""
extern "C" int32_t sample_token(const float* logits, int64_t vocab, const StemmaSampling* p, const int32_t* history, int64_t n,
                                void* work) {
  return sample(logits, vocab, p, history, n, work);
}
extern "C" void noise_of(int64_t blocks, const StemmaSampling* p, float* out) {
  alignas(64) uint32_t bits[64];
  for (int64_t i = 0; i < blocks; ++i) {
    sampling::draw(i, p, bits);
    for (int u = 0; u < 64; u += 16) store16(out + 64 * i + u, sampling::gumbel(unsigned_of(load16i(bits + u))));
  }
}
"""


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    return build(source([], render("sampling.hpp.j2") + EXTRA))


class Sampling(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("min_p", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float), ("presence_penalty", ctypes.c_float),
        ("top_k", ctypes.c_int32), ("seed", ctypes.c_uint64),
        ("sequence", ctypes.c_uint64), ("position", ctypes.c_uint64),
    ]  # fmt: skip


def settings_of(**fields: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "top_k": 0, **fields})


def noise(vocab: int, p: Sampling) -> Any:
    """The noise of every token in float64, by its definition."""
    return gumbel_noise(p.seed, p.sequence, p.position, vocab)


def scores(logits: Any, p: Sampling, history: Any) -> Any:
    """Reference: the filtered, noisy scores of every token (-inf: filtered out), straight from the definition."""
    x = logits.copy()
    if p.repetition_penalty not in (0.0, 1.0):
        penalty = np.float32(p.repetition_penalty)
        for t in set(history.tolist()):
            x[t] = logits[t] / penalty if logits[t] > 0 else logits[t] * penalty
    if p.presence_penalty:
        for t in set(history.tolist()):
            x[t] -= np.float32(p.presence_penalty)
    if p.temperature == 0:
        return x.astype(np.float64)
    x = (x / np.float32(p.temperature)).astype(np.float64)
    keep = np.isfinite(x)
    if 0 < p.top_k < x.size:
        keep &= x >= np.sort(x)[-p.top_k]
    if 0 < p.top_p < 1:
        mass = np.where(keep, np.exp(x - x.max()), 0.0)
        values, inverse = np.unique(x, return_inverse=True)
        each = np.bincount(inverse, mass)
        keep &= (each[::-1].cumsum()[::-1] - each)[inverse] / mass.sum() < p.top_p
    if p.min_p > 0:
        keep &= x >= x.max() + np.log(p.min_p)
    return np.where(keep, x + noise(x.size, p), -np.inf)


def draw(library: Library, logits: Any, p: Sampling, history: Any) -> int:
    work = np.zeros((logits.size + 64) * 2, np.float32)
    pointer = [ctypes.c_void_p(a.ctypes.data) for a in (logits, history, work)]
    size, count = ctypes.c_int64(logits.size), ctypes.c_int64(history.size)
    return int(library.native.sample_token(pointer[0], size, ctypes.byref(p), pointer[1], count, pointer[2]))


def test_noise_is_exact_and_equal_on_every_isa(libraries: dict[str, Library]) -> None:
    p = settings_of(seed=0x123456789ABCDEF0, sequence=0xFEDCBA9876543210, position=77)
    seen = []
    for library in libraries.values():
        out = np.zeros(64 * 500, np.float32)
        library.native.noise_of(ctypes.c_int64(500), ctypes.byref(p), ctypes.c_void_p(out.ctypes.data))
        seen.append(out)
        assert np.abs(out - noise(out.size, p)).max() < 4e-6  # at most 2^-18 at 16
    assert all(same_bits(seen[0], other) for other in seen)


FILTERS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.7}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.1}, {"min_p": 0.05}, 
    {"top_k": 5000, "top_p": 0.95},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3, "repetition_penalty": 1.2}, {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5}, {"presence_penalty": 0.7},
    {"presence_penalty": 0.7, "repetition_penalty": 1.3, "temperature": 0.8}, {"top_p": 0.9999, "temperature": 5.0},
)  # fmt: skip


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_sampling_follows_its_definition(libraries: dict[str, Library], fields: dict[str, Any]) -> None:
    rng = np.random.default_rng(16)
    decided = 0
    for vocab in (1, 5, 64, 1000, 30011):
        for position in range(6):
            logits = (rng.standard_normal(vocab) * 3).astype(np.float32)
            logits[rng.integers(0, vocab, vocab // 10)] = np.float32(1.25)  # ties
            logits[rng.integers(0, vocab, vocab // 20)] = -np.inf
            logits[0] = 2.0
            history = rng.integers(0, vocab, 20).astype(np.int32)
            p = settings_of(seed=5, sequence=position % 2, position=position, **fields)
            expected = scores(logits, p, history)
            tokens = {draw(library, logits, p, history) for library in libraries.values()}
            assert len(tokens) == 1
            token = tokens.pop()
            top = np.sort(expected)[-2:]
            if p.temperature == 0 or top[-1] - top[0] > 1e-4 or vocab == 1:
                assert token == int(np.argmax(expected))
                decided += 1
            else:
                assert expected[token] >= top[-1] - 1e-4
    assert decided >= 25


def test_sampling_distribution(libraries: dict[str, Library]) -> None:
    """Counted noise draws from the softmax: a chi-squared test at p = 1e-4 over 4000 positions."""
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    library, nothing = libraries[NAMES[0]], np.zeros(0, np.int32)
    counts = np.bincount([draw(library, logits, settings_of(seed=9, position=i), nothing) for i in range(4000)], minlength=5)
    expected = 4000 * np.exp(logits) / np.exp(logits).sum()
    assert ((counts - expected) ** 2 / expected).sum() < 23.5
