"""What the decoding machine calls in a library: row functions, top-k, noise, probabilities. Equal bits on every instruction set and
with any number of threads, and the values of their definitions in numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stemma.backends.cpu.backend import CpuBackend
from stemma.backends.cpu.toolchain import CpuToolchain, machine_variants
from stemma.ir import Array, ops
from stemma.ir.ops.choose import filtered, gumbel_noise
from tests.opcases import BOUNDS
from tests.test_cpu_sampling import Sampling, settings_of

NOTHING = {"name": "nothing", "dims": [], "notes": [], "sizes": [], "body": [], "total": 0, "launches": 1, "low": [], "high": []}
UNIT = 2.0**-23
Run = Callable[[Callable[[Any, int], tuple[Array, ...]]], tuple[Array, ...]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Calls a function with the library and each model in it, and asserts that results are equal to the bit; gives them."""
    path = tmp_path_factory.mktemp("rows") / "rows.so"
    variants = machine_variants()
    CpuToolchain().build(CpuBackend().host(title="no model", kernels=[], functions=[NOTHING]), variants, path)
    library = ctypes.CDLL(str(path))
    library.stemma_open.restype = ctypes.c_void_p
    weights = np.zeros(64, np.uint8)
    opened = {}
    for variant in variants:
        for threads in (1, 2):
            opened[variant, threads] = library.stemma_open(variant.encode(), _at(weights), threads, None, ctypes.c_int64(0))
            assert opened[variant, threads], (variant, threads)

    def on_all(call: Callable[[Any, int], tuple[Array, ...]]) -> tuple[Array, ...]:
        results = {key: call(library, handle) for key, handle in opened.items()}
        first = next(iter(results.values()))
        for key, found in results.items():
            for a, b in zip(first, found, strict=True):
                assert a.tobytes() == b.tobytes(), key
        return first

    yield on_all
    for handle in opened.values():
        library.stemma_close(ctypes.c_void_p(handle))


def _at(x: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def _row_function(kind: int, x: Array, in_place: bool) -> Callable[[Any, int], tuple[Array, ...]]:
    def call(library: Any, handle: int) -> tuple[Array, ...]:
        given = x.copy()
        y = given if in_place else np.full_like(x, np.nan)
        rows, n = (ctypes.c_int64(s) for s in x.shape)
        library.stemma_rows(ctypes.c_void_p(handle), ctypes.c_int32(kind), _at(given), rows, n, _at(y))
        return (y,)

    return call


SHAPES = ((1, 1), (3, 17), (1, 4096), (2, 4097), (1, 70001), (40, 4100))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["exp", "log", "softmax"])
def test_rows(run: Run, kind: str, shape: tuple[int, int]) -> None:
    """Short rows, and long ones that threads share."""
    x = (np.random.default_rng(shape).standard_normal(shape) * 8).astype(np.float32)
    x = np.abs(x) + np.float32(1e-30) if kind == "log" else x
    wide = x.astype(np.float64)
    number = ["exp", "log", "softmax"].index(kind)
    (found,), (again,) = run(_row_function(number, x, False)), run(_row_function(number, x, True))
    np.testing.assert_array_equal(found, again)
    if kind == "softmax":
        e = np.exp(wide - wide.max(1, keepdims=True))
        wanted, bound = e / e.sum(1, keepdims=True), 4 * BOUNDS["softmax"].units  # wider: |x - max| is up to 60 here, not 8
    else:
        wanted, bound = (np.exp if kind == "exp" else np.log)(wide), BOUNDS[kind].units
    assert (np.abs(found - wanted) <= bound * UNIT * np.abs(wanted)).all()


def test_ends_of_the_functions(run: Run) -> None:
    x = np.array([[0.0, -np.inf, np.inf, -200.0, 200.0, 1.0, -0.0]], np.float32)
    (found,) = run(_row_function(0, x, False))
    np.testing.assert_array_equal(found[0, [0, 1, 2, 3, 4, 6]], [1, 0, np.inf, 0, np.inf, 1])
    (found,) = run(_row_function(1, x[:, [0, 2, 5]], False))
    np.testing.assert_array_equal(found[0], [-np.inf, np.inf, 0])
    (found,) = run(_row_function(2, np.array([[1.0, -np.inf, 1.0]], np.float32), False))
    np.testing.assert_array_equal(found[0], [0.5, 0, 0.5])


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 5, 1), (2, 3, 5), (7, 129, 129), (1, 70001, 50), (64, 2000, 8), (3, 40000, 300)])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k(run: Run, rows: int, n: int, k: int, ties: bool) -> None:
    """The largest first, of equal ones the lower index; short rows are filled up."""
    x = np.random.default_rng([rows, n, k]).standard_normal((rows, n)).astype(np.float32)
    if ties:
        x = (np.round(x * 2) / 2).astype(np.float32)
        x[:, ::3] = -np.inf

    def call(library: Any, handle: int) -> tuple[Array, ...]:
        values, indices = np.full((rows, k), np.nan, np.float32), np.full((rows, k), -7, np.int32)
        sizes = [ctypes.c_int64(s) for s in (rows, n, k)]
        library.stemma_top_k(ctypes.c_void_p(handle), _at(x), *sizes, _at(values), _at(indices))
        return values, indices

    for found, wanted in zip(run(call), ops.OPS["top_k"].evaluate(None, x, k=k), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("count", [1, 63, 64, 1000, 70001])
def test_noise(run: Run, count: int) -> None:
    p = settings_of(seed=0xFEDCBA9876543210, sequence=0x123456789ABCDEF0, position=321)

    def call(library: Any, handle: int) -> tuple[Array, ...]:
        out = np.full(count + 1, np.nan, np.float32)
        library.stemma_noise(ctypes.c_void_p(handle), ctypes.byref(p), _at(out), ctypes.c_int64(count))
        return (out,)

    (found,) = run(call)
    assert np.isnan(found[count])  # nothing is written after the end
    assert np.abs(found[:count] - gumbel_noise(p.seed, p.sequence, p.position, count)).max() < 4e-6


FILTERS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
)  # fmt: skip


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 100, 30011])
def test_probabilities(run: Run, vocab: int, fields: dict[str, Any]) -> None:
    """The softmax of what is left by the filters; 0 for what they leave out."""
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal(vocab) * 3).astype(np.float32)
    history = rng.integers(0, vocab, 30).astype(np.int32)
    p = settings_of(**fields)
    (found,) = run(_probabilities(logits, history, p))
    x = filtered(logits, history, p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty)
    wanted = np.exp(x - x.max())
    wanted /= wanted.sum()
    np.testing.assert_array_equal(found[:vocab] > 0, wanted > 0)
    np.testing.assert_allclose(found[:vocab], wanted, rtol=1e-5, atol=0)
    assert found[vocab] == 0


def test_no_token_has_a_probability(run: Run) -> None:
    (found,) = run(_probabilities(np.full(9, -np.inf, np.float32), np.zeros(0, np.int32), settings_of()))
    assert found[9] == 1


def _probabilities(logits: Array, history: Array, p: Sampling) -> Callable[[Any, int], tuple[Array, ...]]:
    """Probabilities, then what the function returns: 1 when there are none."""

    def call(library: Any, handle: int) -> tuple[Array, ...]:
        out = np.zeros(logits.size + 1, np.float32)
        sizes = [ctypes.c_int64(a.size) for a in (logits, history)]
        out[-1] = library.stemma_probabilities(
            ctypes.c_void_p(handle), _at(logits), sizes[0], ctypes.byref(p), _at(history), sizes[1], _at(out)
        )
        return (out,)

    return call
