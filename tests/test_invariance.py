"""Bits do not depend on the batch, the threads or the chunking: every number format, every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import stemma
from stemma.backends.cpu.toolchain import machine_variants
from stemma.codegen.build import build
from stemma.frontend.hf import trace_checkpoint
from stemma.ir import Module, WeightStore, interpret
from stemma.passes.base import Pass, PassContext
from stemma.passes.manager import run_pipeline
from stemma.passes.pipelines import pipeline
from stemma.passes.quantize import Quantize, RoundActivations
from stemma.runtime.session import Session
from tests.conftest import Artifacts
from tests.helpers import decoding
from tests.models import VOCABULARY

FORMATS: dict[str, tuple[str, tuple[Pass, ...]]] = {  # type of the checkpoint, lossy passes
    "f32": ("f32", ()),
    "bf16": ("bf16", ()),
    "bf16 both": ("bf16", (RoundActivations(dtype="bf16"),)),
    "int8": ("bf16", (Quantize(bits=8),)),
    "int8 both": ("bf16", (Quantize(bits=8), RoundActivations(dtype="int8"))),
    "int4": ("bf16", (Quantize(bits=4),)),
    "int4 int8": ("bf16", (Quantize(bits=4, group=32), RoundActivations(dtype="int8"))),
}
LENGTHS = (1, 2, 5, 17, 70)  # around the rows of a register tile, the switch to matrix products, a block of 64 keys
SAMPLED: dict[str, Any] = {
    "max_new_tokens": 12, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3,
    "ignore_eos": True,
}  # fmt: skip
Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def make(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(artifact, module before the step was derived, weights) of a format, made once."""
    folder = tmp_path_factory.mktemp("formats")

    @cache
    def traced(stored: str) -> tuple[Module, WeightStore]:
        return trace_checkpoint(artifacts.checkpoint("llama", stored, intermediate_size=192))

    @cache
    def made(name: str) -> tuple[Path, Module, WeightStore]:
        stored, lossy = FORMATS[name]
        module, weights = traced(stored)
        steps = pipeline("exact", lossy, causal=True, rows=64)
        split = [s.name for s in steps].index("incremental")
        context = PassContext(weights=weights)
        plain = run_pipeline(module, steps[:split], context).module
        path = folder / f"{name}.stemma"
        module = decoding(run_pipeline(plain, steps[split:], context).module)
        build(module, weights, path, variants=machine_variants())
        return path, plain, weights

    yield made


def prompts() -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, n) for n in LENGTHS]


def same(a: Logits, b: Logits) -> None:
    """Equal bits: also the sign of zero and of NaN."""
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def together(model: stemma.Model, ids: list[NDArray[np.int64]], new: list[int]) -> Iterator[Logits]:
    """Last logits of prompts of different lengths that run as one batch; then those after one more token each."""
    session = Session(model.step, len(ids), max(map(len, ids)) + 1)
    lengths = [len(p) for p in ids]
    sequence, positions = np.repeat(np.arange(len(ids)), lengths), np.concatenate([np.arange(n) for n in lengths])
    flat, ends = np.concatenate(ids).astype(np.int32), np.cumsum(lengths) - 1
    rows = np.zeros((len(ids), VOCABULARY), np.float32)
    for start in range(0, flat.size, session.positions.size):
        part = slice(start, start + session.positions.size)
        session.fill(flat[part], sequence[part], positions[part])
        done = [i for i, end in enumerate(ends) if start <= end < start + session.positions.size]
        session.selected[: len(done)] = ends[done] - start
        session.run(flat[part].size, len(done))
        rows[done] = session.logits[: len(done)]
    yield rows
    session.fill(np.array(new, np.int32), np.arange(len(ids)), np.array(lengths))
    session.selected[: len(ids)] = np.arange(len(ids))
    session.run(len(ids), len(ids))
    yield session.logits[: len(ids)].copy()
    session.close()


@pytest.mark.parametrize("variant", machine_variants())
@pytest.mark.parametrize("name", FORMATS)
def test_bits(make: Any, name: str, variant: str) -> None:
    path, _, _ = make(name)
    ids, rng = prompts(), np.random.default_rng(1)
    with stemma.load(path, threads=1, variant=variant) as one, stemma.load(path, threads=2, variant=variant) as two:
        assert one.variant == variant and (one.threads, two.threads) == (1, 2)
        alone = [one.forward(p[None])[0] for p in ids]
        for p, wanted in zip(ids, alone, strict=True):
            batch = rng.integers(0, VOCABULARY, (7, len(p)))
            batch[3] = p
            for model in (one, two):
                same(model.forward(batch)[3], wanted)
                same(model.forward(p[None], rows=1)[0], wanted)
                same(model.forward(p[None], rows=5)[0], wanted)
            same(two.forward(p[None])[0], wanted)
            same(one.forward(p[None, : len(p) // 2 + 1])[0], wanted[: len(p) // 2 + 1])  # later tokens change nothing before
        new = rng.integers(0, VOCABULARY, len(ids)).tolist()
        longer = np.stack([one.forward(np.append(p, t)[None])[0, -1] for p, t in zip(ids, new, strict=True)])
        for model in (one, two):
            prefilled, decoded = together(model, ids, new)
            same(prefilled, np.stack([a[-1] for a in alone]))
            same(decoded, longer)


@pytest.mark.parametrize("name", FORMATS)
def test_sampled_tokens(make: Any, name: str) -> None:
    """Sampling alone, in batches, with threads: the same tokens. So with every instruction set, where nothing is rounded."""
    path, _, _ = make(name)
    ids = [p.tolist() for p in prompts()]
    chosen = []
    for variant in machine_variants():
        with stemma.load(path, threads=1, variant=variant) as one, stemma.load(path, threads=2, variant=variant) as two:
            alone = [one.generate_ids(p, **SAMPLED) for p in ids]
            assert one.generate_ids(ids, **SAMPLED) == alone
            assert two.generate_ids(ids, batch_size=3, **SAMPLED) == alone
            assert [two.generate_ids(p, **SAMPLED) for p in ids] == alone
            chosen.append(alone)
    if not any(isinstance(p, RoundActivations) for p in FORMATS[name][1]):
        assert all(c == chosen[0] for c in chosen)


@pytest.mark.parametrize("name", FORMATS)
def test_accuracy(make: Any, name: str) -> None:
    """Every instruction set against the interpreter in float64 on the same quantized module.

    A rounded activation may fall on the other side of a tie than in float64; from there on the row, and those that attend to it,
    differ by as much as rounding itself costs. So those formats are compared on many sequences of two tokens, most without a tie.
    """
    path, plain, weights = make(name)
    rounded = any(isinstance(p, RoundActivations) for p in FORMATS[name][1])
    ids = prompts()[-1].reshape((-1, 2) if rounded else (1, -1))
    wanted = interpret(plain["forward"], [ids], weights)["logits"]
    for variant in machine_variants():
        with stemma.load(path, variant=variant) as model:
            got = model.forward(ids)
        rows = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert np.median(rows) <= 2e-6, (variant, rows)
        assert rows.max() <= (5e-2 if rounded else 5e-6), (variant, rows)
