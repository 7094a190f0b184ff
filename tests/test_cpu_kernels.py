"""CPU kernel templates on every ISA variant this machine runs: error bounds against float64, and equal bits over rows and threads.

u = 2^-24. A chain of n roundings errs by at most n*u*sum|terms| to first order; bounds below name the n they use.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_harness import (
    VARIANTS, Library, activations, aligned, bf16_rows, q8_rows, random_weight, source, supported,
)  # fmt: skip
from stemma.backends.cpu import pack
from stemma.backends.cpu.render_templates import render

U = 2.0**-24
LINEAR = (
    ("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("int8", "f32"), ("int8", "q8_g64"),
    ("int4_g64", "f32"), ("int4_g64", "q8_g64"), ("int4_g128", "q8_g32"),
)  # fmt: skip
EMBEDDINGS = (("f32", "panel"), ("bf16", "panel"), ("int8", "panel"), ("int4_g32", "panel"), ("f32", "rows"), ("bf16", "rows"))
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
extern "C" int32_t sample_token(const float* logits, int64_t vocab, const StemmaSampling* p, const int32_t* history, int64_t n, void* work) {
  return sample(logits, vocab, p, history, n, work);
}
extern "C" void noise_of(int64_t blocks, const StemmaSampling* p, float* out) {
  alignas(64) uint32_t bits[64];
  for (int64_t i = 0; i < blocks; ++i) {
    sampling::draw(i, p, bits);
    for (int u = 0; u < 64; u += 16) store16(out + 64 * i + u, sampling::gumbel(unsigned_of(load16i(bits + u))));
  }
}
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


def attention(name: str, **seams: Any) -> str:
    return render("attention.hpp.j2", **{"name": name, "window": None, "soft_cap": None, **seams})


CACHED = {
    "gqa": dict(heads=8, kv_heads=2, head_dim=64, scale=0.125, cache="f32"),
    "mha_odd": dict(heads=3, kv_heads=3, head_dim=40, scale=0.2, cache="bf16", window=70, soft_cap=20.0),
    "wide": dict(heads=2, kv_heads=1, head_dim=256, scale=0.0625, cache="bf16"),
}  # fmt: skip
FULL = {
    "causal": dict(heads=4, kv_heads=2, head_dim=32, scale=0.25, causal=True, bias=False, window=20, causal_offset="S - T"),
    "biased": dict(heads=4, kv_heads=4, head_dim=24, scale=0.25, causal=False, bias=True),
}  # fmt: skip
NORMS = {
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
            *(render("linear.hpp.j2", name=f"linear_{w}__{a}", weight=w, activation=a) for w, a in LINEAR),
            render("linear.hpp.j2", name="fused", weight="bf16", activation="f32", extras=["const float* bias", "const float* residual"], **bias),
            render("linear.hpp.j2", name="paired", weight="int8", activation="f32", pair=True, output="bf16", epilogue=["acc = st_silu(acc) * acc2;"]),
            *(render("quantize_rows.hpp.j2", name=f"rows_{o}", output=o) for o in ("bf16", "q8_g32", "q8_g64", "q8_g128")),
            *(render("embedding.hpp.j2", name=f"embed_{w}_{x}", weight=w, layout=x, scale=1.5) for w, x in EMBEDDINGS),
            *(render("norm.hpp.j2", name=f"norm_{n}", **seams) for n, seams in NORMS.items()),
            *(render("cache_write.hpp.j2", name=f"write_{c}", kv_heads=2, head_dim=24, cache=c) for c in ("f32", "bf16")),
            *(attention(f"cached_{n}", variant="cached", **seams) for n, seams in CACHED.items()),
            *(attention(f"full_{n}", variant="full", **seams) for n, seams in FULL.items()),
        ],
        render("sampling.hpp.j2") + EXTRA,
    )


NAMES = [v for v in VARIANTS if supported(v)]


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    """One library per variant, compiled together."""
    cpp = text()
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(NAMES, threads.map(lambda v: Library(cpp, v), NAMES), strict=True))


@pytest.fixture(params=NAMES)
def library(request: pytest.FixtureRequest, libraries: dict[str, Library]) -> Library:
    return libraries[request.param]


def same_bits(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)))


# ---- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pack_round_trip(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["f32", "bf16", "int8", "int4_g32", "int4_g64", "int4_g128"]))
    n, k = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    scales: Any = None
    weight: Any
    if format == "f32":
        weight = rng.standard_normal((n, k), dtype=np.float32)
    elif format == "bf16":
        weight = rng.integers(0, 1 << 16, (n, k), dtype=np.uint16)
    elif format == "int8":
        weight, scales = rng.integers(-127, 128, (n, k), dtype=np.int8), rng.random(n, dtype=np.float32)
    else:
        group = pack.weight_group(format)
        k = group * (k % 3 + 1)
        weight, scales = rng.integers(-8, 8, (n, k), dtype=np.int8), rng.random((n, k // group)).astype(np.float16)
    packed = pack.pack_linear(weight, format, scales)
    assert packed.nbytes == pack.linear_bytes(n, k, format)
    back, back_scales = pack.unpack_linear(packed, n, k, format)
    assert back.dtype == weight.dtype and np.array_equal(back, weight)
    assert (scales is None) == (back_scales is None) and (scales is None or np.array_equal(scales, back_scales))


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        pack.pack_linear(np.zeros((4, 96), np.int8), "int4_g64", np.zeros((4, 1), np.float16))
    with pytest.raises(ValueError, match="unknown packed weight format"):
        pack.linear_bytes(1, 1, "int5")
    with pytest.raises(ValueError, match="scales of shape"):
        pack.pack_linear(np.zeros((4, 64), np.int8), "int8", np.zeros(5, np.float32))


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
    assert np.array_equal(out["log"][:7], [np.inf, np.nan, np.nan, -np.inf, -np.inf, np.log(np.float32(200)), np.nan], equal_nan=True)
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
    assert np.array_equal(b, pack.bf16_bits(x)) and np.array_equal(vector, b)
    assert same_bits(from_b, pack.bf16_values(every))
    assert np.array_equal(from_h, every.view(np.float16).astype(np.float32), equal_nan=True)
    real = ~np.isnan(x)
    with np.errstate(over="ignore"):
        assert np.array_equal(h[real], x[real].astype(np.float16).view(np.uint16))


# ---- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "activation"), LINEAR)
def test_linear(library: Library, weight: str, activation: str) -> None:
    rng = np.random.default_rng(3)
    shapes = [(n, 128) for n in (1, 63, 65, 100)]
    shapes += [(20, 1024), (7, 16384)] if weight.startswith("int4") else [(20, 1), (65, 7), (20, 130), (70, 2049), (7, 6150)]
    for n, k in shapes:  # the last is more than one block of K
        packed, values = random_weight(rng, n, k, weight)
        x = rng.standard_normal((64, k), dtype=np.float32)
        whole = np.zeros((64, n), np.float32)
        rows, exact = activations(x, activation)
        library.call(f"linear_{weight}__{activation}", 2, 64, n, k, rows, packed, whole)
        # a rounding per product-sum (per group of exact integer dots), and of scale, conversion and total
        group = int(activation[4:]) if activation.startswith("q8") else 1
        bound = (k / group + 5) * U * (np.abs(exact) @ np.abs(values).T) + 1e-37
        assert (np.abs(whole - exact @ values.T) <= bound).all()
        for m, threads in ((1, 1), (1, 2), (2, 2), (7, 1), (13, 2), (64, 1)):
            part = np.full((m, n), np.nan, np.float32)
            library.call(f"linear_{weight}__{activation}", threads, m, n, k, np.ascontiguousarray(rows[64 - m :]), packed, part)
            assert same_bits(part, whole[64 - m :]), (n, k, m, threads)


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
        codes = np.where(rng.random((64, 256)) < 0.5, -127, 127).astype(np.int8) if weight == "int8" else rng.choice([-8, 7], (64, 256)).astype(np.int8)
        scales = np.ones(64, np.float32) if weight == "int8" else np.ones((64, 4), np.float16)
        packed = pack.pack_linear(codes, weight, scales)
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
    order = pack.pair_order(f)
    packed = pack.pack_linear(codes[order], "int8", scales[order])
    x = rng.standard_normal((3, k), dtype=np.float32)
    y = np.zeros((3, f), np.uint16)
    library.call("paired", 2, 3, 2 * f, k, x, packed, y)
    z = x.astype(np.float64) @ (codes * scales[:, None].astype(np.float64)).T
    gate, up = z[:, :f], z[:, f:]
    expected = gate / (1 + np.exp(-gate)) * up
    assert (np.abs(pack.bf16_values(y) - expected) <= 2.0**-8 * np.abs(expected) + 1e-5).all()  # bf16 keeps 8 bits
    with pytest.raises(ValueError, match="multiple of 16"):
        pack.pair_order(40)


# ---- rows, embedding, norm, cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 65, 1000, 2048, 2500])
def test_quantize_rows(library: Library, k: int) -> None:
    x = np.random.default_rng(8).standard_normal((5, k), dtype=np.float32)
    x[2] = 0
    for group in (32, 64, 128):
        y, (expected, _) = aligned((5, pack.q8_row_bytes(k, group)), np.uint8), q8_rows(x, group)
        library.call(f"rows_q8_g{group}", 2, 5, k, x, y)
        assert np.array_equal(y, expected)
    b = np.full((5, pack.bf16_row(k)), 9, np.uint16)
    library.call("rows_bf16", 2, 5, k, x, b)
    assert np.array_equal(b, bf16_rows(x)[0])


@pytest.mark.parametrize(("weight", "layout"), EMBEDDINGS)
def test_embedding(library: Library, weight: str, layout: str) -> None:
    rng = np.random.default_rng(9)
    vocab, k = 130, 96 if weight.startswith("int4") else 37
    packed, values = random_weight(rng, vocab, k, weight)
    if layout == "rows":
        packed = values.astype(np.float32) if weight == "f32" else pack.bf16_bits(values.astype(np.float32))
    tokens = np.array([0, 129, 64, -1, 63, 130], np.int32)
    y = np.full((6, k), np.nan, np.float32)
    library.call(f"embed_{weight}_{layout}", 2, 6, vocab, k, tokens, packed, y)
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
        packed = aligned((7, pack.q8_row_bytes(d, 64)), np.uint8) if name == "rms_q8" else np.zeros((7, pack.bf16_row(d)), np.uint16)
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
            scale = np.abs(expected) + (np.abs(w) * np.abs(v).max() / np.maximum(v.std(1, keepdims=True), 1e-3) + np.abs(b) if seams["kind"] == "layer" else 0)
            assert (np.abs(out - expected) <= (d / 64 + 16) * U * scale).all()
        elif name == "rms_q8":
            reference = np.zeros((7, d), np.float32)
            library.call("norm_rms", 1, 7, 1, d, x, d, w, reference, d)
            assert np.array_equal(packed, q8_rows(reference, 64)[0])
        else:
            assert (np.abs(pack.bf16_values(packed[:, :d]) - expected) <= 2.0**-8 * np.abs(expected)).all()


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
    library.call("write_f32", 2, 5, 9, x, 60, slot, f)
    library.call("write_bf16", 2, 5, 9, x, 60, slot, b)
    expected = np.zeros((2, 9, 24), np.float32)
    for r in (0, 2, 4):
        expected[:, slot[r]] = x[r, :48].reshape(2, 24)
    assert np.array_equal(f, expected) and np.array_equal(b, pack.bf16_bits(expected))


# ---- attention -------------------------------------------------------------------------------------------------------


def softmax_attention(q: Any, k: Any, v: Any, scale: float, soft_cap: float | None, bias: Any) -> tuple[Any, float]:
    """One query over its keys in float64, and a bound on the kernel's error.

    Scores err by (D+3) roundings (and 4 ulp of tanh); weights by their scores' error, 3 ulp of exp and n+8 of the sums.
    """
    s = (k @ q) * scale
    d = (q.size + 3) * U * (np.abs(k) @ np.abs(q)) * scale
    if soft_cap is not None:
        s, d = soft_cap * np.tanh(s / soft_cap), d + 6 * U * soft_cap
    s, d = s + bias, d + 3 * U * (np.abs(s) + np.abs(np.where(np.isinf(bias), 0, bias)))
    if not np.isfinite(s.max(initial=-np.inf)):
        return np.zeros(v.shape[1]), 0.0
    p = np.exp(s - s.max())
    error = (2 * float(d.max()) + (2 * s.size + 20) * U) * float(np.abs(v).max())
    return p / p.sum() @ v, error


@pytest.mark.parametrize("name", CACHED)
def test_attention_cached(library: Library, name: str) -> None:
    seams: dict[str, Any] = CACHED[name]
    rng = np.random.default_rng(13)
    heads, kv, dim, slots, context = seams["heads"], seams["kv_heads"], seams["head_dim"], 400, 200
    k, v = (rng.standard_normal((kv, slots, dim), dtype=np.float32) for _ in range(2))
    if seams["cache"] == "bf16":
        kc, vc = pack.bf16_bits(k), pack.bf16_bits(v)
        k, v = pack.bf16_values(kc), pack.bf16_values(vc)
    else:
        kc, vc = k, v
    table = rng.permutation(slots).astype(np.int32).reshape(2, context)
    positions = np.array([*range(60, 100), -1, 0, 1, 63, 64, 65, 127, 199], np.int32)
    sequence = np.array([0] * 40 + [1, 1, 1, 0, 0, 1, 1, 1], np.int32)
    rows, stride = positions.size, heads * dim + 5
    q = rng.standard_normal((rows, stride), dtype=np.float32)
    y = np.full((rows, heads * dim), np.nan, np.float32)
    library.call(f"cached_{name}", 2, rows, slots, context, q, stride, kc, vc, positions, sequence, table, y)
    window = seams.get("window") or 10**9
    for r in range(rows):
        seen = table[sequence[r], max(0, positions[r] - window + 1) : positions[r] + 1]
        for h in range(heads):
            g = h // (heads // kv)
            got = y[r, h * dim : (h + 1) * dim]
            if not seen.size:
                assert not got.any()
                continue
            query = q[r, h * dim : (h + 1) * dim].astype(np.float64)
            expected, bound = softmax_attention(query, k[g, seen].astype(np.float64), v[g, seen].astype(np.float64), seams["scale"], seams.get("soft_cap"), 0.0)
            assert np.abs(got - expected).max() <= bound
    for r in range(rows):  # each row alone has the same bits
        one = np.full((1, heads * dim), np.nan, np.float32)
        library.call(f"cached_{name}", 1, 1, slots, context, q[r], stride, kc, vc, positions[r:], sequence[r:], table, one)
        assert same_bits(one[0], y[r]), r


def test_attention_ignores_what_other_rows_see(library: Library) -> None:
    """A NaN in a later key, or in a slot that no row sees, must not reach an earlier row of the same tile."""
    rng = np.random.default_rng(14)
    k, v = (rng.standard_normal((2, 128, 64), dtype=np.float32) for _ in range(2))
    table, q = np.arange(128, dtype=np.int32).reshape(1, 128), rng.standard_normal((2, 512), dtype=np.float32)
    positions, sequence = np.array([10, 11], np.int32), np.zeros(2, np.int32)
    clean, dirty = np.zeros((2, 512), np.float32), np.zeros((2, 512), np.float32)
    library.call("cached_gqa", 1, 2, 128, 128, q, 512, k, v, positions, sequence, table, clean)
    k[:, 11:], v[:, 11:] = np.nan, np.nan
    table[0, 12:] = -5
    library.call("cached_gqa", 1, 2, 128, 128, q, 512, k, v, positions, sequence, table, dirty)
    assert same_bits(clean[0], dirty[0]) and np.isnan(dirty[1]).all()


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize(("t", "s"), [(1, 1), (33, 33), (17, 90)])
def test_attention_full(library: Library, name: str, t: int, s: int) -> None:
    seams: dict[str, Any] = FULL[name]
    rng = np.random.default_rng(15)
    batch, heads, kv, dim = 2, seams["heads"], seams["kv_heads"], seams["head_dim"]
    q = rng.standard_normal((batch, t, heads, dim), dtype=np.float32)
    k, v = (rng.standard_normal((batch, kv, s, dim), dtype=np.float32) for _ in range(2))
    y = np.full((batch, t, heads, dim), np.nan, np.float32)
    order = [(0, 2, 1), (0, 1, 2), (0, 1, 2), (0, 2, 1)]
    strides = np.array([a.strides[i] // 4 for a, o in zip((q, k, v, y), order, strict=True) for i in o], np.int64)
    bias = rng.standard_normal((batch, 1, t, s), dtype=np.float32)
    bias[1, 0, 0, :] = -np.inf
    bias[0, 0, :, s // 2 + 1 :] = -np.inf
    extra = [bias, np.array([t * s, 0, s, 1], np.int64)] if seams["bias"] else []
    library.call(f"full_{name}", 2, batch, t, s, q, k, v, y, strides, *extra)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv)
            for i in range(t):
                last = i + s - t if seams["causal"] else s - 1
                low = max(0, last - 19) if seams["causal"] else 0
                added = bias[b, 0, i].astype(np.float64) if seams["bias"] else 0.0
                keys, values = k[b, g, low : last + 1].astype(np.float64), v[b, g, low : last + 1].astype(np.float64)
                expected, bound = softmax_attention(q[b, i, h].astype(np.float64), keys, values, seams["scale"], None, added)
                assert np.abs(y[b, i, h] - expected).max() <= bound


# ---- sampling --------------------------------------------------------------------------------------------------------


class Sampling(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("min_p", ctypes.c_float), ("repetition_penalty", ctypes.c_float),
        ("top_k", ctypes.c_int32), ("seed", ctypes.c_uint64), ("sequence", ctypes.c_uint64), ("position", ctypes.c_uint64),
    ]  # fmt: skip


def settings_of(**fields: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "top_k": 0, **fields})


def philox_gumbel(vocab: int, p: Sampling) -> Any:
    """The noise of every token in float64, from Philox4x32-10 as published."""
    blocks = -(-vocab // 4)
    c = [np.arange(blocks, dtype=np.uint64), *(np.full(blocks, w, np.uint64) for w in (p.position & 0xFFFFFFFF, p.sequence & 0xFFFFFFFF, p.sequence >> 32))]
    key = [p.seed & 0xFFFFFFFF, p.seed >> 32]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(key[0]), b & low, a >> np.uint64(32) ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    u = (np.stack(c, 1).reshape(-1)[:vocab].astype(np.float64) + 0.5) / 2**32
    return -np.log(-np.log(u))


def scores(logits: Any, p: Sampling, history: Any) -> Any:
    """Reference: the filtered, noisy scores of every token (-inf: filtered out), straight from the definition."""
    x = logits.copy()
    if p.repetition_penalty not in (0.0, 1.0):
        penalty = np.float32(p.repetition_penalty)
        for t in set(history.tolist()):
            x[t] = logits[t] / penalty if logits[t] > 0 else logits[t] * penalty
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
    return np.where(keep, x + philox_gumbel(x.size, p), -np.inf)


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
        assert np.abs(out - philox_gumbel(out.size, p)).max() < 4e-6  # at most 2^-18 at 16
    assert all(same_bits(seen[0], other) for other in seen)


FILTERS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.7}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.1}, {"min_p": 0.05}, {"top_k": 5000, "top_p": 0.95},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3, "repetition_penalty": 1.2}, {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5}, {"top_p": 0.9999, "temperature": 5.0},
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
