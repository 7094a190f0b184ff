"""Contextual sparsity: the kernels against their definition, equal bits over rows and threads, and the pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_harness import NAMES, Library, build, same_bits, source
from stemma.backends import registry
from stemma.backends.cpu.formats.plain import bf16_bits, bf16_values
from stemma.backends.cpu.formats.rows import NAMES as WEIGHTS
from stemma.backends.cpu.formats.rows import pack_rows, row_bytes
from stemma.backends.cpu.render_templates import render
from stemma.codegen.build import program
from stemma.ir import Function, Module, PassError, Tensor, dim, interpret, ops, parse_module, print_module, quantize_array, verify
from stemma.passes.base import PassContext
from stemma.passes.contextual_sparsity import ContextualSparsity
from stemma.passes.measure import Meter
from stemma.passes.quantize import Quantize, RoundActivations
from stemma.runtime.sizes import compile_size
from tests.programs import tiny_lm
from tests.test_quantize import store

U = 2.0**-24


@pytest.fixture(scope="module")
def libraries() -> dict[str, Library]:
    kernels = [render("neurons.hpp.j2", name="top", what="top", weight="f32")]
    kernels += [render("neurons.hpp.j2", name=f"{what}_{w}", what=what, weight=w) for w in WEIGHTS for what in ("at", "from")]
    return build(source(kernels))


@pytest.fixture(params=NAMES)
def library(request: pytest.FixtureRequest, libraries: dict[str, Library]) -> Library:
    return libraries[request.param]


def chosen(x: Any, count: int) -> Any:
    return interpret(
        Function("f", [p := ops.param(name="x", type=Tensor("f32", x.shape))], {"y": ops.top_neurons(p, count=count)}), [x]
    )["y"]


def weight(rng: np.random.Generator, rows: int, columns: int, name: str) -> tuple[Any, Any]:
    """(packed rows, their values)."""
    w = rng.standard_normal((rows, columns), dtype=np.float32)
    if name == "f32":
        return w, w.astype(np.float64)
    if name == "bf16":
        bits = bf16_bits(w)
        return bits, bf16_values(bits).astype(np.float64)
    stored = quantize_array(w, name)
    packed = pack_rows(stored, name)
    assert packed.nbytes == rows * row_bytes(columns, name)
    return packed, stored.dequantize().astype(np.float64)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 99), st.sampled_from(["normal", "few", "equal", "tiny"]), st.data())
def test_top_neurons_is_a_stable_selection(libraries: dict[str, Library], extent: int, seed: int, kind: str, data: Any) -> None:
    count = data.draw(st.integers(1, extent))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, extent), dtype=np.float32)
    if kind == "few":
        x = np.round(x)
    elif kind == "equal":
        x[:] = np.where(rng.random(x.shape) < 0.5, 1.0, -1.0)
    elif kind == "tiny":
        x *= np.float32(1e-41)
    order = np.argsort(-np.abs(x), axis=1, kind="stable")[:, :count]
    expected = np.sort(order, axis=1)
    assert np.array_equal(chosen(x, count), expected)
    for library in libraries.values():
        for threads in (1, 2):
            at = np.full((5, count), -1, np.int32)
            library.call("top", threads, 5, extent, 0, count, x, at)
            assert np.array_equal(at, expected)


@pytest.mark.parametrize("name", WEIGHTS)
def test_products_with_some_rows(library: Library, name: str) -> None:
    """Within the bound of float64, and the same bits for any rows and threads."""
    rng = np.random.default_rng(5)
    shapes = [(200, 128, 70), (65, 384, 65), (40, 256, 1), (40, 8192, 30), (5, 40960, 3)]  # the last two: parts of few or one row
    if name.startswith("int4_g"):  # parts of a unit, of 16 groups
        group = int(name[6:])
        shapes += [(40, 128 + i * group, 9) for i in range(1, 128 // group)] + [(40, 19 * group, 9)]
    else:
        shapes += [(40, 100, 9), (40, 16, 9)]
    for neurons, width, count in shapes:
        packed, values = weight(rng, neurons, width, name)
        at = np.sort(np.stack([rng.permutation(neurons)[:count] for _ in range(9)]), axis=1).astype(np.int32)
        x, h = rng.standard_normal((9, width), dtype=np.float32), rng.standard_normal((9, count), dtype=np.float32)
        y, z = np.zeros((9, count), np.float32), np.zeros((9, width), np.float32)
        library.call(f"at_{name}", 2, 9, neurons, width, count, x, packed, at, y)
        library.call(f"from_{name}", 2, 9, neurons, width, count, h, packed, at, z)
        rows = values[at]
        assert (np.abs(y - np.einsum("mk,mjk->mj", x, rows)) <= (width + 3) * U * np.einsum("mk,mjk->mj", abs(x), abs(rows))).all()
        assert (
            np.abs(z - np.einsum("mj,mjk->mk", h, rows)) <= (count + 3) * U * np.einsum("mj,mjk->mk", abs(h), abs(rows)) + 1e-30
        ).all()
        for m, threads in ((1, 1), (1, 2), (1, 3), (2, 2), (4, 1), (9, 1), (9, 3)):
            part, other = np.full((m, count), np.nan, np.float32), np.full((m, width), np.nan, np.float32)
            last = [np.ascontiguousarray(a[9 - m :]) for a in (x, at, h)]
            library.call(f"at_{name}", threads, m, neurons, width, count, last[0], packed, last[1], part)
            library.call(f"from_{name}", threads, m, neurons, width, count, last[2], packed, last[1], other)
            assert same_bits(part, y[9 - m :]) and same_bits(other, z[9 - m :]), (m, threads)


@pytest.mark.quick
def test_costs_count_the_rows_that_are_named() -> None:
    n = dim("rows", 1, 8)
    x, at = ops.param(name="x", type=Tensor("f32", (n, 128))), ops.param(name="at", type=Tensor("i32", (n, 16)))
    w = ops.weight(name="w", type=Tensor("int4_g64", (64, 128)))
    up = Function("up", [x, at], {"y": ops.linear_at(x, w, at)})
    h = ops.param(name="h", type=Tensor("f32", (n, 16)))
    down = Function("down", [h, at], {"y": ops.linear_from(h, w, at)})
    for made in program(Module([up, down]), registry.get("cpu")).schedules:
        (launch,) = made.launches
        flops, size = (compile_size(str(s), frozenset({"rows"})) for s in (launch.cost.flops, launch.cost.bytes))
        for rows, read in ((1, 16), (8, 64)):  # each row once
            assert flops({"rows": rows}) == rows * 2 * 16 * 128
            assert size({"rows": rows}) == read * (64 + 2 * 2) + rows * 4 * (128 + 16 + 16)


def loss_of(keep: float, *before: Any) -> float:
    module, weights = tiny_lm()
    text = (np.random.default_rng(1).integers(0, 50, 24),)
    context = PassContext(weights=store(weights), calibration=text)
    changed: Module = module
    for step in (*before, ContextualSparsity(keep=keep)):
        changed = step.run(changed, context)
    verify(changed)
    assert parse_module(print_module(changed)) is changed
    found = Meter(module, context.weights, text)(changed).kl
    assert found is not None
    return found


def test_the_pass() -> None:
    """Every neuron kept is the dense model; fewer cost more; it works on quantized weights and rounded activations."""
    assert loss_of(1.0) < 1e-9
    assert 1e-9 < loss_of(0.7) < loss_of(0.2)
    assert loss_of(0.5, Quantize(bits=8), RoundActivations()) < loss_of(0.2)


def test_a_model_of_its_own() -> None:
    """Beside the model, which stays as it is."""
    module, _ = tiny_lm()
    made = ContextualSparsity(keep=0.5, model="sparse")
    assert made.label == "identical" and ContextualSparsity().label == "lossy"
    changed = made.run(module, PassContext())
    assert changed["forward"] is module["forward"]
    assert "linear_from" in {n.op.name for n in changed["sparse_forward"].nodes}
    with pytest.raises(PassError, match="already"):
        made.run(changed, PassContext())


def test_clear_errors() -> None:
    module, _ = tiny_lm()
    with pytest.raises(PassError, match="no share"):
        ContextualSparsity(keep=0).run(module, PassContext())
    x = ops.param(name="x", type=Tensor("f32", (dim("n"), 4)))
    with pytest.raises(PassError, match="no gated MLP"):
        ContextualSparsity().run(Module([Function("forward", [x], {"y": -x})]), PassContext())
    w = ops.weight(name="w", type=Tensor("int4_g32", (64, 32)))
    u, v = (ops.weight(name=n, type=Tensor("f32", (32, 4))) for n in "uv")
    y = ops.linear(ops.gated(ops.linear(x, u), ops.linear(x, v), activation="silu"), w)
    with pytest.raises(PassError, match="cannot be read apart"):
        ContextualSparsity().run(Module([Function("forward", [x], {"y": y})]), PassContext())
