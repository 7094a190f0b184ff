"""The op suite: every operation on every backend, with an error bound per operation, against the interpreter in float64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from stemma.backends.cuda.dialect import CUDA
from stemma.backends.registry import get
from stemma.codegen.lower import Kernel, lower
from stemma.codegen.render import render
from stemma.ir import OPS, Array, CompileError, Function, Module, interpret, parse_module, print_module, verify
from stemma.ir.formats import Quantized
from tests.generated import Native
from tests.opcases import BOUNDS, CASES, UNGENERATED, Bound, Case

UNIT = 2.0**-23
GENERATED = [c for c in CASES if c.op not in UNGENERATED]


@cache
def lowered(name: str) -> tuple[Kernel, ...]:
    return lower(next(c.body for c in CASES if c.name == name), f"k_{name}")


@pytest.fixture(scope="session")
def cuda() -> Native:
    return Native({c.name: lowered(c.name) for c in GENERATED}, CUDA)


@pytest.fixture(scope="session")
def native() -> Native:
    return Native({c.name: lowered(c.name) for c in GENERATED})


def by_name(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


def check(case: Case, got: Mapping[str, Any], want: Mapping[str, Any], sizes: Mapping[str, int], slack: float = 1) -> None:
    """Results within the case's bound (times `slack`: serial sums); shapes equal; infinities equal."""
    units = case.bound.units * slack
    for name in want:
        g, w = np.asarray(got[name]), np.asarray(want[name])
        assert g.shape == w.shape, name
        if w.dtype == bool or w.dtype.kind in "iu":
            np.testing.assert_array_equal(g.astype(w.dtype), w)
            continue
        finite = np.isfinite(w)
        np.testing.assert_array_equal(g[~finite], w[~finite])
        error = np.abs(g[finite].astype(np.float64) - w[finite])
        scale = np.abs(w[finite])
        if case.bound.to == "norm" and scale.size:
            scale = np.full_like(scale, scale.max())
        worst = float((error / np.maximum(scale, 2.0**-100)).max(initial=0)) / UNIT
        assert (error <= units * UNIT * scale + 1e-38).all(), f"{name} at {dict(sizes)}: {worst:.2f} units > {units}"


def reference(case: Case, sizes: Mapping[str, int], float_type: type = np.float64) -> dict[str, Any]:
    return interpret(case.body, case.inputs(sizes), case.weights, sizes=sizes, float_type=float_type)


@pytest.mark.quick
def test_every_operation_has_a_case() -> None:
    needed = {name for name, op in OPS.items() if op.level == "tensor"}
    assert needed - {c.op for c in CASES} == set()
    assert set(BOUNDS) <= needed and set(UNGENERATED) <= needed
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.quick
@by_name(CASES)
def test_cases_are_legal_and_round_trip(case: Case) -> None:
    body = Function("body", case.body.params, zip(case.body.result_names, case.body.results, strict=True))
    module = Module([body])
    verify(module)
    assert parse_module(print_module(module)) is module


@pytest.mark.quick
@by_name(CASES)
def test_reference(case: Case) -> None:
    """The interpreter in float32 agrees with itself in float64 within the operation's bound."""
    for sizes in case.sizes:
        check(case, reference(case, sizes, np.float32), reference(case, sizes), sizes)


@by_name(GENERATED)
def test_generated(case: Case, native: Native) -> None:
    for sizes in case.sizes:
        check(case, native.run(case.name, case.body, case.inputs(sizes), sizes), reference(case, sizes), sizes)


@by_name(GENERATED)
def test_cuda_text(case: Case, cuda: Native) -> None:
    """The CUDA C++ of a kernel, its threads run one after the other on the CPU: indices, nests and serial reductions."""
    for sizes in case.sizes:
        check(case, cuda.run(case.name, case.body, case.inputs(sizes), sizes), reference(case, sizes), sizes, slack=4)


@by_name(GENERATED)
def test_threads_do_not_change_bits(case: Case, native: Native) -> None:
    sizes = case.sizes[-1]
    one, three = (native.run(case.name, case.body, case.inputs(sizes), sizes, threads) for threads in (1, 3))
    for name in one:
        np.testing.assert_array_equal(one[name], three[name])


@by_name([c for c in GENERATED if c.rows])
def test_rows_do_not_change_bits(case: Case, native: Native) -> None:
    """A row computed alone equals the same row of a batch."""
    sizes = case.sizes[-1]
    inputs = case.inputs(sizes)
    together = native.run(case.name, case.body, inputs, sizes)
    for row in (0, sizes["n"] - 1):
        alone = native.run(case.name, case.body, {k: v[row : row + 1] for k, v in inputs.items()}, {**sizes, "n": 1})
        for name in together:
            np.testing.assert_array_equal(alone[name][0], together[name][row])


@pytest.mark.quick
@by_name(GENERATED)
def test_null(case: Case) -> None:
    """The null backend claims nothing and renders every kernel."""
    dialect = get("null").dialect
    for kernel in lowered(case.name):
        assert f"void {kernel.name}(" in render(kernel, dialect).source


@pytest.mark.quick
@by_name([c for c in CASES if c.op in UNGENERATED and c.op not in ("param", "get")])
def test_what_has_no_kernel_says_so(case: Case) -> None:
    with pytest.raises(CompileError, match=f"k_{case.op}"):
        lowered(case.name)


@pytest.mark.quick
def test_a_wrong_value_fails() -> None:
    case = next(c for c in CASES if c.name == "exp")
    want = reference(case, case.sizes[1])
    wrong: dict[str, Array] = {n: v * (1 + 4 * UNIT) for n, v in want.items()}
    with pytest.raises(AssertionError, match="units"):
        check(case, wrong, want, case.sizes[1])
    assert case.bound == Bound(2) and not isinstance(want["r0"], Quantized)
