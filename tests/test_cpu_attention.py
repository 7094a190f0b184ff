"""Attention kernels on every ISA variant: error bounds against float64, and rows that never depend on other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.kernel_harness import NAMES, Library, build, cache_rows, same_bits, source
from stemma.backends.cpu.render_templates import render

U = 2.0**-24


def attention(name: str, **seams: Any) -> str:
    """The rendered kernel, without window and cap unless given."""
    return render("attention.hpp.j2", **{"name": name, "window": None, "soft_cap": None, **seams})


CACHED: dict[str, dict[str, Any]] = {
    "gqa": dict(heads=8, kv_heads=2, head_dim=64, scale=0.125, keys="f32", values="f32"),
    "mha_odd": dict(heads=3, kv_heads=3, head_dim=40, scale=0.2, keys="bf16", values="bf16", window=70, soft_cap=20.0),
    "wide": dict(heads=2, kv_heads=1, head_dim=256, scale=0.0625, keys="bf16", values="bf16"),
    "int8": dict(heads=8, kv_heads=2, head_dim=32, scale=0.2, keys="int8", values="int8", window=70, soft_cap=20.0),
    "int4": dict(heads=3, kv_heads=1, head_dim=96, scale=0.1, keys="uint4_g32", values="uint4_g32"),
    "f16": dict(heads=2, kv_heads=2, head_dim=24, scale=0.2, keys="f16", values="f16"),
}  # fmt: skip
STORED = ("f16", "int8", "uint4_g16", "uint4_g32", "uint4_g64")
FULL: dict[str, dict[str, Any]] = {
    "causal": dict(heads=4, kv_heads=2, head_dim=32, scale=0.25, causal=True, bias=False, window=20, causal_offset="S - T"),
    "biased": dict(heads=4, kv_heads=4, head_dim=24, scale=0.25, causal=False, bias=True),
}  # fmt: skip


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    kernels = [attention(f"cached_{n}", variant="cached", **seams) for n, seams in CACHED.items()]
    kernels += [render("cache_write.hpp.j2", name=f"write_{n}", kv_heads=2, head_dim=64, cache=n) for n in STORED]
    return build(source([*kernels, *(attention(f"full_{n}", variant="full", **seams) for n, seams in FULL.items())]))


@pytest.fixture(params=NAMES)
def library(request: pytest.FixtureRequest, libraries: dict[str, Library]) -> Library:
    return libraries[request.param]


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
    (kc, k), (vc, v) = (cache_rows(rng.standard_normal((kv, slots, dim), dtype=np.float32), seams[n]) for n in ("keys", "values"))
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
            expected, bound = softmax_attention(
                query, k[g, seen].astype(np.float64), v[g, seen].astype(np.float64), seams["scale"], seams.get("soft_cap"), 0.0
            )
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


@pytest.mark.parametrize("shared", range(1, 13))
def test_attention_of_neighbours_that_share_nothing(library: Library, shared: int) -> None:
    """A run of rows leaves what was summed up for the rows after it, whatever share of the vectors of its queries it fills."""
    rng = np.random.default_rng(19)
    k, v = (rng.standard_normal((2, 400, 64), dtype=np.float32) for _ in range(2))
    k[0] *= 30  # large maxima in the head that a thread has first
    table = rng.permutation(400).astype(np.int32).reshape(4, 100)
    rows = shared + 3
    positions, sequence = np.full(rows, 99, np.int32), np.array([0] * shared + [1, 2, 3], np.int32)
    q, y = rng.standard_normal((rows, 512), dtype=np.float32), np.zeros((rows, 512), np.float32)
    library.call("cached_gqa", 1, rows, 400, 100, q, 512, k, v, positions, sequence, table, y)
    for r in range(rows):
        one = np.zeros((1, 512), np.float32)
        library.call("cached_gqa", 1, 1, 400, 100, q[r], 512, k, v, positions[r:], sequence[r:], table, one)
        assert same_bits(one[0], y[r]), r


def tree(context: int, slots: int) -> tuple[Any, Any]:
    """(rows of the table, positions) of tokens in a tree: paths share a prefix, then have slots of their own, as forks do."""
    rng = np.random.default_rng(16)
    free = iter(rng.permutation(slots).astype(np.int32))
    trunk = np.array([next(free) for _ in range(context)], np.int32)
    rows, positions = [], []
    for start, depths in ((70, (0, 1, 1, 2, 2, 3)), (126, (0, 1, 2, 3, 1, 2, 2, 0)), (5, (0, 0, 1))):
        branch: dict[int, Any] = {}
        for depth in depths:
            row = branch.get(depth - 1, trunk).copy()
            row[start + depth :] = -7  # what lies past a row's own position is nobody's
            row[start + depth] = next(free)
            branch[depth] = row
            rows.append(row)
            positions.append(start + depth)
    return np.stack(rows), np.array(positions, np.int32)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("scattered", [False, True])
def test_attention_in_a_tree(library: Library, name: str, scattered: bool) -> None:
    """Rows of different sequences that share slots have the bits of each run alone, and of each over a copied cache."""
    seams: dict[str, Any] = CACHED[name]
    rng = np.random.default_rng(17)
    heads, kv, dim, slots, context = seams["heads"], seams["kv_heads"], seams["head_dim"], 400, 200
    table, positions = tree(context, slots)
    if not scattered:  # the trunk in neighbouring slots, as a session hands them out
        used = np.unique(table[table >= 0])
        order = {int(s): i for i, s in enumerate(dict.fromkeys([*map(int, table[6]), *map(int, used)])) if s >= 0}
        table = np.array([[order[int(s)] + 3 if s >= 0 else -7 for s in row] for row in table], np.int32)
    kc, vc = (cache_rows(rng.standard_normal((kv, slots, dim), dtype=np.float32), seams[n])[0] for n in ("keys", "values"))
    rows = positions.size
    sequence = np.arange(rows, dtype=np.int32)
    q = rng.standard_normal((rows, heads * dim), dtype=np.float32)
    y = np.full((rows, heads * dim), np.nan, np.float32)
    for threads in (1, 2):
        y[:] = np.nan
        library.call(f"cached_{name}", threads, rows, slots, context, q, heads * dim, kc, vc, positions, sequence, table, y)
        for r in range(rows):
            own = np.arange(context, dtype=np.int32)[None]
            length = int(positions[r]) + 1
            ko, vo = (np.zeros((kv, context, c.shape[2]), c.dtype) for c in (kc, vc))
            ko[:, :length], vo[:, :length] = kc[:, table[r, :length]], vc[:, table[r, :length]]
            zero = np.zeros(1, np.int32)
            for cache_k, cache_v, size, where in ((kc, vc, slots, table[r : r + 1].copy()), (ko, vo, context, own)):
                one = np.full((1, heads * dim), np.nan, np.float32)
                library.call(
                    f"cached_{name}", 1, 1, size, context, q[r], heads * dim, cache_k, cache_v, positions[r:], zero, where, one
                )  # fmt: skip
                assert same_bits(one[0], y[r]), r


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


@pytest.mark.parametrize("name", STORED)
def test_cache_write(library: Library, name: str) -> None:
    """The bytes of the format's own rounding, for ordinary and for difficult rows; other slots stay as they are.

    Scales of int4 are fitted by sums, whose order may change the last bit of f16.
    """
    rng = np.random.default_rng(18)
    x = rng.standard_normal((9, 2, 64), dtype=np.float32)
    x[1] = 0
    x[2] = np.abs(x[2]) + 3
    x[3] *= np.float32(1e-6)
    x[4] = np.round(x[4] * 4) / 4  # ties
    x[5, :, 7] = 300
    x[6] *= np.float32(2e4)
    stored, _ = cache_rows(x, name)
    expected = np.full((2, 12, stored.shape[2]), 0xAB, np.uint8)
    slot = np.array([3, 11, 0, 9, 8, -1, 4, 12, 7], np.int32)
    for r in range(9):
        if 0 <= slot[r] < 12:
            expected[:, slot[r]] = stored[r]
    for threads in (1, 2):
        cache = np.full_like(expected, 0xAB)
        rows = np.concatenate([np.zeros((9, 3), np.float32), x.reshape(9, 128)], axis=1)
        library.call(f"write_{name}", threads, 9, 12, rows, 131, 64, 3, slot, cache)
        if name.startswith("uint4"):
            found, wanted = (np.ascontiguousarray(c[:, :, 32:]).view(np.uint16).astype(int) for c in (cache, expected))
            assert np.abs(found - wanted)[..., 0::2].max() <= 1 and np.mean(found == wanted) > 0.9
            assert np.array_equal(found[..., 1::2], wanted[..., 1::2])
            cache[:, :, 32:] = expected[:, :, 32:]
        assert np.array_equal(cache, expected)


@pytest.mark.parametrize("name", ("int8", "uint4_g32"))
@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_cache_write_keeps_nan(library: Library, name: str, bad: float) -> None:
    """A row or a group that is not finite has the scale NaN: it is not silently a number."""
    x, slot = np.ones((1, 128), np.float32), np.zeros(1, np.int32)
    x[0, 40] = bad
    cache = np.zeros((2, 1, cache_rows(np.zeros((1, 64), np.float32), name)[0].shape[1]), np.uint8)
    library.call(f"write_{name}", 1, 1, 1, x, 128, 64, 0, slot, cache)
    sides = cache[0, 0, 64:].view(np.float32) if name == "int8" else cache[0, 0, 32:].view(np.float16)[::2]
    assert np.isnan(sides[-1])
    assert name == "int8" or np.isfinite(sides[0])
