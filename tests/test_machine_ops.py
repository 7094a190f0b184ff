"""Array operations of the native machine, each against its reference on random inputs and at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.codegen.program import TENSOR_OPS
from stemma.ir import Function, ops
from tests.native_ops import native_error, param, results_of, run_function, run_op

INF, NAN = np.inf, np.nan
EDGES = np.array([0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e-30, -3e38, 88.0, -90.0, INF, -INF, NAN, 7.0, 1e6], np.float32)
# Largest error of a result near 1 in units of 2**-23, for those that are not exact.
ULPS = {"exp": 2, "log": 2, "softmax": 24, "pow": 1, "sin": 1, "cos": 1, "tanh": 1, "erf": 1, "sigmoid": 2, "reduce_sum": 16,
        "matmul": 32, "cumsum": 16, "rsqrt": 1, "div": 0}  # fmt: skip


def agree(name: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Results are equal, or within the operation's bound; shapes, types and the places of NaN are."""
    native, reference = both
    assert native.keys() == reference.keys()
    for key, want in reference.items():
        got, want = native[key], np.asarray(want)
        assert got.shape == want.shape and got.dtype == want.dtype, name
        if not ULPS.get(name) or got.dtype != np.float32:
            np.testing.assert_array_equal(got, want, err_msg=name)
            continue
        finite = np.isfinite(want) & (np.abs(want) >= 2.0**-120)
        np.testing.assert_array_equal(got[~np.isfinite(want)], want[~np.isfinite(want)], err_msg=name)
        assert (np.abs(got[~finite & np.isfinite(want)]) < 2.0**-119).all()
        scale = np.abs(want[finite])
        if name in ("softmax", "reduce_sum", "matmul", "cumsum"):
            scale = np.full_like(scale, scale.max(initial=0))
        error = np.abs(got[finite].astype(np.float64) - want[finite])
        assert (error <= (ULPS[name] + 1) * 2.0**-23 * scale).all(), (name, got, want)


def floats(rng: np.random.Generator, *shape: int) -> Any:
    return (rng.standard_normal(shape) * 3).astype(np.float32)


def ints(rng: np.random.Generator, *shape: int, dtype: Any = np.int32) -> Any:
    return rng.integers(-9, 10, shape).astype(dtype)


SHAPES = [
    ((), ()),
    ((5,), (5,)),
    ((40,), ()),
    ((), (40,)),
    ((2, 3), (3,)),
    ((2, 1, 33), (4, 1)),
    ((1,), (2, 2, 2, 2)),
    ((0, 3), (3,)),
]
FLOAT_UNARY = ["exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "erf", "sigmoid", "floor", "ceil", "round"]
ANY_UNARY = ["neg", "abs", "sign"]
BINARY = ["add", "sub", "mul", "floordiv", "mod", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"]


def test_every_tensor_operation_is_tested() -> None:
    text = open(__file__).read()
    assert [name for name in TENSOR_OPS - {"loop", "cond", "get", "param", "constant"} if f'"{name}"' not in text] == []


@pytest.mark.parametrize("name", FLOAT_UNARY + ANY_UNARY)
def test_unary(name: str) -> None:
    rng = np.random.default_rng(1)
    for x in (floats(rng, 3, 17), floats(rng, 5000), np.abs(floats(rng, 70)), EDGES, np.float32(1.5)):
        agree(name, run_op(name, x))
    if name in ANY_UNARY:
        agree(name, run_op(name, np.array([0, -3, 5, -(2**31)], np.int32)))
        agree(name, run_op(name, np.array([0, -3, 5, -(2**63)], np.int64)))


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    rng = np.random.default_rng(2)
    for a, b in SHAPES:
        agree(name, run_op(name, floats(rng, *a), floats(rng, *b)))
        agree(name, run_op(name, ints(rng, *a), ints(rng, *b)))
    agree(name, run_op(name, ints(rng, 3, 20, dtype=np.int64), ints(rng, 20, dtype=np.int64)))
    edges = np.array([0, 1, -1, 7, -7, 2**31 - 1, -(2**31)], np.int32)
    agree(name, run_op(name, edges[:, None], edges))
    some = EDGES if name not in ("floordiv", "mod") else EDGES[np.isfinite(EDGES) & (np.abs(EDGES) < 1e5)]
    agree(name, run_op(name, some[:, None], some))


@pytest.mark.parametrize("name", ["div", "pow"])
def test_binary_floats(name: str) -> None:
    rng = np.random.default_rng(3)
    for a, b in SHAPES:
        agree(name, run_op(name, np.abs(floats(rng, *a)), floats(rng, *b)))
    agree(name, run_op(name, EDGES[:, None], EDGES))


def test_bools() -> None:
    a, b = np.array([[False], [True]]), np.array([False, True, True])
    for name in ("logical_and", "logical_or", "eq", "ne"):
        agree(name, run_op(name, a, b))
    agree("logical_not", run_op("logical_not", b))


def test_where_and_cast() -> None:
    rng = np.random.default_rng(4)
    for dtype in (np.float32, np.int32, np.int64, np.bool_):
        a, b = ints(rng, 2, 3, dtype=dtype), ints(rng, 1, 3, dtype=dtype)
        agree("where", run_op("where", np.array([[True], [False]]), a, b))
        for to in ("f32", "i32", "i64", "bool"):
            agree("cast", run_op("cast", a, dtype=to))
    agree("cast", run_op("cast", np.array([1.9, -1.9, 3e9, -0.5], np.float32), dtype="i64"))
    assert (run_op("cast", np.array([NAN, INF, -INF, 3e9], np.float32), dtype="i32")[0]["r0"] == -(2**31)).all()


def test_leaves() -> None:
    agree("array", run_op("array", values=(1, -2, 3), dtype="i32"))
    agree("array", run_op("array", values=(1.5, -2), dtype="f32"))
    for dtype in ("f32", "i32", "i64"):
        agree("iota", run_op("iota", size=7, dtype=dtype))
        agree("size_value", run_op("size_value", size=7, dtype=dtype))
        agree("constant", run_op("constant", value=7, dtype=dtype))


def test_moves() -> None:
    rng = np.random.default_rng(5)
    x = floats(rng, 2, 3, 4)
    agree("reshape", run_op("reshape", x, shape=(4, 6)))
    for axes in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        agree("transpose", run_op("transpose", x, axes=axes))
    agree("broadcast_to", run_op("broadcast_to", floats(rng, 3, 1), shape=(2, 3, 5)))
    for axis, start, stop, step in ((0, 1, 2, 1), (1, 0, 3, 2), (2, 2, 2, 1), (2, 1, 4, 2), (0, 0, 0, 1)):
        agree("slice", run_op("slice", x, axis=axis, start=start, stop=stop, step=step))
    for axis in (0, 1, 2):
        agree("concat", run_op("concat", x, x[::-1], x, axis=axis))
    agree("concat", run_op("concat", np.zeros(0, np.int32), np.arange(3, dtype=np.int32), axis=0))
    agree("pad", run_op("pad", x, low=(0, 1, 2), high=(1, 0, 3), value=-1.5))
    agree("pad", run_op("pad", np.array([True]), low=(1,), high=(1,), value=0))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_indices(dtype: Any) -> None:
    rng = np.random.default_rng(6)
    x = floats(rng, 2, 5, 3)
    for axis, size in enumerate(x.shape):
        i = rng.integers(-size, size, (2, 2)).astype(dtype)
        agree("take", run_op("take", x, i[0], axis=axis))
        agree("take", run_op("take", x[0] if axis else x[0, :2], i, axis=max(axis - 1, 0)))
        along = rng.integers(-size, size, [2 if a == axis else n for a, n in enumerate(x.shape)]).astype(dtype)
        agree("take_along", run_op("take_along", x, along, axis=axis))
        agree(
            "take_along", run_op("take_along", x, along[tuple(np.s_[:] if a == axis else np.s_[:1] for a in range(3))], axis=axis)
        )
        updates = floats(rng, *[2 if a == axis else n for a, n in enumerate(x.shape)])
        agree("scatter", run_op("scatter", x, i[0], updates, axis=axis))
        agree("scatter", run_op("scatter", x, np.array([0, 0], dtype), updates, axis=axis))
        for bad in (size, -size - 1, 2**31 - 1):
            assert "leaves an axis of" in native_error("take", x, np.array([0, bad], dtype), axis=axis)
            assert "leaves an axis of" in native_error("scatter", x, np.array([0, bad], dtype), updates, axis=axis)
            assert "leaves an axis of" in native_error("take_along", x, np.full_like(along, bad), axis=axis)
    agree("take", run_op("take", x, np.array(1, dtype), axis=1))


def test_a_scatter_leaves_its_input_alone() -> None:
    x, i, u = np.arange(4, dtype=np.int32), np.array([1], np.int32), np.array([9], np.int32)
    params = [param(n, v) for n, v in (("x", x), ("i", i), ("u", u))]
    function = Function("f", params, results_of(ops.scatter(*params, axis=0), ops.add(params[0], params[0]), params[0]))
    native, reference = run_function(function, x=x, i=i, u=u)
    assert native["r2"].tolist() == [0, 1, 2, 3]
    agree("scatter", (native, reference))


def test_reductions() -> None:
    rng = np.random.default_rng(7)
    for x in (floats(rng, 2, 3, 4), floats(rng, 3, 2000), ints(rng, 2, 3, 4), ints(rng, 2, 40, 2, dtype=np.int64), floats(rng, 7)):
        for axes in {(0,), (x.ndim - 1,), (0, x.ndim - 1) if x.ndim > 1 else (0,), tuple(range(x.ndim))}:
            for keep in (False, True):
                for name in ("reduce_sum", "reduce_max", "reduce_min"):
                    agree(name, run_op(name, x, axes=axes, keepdims=keep))
        for axis in range(x.ndim):
            agree("argmax", run_op("argmax", x, axis=axis, keepdims=axis == 0))
            agree("cumsum", run_op("cumsum", x, axis=axis))
    for at in (0, 3, 40):
        x = np.zeros(64, np.float32)
        x[at], x[50] = NAN, NAN
        for name in ("reduce_max", "reduce_min"):
            agree(name, run_op(name, x, axes=(0,)))
        agree("argmax", run_op("argmax", x, axis=0))
    for x in (np.full(50, -INF, np.float32), np.array([1, 2, 2, 1] * 9, np.float32)):
        agree("argmax", run_op("argmax", x, axis=0))
    agree("reduce_sum", run_op("reduce_sum", np.zeros((2, 0), np.float32), axes=(1,)))
    agree("reduce_sum", run_op("reduce_sum", np.array([True, True, False]), axes=(0,)))
    assert "nothing" in native_error("reduce_max", np.zeros((2, 0), np.float32), axes=(1,))
    agree("cumsum", run_op("cumsum", np.full(3, 2**31 - 1, np.int32), axis=0))


def test_softmax_and_matmul() -> None:
    rng = np.random.default_rng(8)
    for x in (
        floats(rng, 3, 40),
        floats(rng, 2, 3, 5000),
        np.array([[-INF, 1, 2]], np.float32),
        np.array([1e30, -1e30], np.float32),
    ):
        for axis in range(x.ndim):
            with np.errstate(invalid="ignore"):
                agree("softmax", run_op("softmax", x, axis=axis))
    for a, b in (((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (3, 4, 2)), ((1, 7), (7, 1))):
        agree("matmul", run_op("matmul", floats(rng, *a), floats(rng, *b)))


VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, INF, -INF, NAN])


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=0, max_size=200), st.integers(1, 80))
def test_top_k_of_ties(values: list[float], k: int) -> None:
    agree("top_k", run_op("top_k", np.array(values, np.float32), k=k))


def test_top_k() -> None:
    rng = np.random.default_rng(9)
    for shape, k in (((3, 1000), 7), ((2, 2, 70), 70), ((30011,), 200), ((1, 5), 9), ((2, 64), 1)):
        agree("top_k", run_op("top_k", floats(rng, *shape), k=k))
        agree("top_k", run_op("top_k", np.sort(floats(rng, *shape)), k=k))


def test_noise() -> None:
    seed, sequence, positions = np.int64(2**40 + 5), np.int64(-3), np.array([0, 9], np.int32)
    native, reference = run_op("noise", seed, sequence, positions, size=100)
    np.testing.assert_allclose(native["r0"], reference["r0"], atol=4e-6)
