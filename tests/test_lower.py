"""Lowering to the kernel level: same values as the tensor level, legal and readable back, and the loops one would write by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.codegen.index import Indices
from stemma.codegen.lower import Kernel, lower
from stemma.ir import (
    CompileError,
    Function,
    Module,
    Node,
    SizeLike,
    Tensor,
    TypeMismatch,
    VerifyError,
    dim,
    interpret,
    ops,
    parse_module,
    print_module,
    size,
    verify,
    walk,
)  # fmt: skip
from tests.generated import interpret_kernels
from tests.opcases import CASES, UNGENERATED, Case

pytestmark = pytest.mark.quick
N, M, K = dim("n", 1, 64), dim("m", 1, 64), dim("k", 1, 64)
GENERATED = [c for c in CASES if c.op not in UNGENERATED]


def param(name: str, *shape: SizeLike, dtype: str = "f32") -> Node:
    node: Node = ops.param(name=name, type=Tensor(dtype, shape))
    return node


def lowered(*params: Node, **results: Node) -> tuple[Kernel, ...]:
    return lower(Function("", params, results), "f")


def names(kernel: Kernel) -> list[str]:
    return [n.op.name for n in walk(kernel.function)]


def loops(kernel: Kernel) -> set[str]:
    return {n.attrs["name"] for n in walk(kernel.function) if n.op.name == "loop_index"}


@pytest.mark.parametrize("case", GENERATED, ids=[c.name for c in GENERATED])
def test_kernels_compute_what_the_operation_means(case: Case) -> None:
    """In exact-enough arithmetic (float64) both levels agree to 1e-12, and the kernel level reads back from its text."""
    kernels = lower(case.body, "f")
    module = Module(k.function for k in kernels)
    verify(module, "kernel")
    assert parse_module(print_module(module)) is module
    with pytest.raises(VerifyError):
        verify(module, "tensor")
    for sizes in case.sizes:
        inputs = {k: np.asarray(v, np.float64) if np.asarray(v).dtype.kind == "f" else v for k, v in case.inputs(sizes).items()}
        want = interpret(case.body, inputs, sizes=sizes)
        got = interpret_kernels(kernels, inputs, sizes)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-12 * np.abs(value, where=np.isfinite(value),
                                       out=np.zeros(np.shape(value))).max(initial=0))  # fmt: skip


# -- the kernel-level operations ---------------------------------------------------------------------------------------


def test_loops_evaluate_as_broadcast_axes() -> None:
    x, out = param("x", N, M), param("out", N)
    i, k = ops.loop_index(name="i", extent=N, axis=0), ops.loop_index(name="k", extent=M, axis=1)
    value = ops.load(x, i, k)
    array = np.arange(12.0).reshape(3, 4)
    for kind, want in (("sum", array.sum(1)), ("max", array.max(1)), ("min", array.min(1))):
        store = ops.store(out, ops.reduce_loop(value, k, kind=kind), i)
        got = interpret(Function("f", [x, out], {"r": store}), [array, np.zeros(3)])["r"]
        np.testing.assert_array_equal(got, want)
    place = ops.reduce_loop(ops.neg(value), k, kind="argmax")
    target = param("place", N, dtype="i64")
    got = interpret(Function("f", [x, target], {"r": ops.store(target, place, i)}), [array, np.zeros(3, np.int64)])["r"]
    np.testing.assert_array_equal(got, [0, 0, 0])


def test_stores_chain_and_the_last_write_wins() -> None:
    out = param("out", 4)
    i = ops.loop_index(name="i", extent=4, axis=0)
    two = ops.constant(value=2, dtype="i64")
    first = ops.store(out, ops.constant(value=1.0, dtype="f32"), i)
    second = ops.store(first, ops.cast(i, dtype="f32"), ops.floordiv(i, two))
    got = interpret(Function("f", [out], {"r": second}), [np.zeros(4)])["r"]
    np.testing.assert_array_equal(got, [1, 3, 1, 1])


def test_kernel_type_rules() -> None:
    x, i = param("x", N, M), ops.loop_index(name="i", extent=N, axis=0)
    half = ops.constant(value=0.5, dtype="f32")
    wrong: list[Callable[[], object]] = [
        lambda: ops.load(x, i), lambda: ops.load(x, i, half), lambda: ops.store(x, i, i, i), lambda: ops.store(x, x, i, i),
        lambda: ops.reduce_loop(half, kind="sum"), lambda: ops.reduce_loop(half, i, kind="mean"),
        lambda: ops.reduce_loop(x, i, kind="sum"),
        lambda: ops.reduce_loop(half, i, i, kind="argmax"), lambda: ops.loop_index(name="not a name", extent=N, axis=0),
        lambda: ops.loop_index(name="i", extent=N, axis=-1), lambda: ops.load(param("q", 2, 32, dtype="int4_g32"), i, i),
    ]  # fmt: skip
    for build in wrong:
        with pytest.raises(TypeMismatch):
            build()


# -- index arithmetic --------------------------------------------------------------------------------------------------


def test_reshapes_cancel() -> None:
    """Splitting and joining axes leaves no division behind."""
    x = param("x", N, 12 * M)
    y = ops.reshape(ops.transpose(ops.reshape(x, shape=(N, 4, 3, M)), axes=(0, 2, 1, 3)), shape=(N, 3, 4 * M))
    (kernel,) = lowered(x, r=ops.reshape(ops.reshape(x, shape=(N, 4, 3, M)), shape=(N, 12 * M)))
    assert not {"floordiv", "mod", "mul"} & set(names(kernel))
    (kernel,) = lowered(x, r=ops.transpose(ops.reshape(y, shape=(N, 3, 4, M)), axes=(0, 2, 1, 3)))
    assert "floordiv" not in names(kernel)


@settings(max_examples=60, deadline=None)
@given(st.permutations([2, 3, 4]), st.permutations([2, 12, 1]), st.integers(0, 23))
def test_reshape_finds_the_element(source: list[int], target: list[int], flat: int) -> None:
    indices = Indices(())
    at = np.unravel_index(flat, source)
    found = indices.reshape(tuple(int(a) for a in at), source, target)
    assert np.ravel_multi_index(found, target) == flat  # type: ignore[arg-type]


def test_divisions_of_loop_variables() -> None:
    indices = Indices(["_i"])
    i, j = indices.loop("i", N, 1), indices.loop("j", M, 0)
    assert indices.divide(i * M + j, M) == (i, j)
    assert indices.divide(i * M * 4 + j * 4 + 3, 4) == (i * M + j, 3)
    quotient, rest = indices.divide(i * M + j, K)
    assert rest == i * M + j - quotient * K and "//" in str(quotient)
    assert indices.below(j, M) and not indices.below(j, M - 1) and indices.at_least(j + 1, 1) and not indices.at_least(j - 1, 0)
    assert indices.loop("unit", 1, 0) == 0


# -- structure ---------------------------------------------------------------------------------------------------------


def test_softmax_over_rows_is_one_kernel() -> None:
    x = param("x", N, M)
    (kernel,) = lowered(x, r=ops.softmax(x, axis=1))
    assert names(kernel).count("reduce_loop") == 2 and kernel.temporaries == {}
    assert (kernel.inputs, kernel.outputs, kernel.dims) == (("x",), ("r",), ("n", "m"))


def test_softmax_over_columns_keeps_column_values_in_memory() -> None:
    x = param("x", N, M)
    *before, last = lowered(x, r=ops.softmax(x, axis=0))
    stored = {name: type for k in before for name, type in k.temporaries.items()}
    assert {t.shape for t in stored.values()} <= {(1, M), (N, M)} and len(stored) >= 2
    assert "reduce_loop" not in names(last) and last.outputs == ("r",)


def test_norm_reads_its_row_twice_and_stores_nothing_else() -> None:
    x, r, w = param("x", N, 64), param("r", N, 64), param("w", 64)
    (kernel,) = lowered(x, r, w, sum=ops.add(x, r), norm=ops.rms_norm(ops.add(x, r), w, eps=1e-5))
    assert kernel.outputs == ("sum", "norm") and names(kernel).count("reduce_loop") == 1
    assert loops(kernel) == {"i0", "i1", "k"}


def test_rope_is_one_nest_over_half_the_width() -> None:
    x, c = param("x", N, 4, 64), param("c", N, 1, 64)
    (kernel,) = lowered(x, c, r=ops.rope(x, c, ops.neg(c)))
    stores = [n for n in walk(kernel.function) if n.op.name == "store"]
    extents = [n.attrs["extent"] for n in walk(kernel.function) if n.op.name == "loop_index"]
    assert len(stores) == 2 and "where" not in names(kernel) and sorted(map(str, extents)) == ["32", "4", "n"]


def test_joins_and_pads_are_cut_into_plain_loops() -> None:
    x, y = param("x", N, M), param("y", N, K)
    (kernel,) = lowered(x, y, r=ops.concat(x, ops.pad(y, low=(0, 1), high=(0, 0), value=0.0), axis=1))
    assert names(kernel).count("store") == 3 and not {"where", "minimum", "maximum"} & set(names(kernel))
    (kernel,) = lowered(x, y, r=ops.reduce_sum(ops.concat(x, y, axis=1), axes=(1,)))
    assert "where" in names(kernel)


def test_an_expensive_operand_is_computed_once() -> None:
    x, w = param("x", N, 32), param("w", M, 32)
    first, second = lowered(x, w, r=ops.linear(ops.silu(x), w))
    assert list(first.temporaries.values()) == [Tensor("f32", (N, 32))] and first.outputs[0] in second.inputs
    (kernel,) = lowered(x, w, r=ops.linear(ops.rms_norm(x, eps=1e-5), w))
    assert names(kernel).count("reduce_loop") == 2
    table = ops.cos(ops.reshape(x, shape=(N, 1, 32)))
    y = param("y", N, 8, 32)
    assert len(lowered(x, y, r=ops.mul(y, table))) == 2


def test_a_result_that_others_need_is_not_stored_twice() -> None:
    x = param("x", N, M)
    total = ops.reduce_sum(x, axes=(0,))
    kernels = lowered(x, total=total, r=ops.add(x, total))
    assert [k.outputs for k in kernels] == [("total",), ("r",)] and all(not k.temporaries for k in kernels)
    assert kernels[1].inputs == ("x", "total")


def test_scatter_updates_a_parameter_in_place_or_copies() -> None:
    cache, slots, rows = param("cache", 2, K, 8), param("slots", N, dtype="i32"), param("rows", 2, N, 8)
    new = ops.scatter(cache, slots, rows, axis=1)
    (kernel,) = lowered(cache, slots, rows, cache_out=new)
    assert kernel.alias == {"cache_out": "cache"} and kernel.outputs == ("cache_out",)
    assert [p.attrs["name"] for p in kernel.function.params] == list(kernel.inputs) == ["cache", "slots", "rows"]
    copy, write = lowered(cache, slots, rows, r=new, old=ops.neg(cache))[-2:]
    assert copy.alias == write.alias == {} and copy.outputs == write.outputs == ("r",)


def test_a_cache_write_is_cut_along_its_width_but_not_along_its_rows() -> None:
    cache, slots = param("cache", 2, K, 8), param("slots", N, dtype="i32")
    x, c = param("x", 2, N, 8), param("c", 1, N, 8)
    (kernel,) = lowered(cache, slots, x, c, r=ops.scatter(cache, slots, ops.rope(x, c, ops.neg(c)), axis=1))
    assert names(kernel).count("store") == 2 and "where" not in names(kernel)
    one, two = param("one", 2, 1, 8), param("two", 2, N, 8)
    more = param("more", N + 1, dtype="i32")
    (kernel,) = lowered(cache, more, one, two, r=ops.scatter(cache, more, ops.concat(one, two, axis=1), axis=1))
    assert names(kernel).count("store") == 1 and "where" in names(kernel)


def test_two_caches_in_one_body() -> None:
    slots = param("slots", N, dtype="i32")
    k, v, rows = param("k", K, 8), param("v", K, 8), param("rows", N, 8)
    kernels = lowered(
        k, v, slots, rows, k_out=ops.scatter(k, slots, rows, axis=0), v_out=ops.scatter(v, slots, ops.neg(rows), axis=0)
    )
    assert [dict(kernel.alias) for kernel in kernels] == [{"k_out": "k"}, {"v_out": "v"}]
    assert len({kernel.name for kernel in kernels}) == 2


def test_names_of_results_and_parameters_may_meet() -> None:
    x, y = param("x", N), param("y", N)
    kernels = lowered(x, y, y=ops.neg(x), x=ops.add(x, y))
    got = interpret_kernels(kernels, {"x": np.ones(3), "y": np.full(3, 5.0)}, {"n": 3})
    assert kernels[0].outputs == ("y", "x")
    np.testing.assert_array_equal(got["x"], [6, 6, 6])


def test_regions_and_quantized_values_are_refused() -> None:
    q = param("q", N, 32, dtype="int4_g32")
    for body in (
        ops.dequantize(q),
        ops.slice(q, axis=0, start=0, stop=1),
        ops.add(ops.weight(name="w", type=Tensor("f32", (2,))), 1.0),
    ):
        with pytest.raises(CompileError, match="f"):
            lowered(q, r=body)


# -- random chains -----------------------------------------------------------------------------------------------------


@st.composite
def chains(draw: Any) -> Function:
    """A few elementwise, view and reduction steps over two parameters with symbolic axes."""
    x, y = param("x", N, 6), param("y", N, 6)
    values: list[Node] = [x, y]
    for _ in range(draw(st.integers(1, 7))):
        a = draw(st.sampled_from(values))
        rank = a.tensor.rank
        axis = draw(st.integers(0, max(rank - 1, 0)))
        step = draw(
            st.sampled_from(["unary", "binary", "reshape", "transpose", "slice", "concat", "pad", "sum", "softmax", "where", "cut"])
        )
        match step:
            case "unary":
                a = draw(st.sampled_from([ops.neg, ops.tanh, ops.abs, ops.exp]))(ops.sin(a))
            case "binary":
                same = [v for v in values if v.shape == a.shape]
                a = draw(st.sampled_from([ops.add, ops.mul, ops.sub]))(a, draw(st.sampled_from(same)))
            case "reshape":
                flat = ops.reshape(a, shape=(a.tensor.elements,))
                parts = [d for d in (2, 3) if isinstance(size.floordiv(a.tensor.elements, d) * d, type(a.tensor.elements))
                         and size.floordiv(a.tensor.elements, d) * d == a.tensor.elements]  # fmt: skip
                by = draw(st.sampled_from([1, *parts]))
                a = ops.reshape(flat, shape=(by, size.floordiv(a.tensor.elements, by)))
            case "transpose" if rank > 1:
                a = ops.transpose(a, axes=tuple(draw(st.permutations(range(rank)))))
            case "slice" if rank and size.bounds(a.shape[axis])[0] >= 2:
                a = ops.slice(a, axis=axis, start=1, stop=a.shape[axis], step=draw(st.integers(1, 2)))
            case "concat" if rank:
                a = ops.concat(a, ops.neg(a), axis=axis)
            case "pad" if rank:
                a = ops.pad(a, low=(1,) * rank, high=(0,) * rank, value=0.5)
            case "sum" if rank:
                a = ops.reduce_sum(a, axes=(axis,), keepdims=draw(st.booleans()))
            case "softmax" if rank:
                a = ops.softmax(a, axis=axis)
            case "where":
                a = ops.where(ops.gt(a, ops.constant(value=0.0, dtype="f32")), a, ops.constant(value=-0.25, dtype="f32"))
            case "cut" if rank and size.bounds(a.shape[axis])[0] >= 2:
                a = ops.take(a, ops.iota(size=2), axis=axis)
        values.append(a)
    return Function("", [x, y], {"r": values[-1]})


@settings(max_examples=120, deadline=None)
@given(chains(), st.sampled_from([1, 2, 5]), st.integers(0, 2**16))
def test_random_chains(body: Function, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = {p.attrs["name"]: rng.normal(size=(n, 6)) for p in body.params}
    kernels = lower(body, "f")
    module = Module(k.function for k in kernels)
    verify(module, "kernel")
    assert parse_module(print_module(module)) is module
    want, got = interpret(body, inputs, sizes={"n": n}), interpret_kernels(kernels, inputs, {"n": n})
    np.testing.assert_allclose(got["r"], want["r"], rtol=1e-12, atol=1e-12)
