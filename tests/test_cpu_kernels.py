"""CPU kernel templates on every ISA variant this machine runs: error bounds against float64, and equal bits over rows and threads.

u = 2^-24. A chain of n roundings errs by at most n*u*sum|terms| to first order; bounds below name the n they use.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.kernel_harness import (
    NAMES,
    Library,
    aligned,
    bf16_rows,
    build,
    linear,
    q8_rows,
    random_weight,
    same_bits,
    source,
)  # fmt: skip
from stemma.backends.cpu.formats import pack_linear, pair_order, q8_row_bytes
from stemma.backends.cpu.formats.plain import bf16_bits, bf16_row, bf16_values
from stemma.backends.cpu.render_templates import render
from stemma.ir import Quantized

U = 2.0**-24
LINEAR = (("int8", "q8_g64"), ("int4_g64", "f32"), ("int4_g64", "q8_g64"))
MATH = ("exp", "log", "tanh", "erf", "sigmoid", "silu", "gelu", "gelu_tanh")
RANGES = {"exp": (-86.5, 88.7), "log": (1e-30, 1e30)}
ULPS = {"exp": 2.0, "log": 2.0, "tanh": 3.0, "erf": 6.0, "sigmoid": 4.0, "silu": 4.0}

ERF = np.vectorize(math.erf)
EXACT: dict[str, Callable[[Any], Any]] = {
    "exp": np.exp, "log": np.log, "tanh": np.tanh, "erf": ERF, "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)), "gelu": lambda x: 0.5 * x * (1 + ERF(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}  # fmt: skip


def elementwise(name: str) -> str:
    """A kernel that applies one math function in vectors, and a scalar copy of the same."""
    return (
        f"namespace {{ [[maybe_unused]] static void math_{name}(Team& team, int64_t n, const float* x, float* y, float* z) {{\n"
        f"  team.parallel(n / 16, [&](int64_t i) {{ store16(y + 16 * i, st_{name}(load16(x + 16 * i)));\n"
        f"    for (int64_t j = 16 * i; j < 16 * i + 16; ++j) z[j] = st_{name}(x[j]); }}); }} }}\n"
    )


EXTRA = r"""
extern "C" void converts(int64_t n, const float* x, uint16_t* b, uint16_t* h, float* from_b, float* from_h, uint16_t* vector_b) {
  for (int64_t i = 0; i < n; ++i) {
    b[i] = st_bf16(x[i]).bits, h[i] = st_f16(x[i]).bits;
    from_b[i] = st_f32(bf16{(uint16_t)i}), from_h[i] = st_f32(f16{(uint16_t)i});
  }
  for (int64_t i = 0; i < n; i += 16) store16((bf16*)vector_b + i, load16(x + i));
}
"""
TEAM_KERNEL = r"""
namespace {
[[maybe_unused]] static void team_rounds(Team& team, int64_t rounds, int64_t chunks, int64_t* counts, int64_t* wrong) {
  for (int64_t i = 0; i < rounds; ++i) {
    team.parallel(chunks, [&](int64_t c) { __atomic_fetch_add(counts + c, 1, __ATOMIC_RELAXED); });
    team.barrier();
    if (team.thread == i % team.threads)
      for (int64_t c = 0; c < chunks; ++c) if (__atomic_load_n(counts + c, __ATOMIC_RELAXED) != i + 1) ++*wrong;
    team.barrier();
  }
}
}
"""


NORMS: dict[str, dict[str, Any]] = {
    "rms": dict(kind="rms", eps=1e-6, weight=True, bias=False, residual=False, output="f32"),
    "gemma": dict(kind="rms", eps=1e-6, weight=True, weight_offset=1.0, bias=False, residual=True, output="f32"),
    "layer": dict(kind="layer", eps=1e-5, weight=True, bias=True, residual=False, output="f32"),
    "rms_q8": dict(kind="rms", eps=1e-6, weight=True, bias=False, residual=False, output="q8_g64"),
    "rms_bf16": dict(kind="rms", eps=1e-6, weight=True, bias=False, residual=False, output="bf16"),
}  # fmt: skip


def text() -> str:
    """Every instantiation that the tests need, as one translation unit."""
    bias = {"epilogue": ["acc = acc + load16(bias + n);", "acc = acc + load16(residual + m * N + n);"]}
    return source(
        [
            TEAM_KERNEL,
            *map(elementwise, MATH),
            *(linear(f"linear_{w}__{a}", w, a) for w, a in LINEAR),
            linear("fused", "bf16", "f32", extras=["const float* bias", "const float* residual"], **bias),
            linear("paired", "int8", "f32", pair=True, output="bf16", epilogue=["acc = st_silu(acc) * acc2;"]),
            *(render("quantize_rows.hpp.j2", name=f"rows_{o}", output=o) for o in ("bf16", "q8_g32", "q8_g64", "q8_g128")),
            *(render("embedding.hpp.j2", name=f"embed_{w}_rows", weight=w, layout="rows", scale=1.5) for w in ("f32", "bf16")),
            *(render("norm.hpp.j2", name=f"norm_{n}", **seams) for n, seams in NORMS.items()),
            *(render("cache_write.hpp.j2", name=f"write_{c}", kv_heads=2, head_dim=24, cache=c) for c in ("f32", "bf16")),
        ],
        EXTRA,
    )


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    return build(text())


@pytest.fixture(params=NAMES)
def library(request: pytest.FixtureRequest, libraries: dict[str, Library]) -> Library:
    return libraries[request.param]


# ---- support ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_team_runs_every_chunk_once_between_barriers(library: Library, threads: int) -> None:
    for chunks in (1, 3, 100):
        counts, wrong = np.zeros(chunks, np.int64), np.zeros(1, np.int64)
        library.call("team_rounds", threads, 50, chunks, counts, wrong)
        assert wrong[0] == 0 and (counts == 50).all()


@pytest.mark.parametrize("name", MATH)
def test_math_error_and_scalar_bits(library: Library, name: str) -> None:
    rng = np.random.default_rng(1)
    low, high = RANGES.get(name, (-12.0, 12.0))
    x = np.exp(rng.uniform(np.log(low), np.log(high), 1 << 14)) if name == "log" else rng.uniform(low, high, 1 << 14)
    if name not in ("log", "exp"):
        x[::2] *= 1e-3
    x = x.astype(np.float32)
    y, z = np.zeros_like(x), np.zeros_like(x)
    library.call(f"math_{name}", 2, x.size, x, y, z)
    assert same_bits(y, z)
    d = x.astype(np.float64)
    exact = EXACT[name](d)
    if name in ULPS:
        assert (np.abs(y - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() <= ULPS[name]
    else:  # 1 + erf cancels for negative x: the error is relative to |x|, not to the result
        assert (np.abs(y - exact) / np.abs(d)).max() <= 8 * U


def test_math_special_values(library: Library) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 200.0, -200.0, 1e-40] * 2, np.float32)
    out = {}
    for name in ("exp", "log", "tanh", "erf", "silu"):
        out[name], z = np.zeros_like(x), np.zeros_like(x)
        library.call(f"math_{name}", 1, x.size, x, out[name], z)
    assert np.array_equal(out["exp"][:7], [np.inf, 0, np.nan, 1, 1, np.inf, 0], equal_nan=True)
    assert np.array_equal(
        out["log"][:7], [np.inf, np.nan, np.nan, -np.inf, -np.inf, np.log(np.float32(200)), np.nan], equal_nan=True
    )
    assert abs(out["log"][7] - np.log(np.float64(x[7]))) < 1e-4
    assert np.array_equal(out["tanh"][:7], [1, -1, np.nan, 0, 0, 1, -1], equal_nan=True)
    assert np.allclose(out["erf"][[0, 1, 3, 5, 6]], [1, -1, 0, 1, -1], rtol=0, atol=2 * U)


def test_converts_are_exact(library: Library) -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    x[: 1 << 12] = rng.standard_normal(1 << 12).astype(np.float32) * np.float32(2.0) ** rng.integers(-26, 17, 1 << 12)
    n = x.size
    b, h, vector = (np.zeros(n, np.uint16) for _ in range(3))
    from_b, from_h = np.zeros(n, np.float32), np.zeros(n, np.float32)
    arrays = [a.ctypes.data for a in (x, b, h, from_b, from_h, vector)]
    library.native.converts(ctypes.c_int64(n), *map(ctypes.c_void_p, arrays))
    every = np.arange(n, dtype=np.uint16)
    assert np.array_equal(b, bf16_bits(x)) and np.array_equal(vector, b)
    assert same_bits(from_b, bf16_values(every))
    assert np.array_equal(from_h, every.view(np.float16).astype(np.float32), equal_nan=True)
    real = ~np.isnan(x)
    with np.errstate(over="ignore"):
        assert np.array_equal(h[real], x[real].astype(np.float16).view(np.uint16))


# ---- linear ----------------------------------------------------------------------------------------------------------


def test_linear_is_independent_of_how_rows_are_split(library: Library) -> None:
    rng = np.random.default_rng(4)
    packed, values = random_weight(rng, 40, 64, "int4_g64")
    x = rng.standard_normal((1100, 64), dtype=np.float32)
    one, eight = np.zeros((1100, 40), np.float32), np.zeros((1100, 40), np.float32)
    library.call("linear_int4_g64__f32", 1, 1100, 40, 64, x, packed, one)
    library.call("linear_int4_g64__f32", 8, 1100, 40, 64, x, packed, eight)
    assert same_bits(one, eight)
    assert (np.abs(one - x.astype(np.float64) @ values.T) <= 70 * U * (np.abs(x) @ np.abs(values).T)).all()


def test_linear_integer_sums_agree_on_every_isa(libraries: dict[str, Library]) -> None:
    rng = np.random.default_rng(5)
    extreme = np.where(rng.random((3, 256)) < 0.5, -127, 127).astype(np.float32)
    for weight in ("int8", "int4_g64"):
        codes = (
            np.where(rng.random((64, 256)) < 0.5, -127, 127).astype(np.int8)
            if weight == "int8"
            else rng.choice([-8, 7], (64, 256)).astype(np.int8)
        )
        scales = np.ones((64, 1 if weight == "int8" else 4), np.float32)
        packed = pack_linear(Quantized(weight, {"codes": codes, "scales": scales}), weight)
        rows, exact = q8_rows(extreme, 64)
        for library in libraries.values():
            y = np.zeros((3, 64), np.float32)
            library.call(f"linear_{weight}__q8_g64", 1, 3, 64, 256, rows, packed, y)
            assert np.array_equal(y, exact @ codes.T.astype(np.float64))  # scales are 1: every sum is an exact integer


def test_linear_epilogue_reads_only_its_columns(library: Library) -> None:
    rng = np.random.default_rng(6)
    n, k = 83, 50
    packed, values = random_weight(rng, n, k, "bf16")
    x, bias = rng.standard_normal((5, k), dtype=np.float32), rng.standard_normal(n, dtype=np.float32)
    y = rng.standard_normal((5, n), dtype=np.float32)
    expected = x.astype(np.float64) @ values.T + bias + y
    guarded = np.full(5 * n + 32, 7.0, np.float32)
    guarded[: 5 * n] = y.reshape(-1)
    library.call("fused", 2, 5, n, k, x, packed, guarded, bias, guarded)
    assert (guarded[5 * n :] == 7).all()
    assert (np.abs(guarded[: 5 * n].reshape(5, n) - expected) <= (k + 3) * U * (np.abs(x) @ np.abs(values).T + 8)).all()


def test_linear_pair(library: Library) -> None:
    rng = np.random.default_rng(7)
    f, k = 48, 90
    codes, scales = rng.integers(-127, 128, (2 * f, k), dtype=np.int8), rng.uniform(0.5, 1.5, 2 * f).astype(np.float32) / 1000
    order = pair_order(f)
    packed = pack_linear(Quantized("int8", {"codes": codes, "scales": scales[:, None]})[order], "int8")
    x = rng.standard_normal((3, k), dtype=np.float32)
    y = np.zeros((3, f), np.uint16)
    library.call("paired", 2, 3, 2 * f, k, x, packed, y)
    z = x.astype(np.float64) @ (codes * scales[:, None].astype(np.float64)).T
    gate, up = z[:, :f], z[:, f:]
    expected = gate / (1 + np.exp(-gate)) * up
    assert (np.abs(bf16_values(y) - expected) <= 2.0**-8 * np.abs(expected) + 1e-5).all()  # bf16 keeps 8 bits
    with pytest.raises(ValueError, match="multiple of 16"):
        pair_order(40)


# ---- rows, embedding, norm, cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 65, 1000, 2048, 2500])
def test_quantize_rows(library: Library, k: int) -> None:
    x = np.random.default_rng(8).standard_normal((5, k), dtype=np.float32)
    x[2] = 0
    for group in (32, 64, 128):
        y, (expected, _) = aligned((5, q8_row_bytes(k, group)), np.uint8), q8_rows(x, group)
        library.call(f"rows_q8_g{group}", 2, 5, k, x, y)
        assert np.array_equal(y, expected)
    b = np.full((5, bf16_row(k)), 9, np.uint16)
    library.call("rows_bf16", 2, 5, k, x, b)
    assert np.array_equal(b, bf16_rows(x)[0])


@pytest.mark.parametrize("weight", ["f32", "bf16"])
def test_embedding(library: Library, weight: str) -> None:
    rng = np.random.default_rng(9)
    vocab, k = 130, 37
    _, values = random_weight(rng, vocab, k, weight)
    packed = values.astype(np.float32) if weight == "f32" else bf16_bits(values.astype(np.float32))
    tokens = np.array([0, 129, 64, -1, 63, 130], np.int32)
    y = np.full((6, k), np.nan, np.float32)
    library.call(f"embed_{weight}_rows", 2, 6, vocab, k, tokens, packed, y)
    assert not y[[3, 5]].any()
    known = [0, 1, 2, 4]
    assert (np.abs(y[known] - 1.5 * values[tokens[known]]) <= 2 * U * np.abs(y[known])).all()


@pytest.mark.parametrize("name", NORMS)
def test_norm(library: Library, name: str) -> None:
    rng = np.random.default_rng(10)
    seams = NORMS[name]
    for d in (1, 15, 64, 130, 1000):
        x = rng.standard_normal((7, d), dtype=np.float32) + np.float32(0.5)
        w, b, other = (rng.standard_normal(s, dtype=np.float32) for s in (d, d, (7, d)))
        total, out = np.zeros_like(x), np.full_like(x, np.nan)
        packed = aligned((7, q8_row_bytes(d, 64)), np.uint8) if name == "rms_q8" else np.zeros((7, bf16_row(d)), np.uint16)
        y = out if seams["output"] == "f32" else packed
        extra = ([other, total] if seams["residual"] else []) + ([w] if seams["weight"] else []) + ([b] if seams["bias"] else [])
        library.call(f"norm_{name}", 2, 7, 1, d, x, d, *extra, y, d)
        v = x.astype(np.float64)
        if seams["residual"]:
            assert same_bits(total, x + other)
            v = total.astype(np.float64)
        mean = v.mean(1, keepdims=True) if seams["kind"] == "layer" else 0.0
        expected = (v - mean) / np.sqrt(((v - mean) ** 2).mean(1, keepdims=True) + float(str(seams["eps"])))
        expected = expected * (w.astype(np.float64) + float(str(seams.get("weight_offset", 0.0)))) + (b if seams["bias"] else 0.0)
        if seams["output"] == "f32":
            # (d/64 + 12) roundings in the sums, a few in the tail; layer: the mean's error against |v|, times 1/deviation
            scale = np.abs(expected) + (
                np.abs(w) * np.abs(v).max() / np.maximum(v.std(1, keepdims=True), 1e-3) + np.abs(b)
                if seams["kind"] == "layer"
                else 0
            )
            assert (np.abs(out - expected) <= (d / 64 + 16) * U * scale).all()
        elif name == "rms_q8":
            reference = np.zeros((7, d), np.float32)
            library.call("norm_rms", 1, 7, 1, d, x, d, w, reference, d)
            assert np.array_equal(packed, q8_rows(reference, 64)[0])
        else:
            assert (np.abs(bf16_values(packed[:, :d]) - expected) <= 2.0**-8 * np.abs(expected)).all()


def test_norm_of_heads_inside_a_wider_row(library: Library) -> None:
    rng = np.random.default_rng(11)
    x, w = rng.standard_normal((4, 100), dtype=np.float32), rng.standard_normal(24, dtype=np.float32)
    alone, before = np.zeros((4, 3, 24), np.float32), x.copy()
    library.call("norm_rms", 1, 12, 1, 24, np.ascontiguousarray(x[:, :72]), 24, w, alone, 24)
    library.call("norm_rms", 2, 4, 3, 24, x, 100, w, x, 100)  # in place
    assert same_bits(x[:, :72], alone.reshape(4, 72)) and same_bits(x[:, 72:], before[:, 72:])


def test_cache_write(library: Library) -> None:
    rng = np.random.default_rng(12)
    x, slot = rng.standard_normal((5, 60), dtype=np.float32), np.array([3, -1, 0, 9, 8], np.int32)
    f, b = np.zeros((2, 9, 24), np.float32), np.zeros((2, 9, 24), np.uint16)
    library.call("write_f32", 2, 5, 9, x, 60, 24, 0, slot, f)
    library.call("write_bf16", 2, 5, 9, x, 60, 24, 0, slot, b)
    expected = np.zeros((2, 9, 24), np.float32)
    for r in (0, 2, 4):
        expected[:, slot[r]] = x[r, :48].reshape(2, 24)
    assert np.array_equal(f, expected) and np.array_equal(b, bf16_bits(expected))
