"""Products of codes in planes where they could go wrong: extremes of whole numbers, zero points that are not whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.kernel_harness import NAMES, Library, activations, same_bits
from stemma.backends.cpu.formats import pack_linear, packing_of, planes
from stemma.ir import Format, Function, Module, Quantized, Tensor, dtype, ops
from stemma.passes.base import PassContext
from stemma.passes.quantize import Quantize, RoundActivations
from tests.test_formats import U, error_bound, libraries_of

SUPER_BLOCKS = ("q2_k", "q4_k", "q5_k", "q6_k")
ROWS, COLUMNS = 70, 512


@pytest.fixture(scope="module")
def libraries() -> dict[str, Library]:
    return libraries_of(planes)


def stored(name: str, part: Any) -> Quantized:
    """A weight [ROWS, COLUMNS] whose parts are `part(name of the part, shape)`, in the types of the format."""
    format = dtype(name)
    assert isinstance(format, Format)
    return Quantized(name, {n: part(n, (ROWS, *shape)).astype(type) for n, (type, shape) in format.parts(COLUMNS).items()})


def product(library: Library, weight: Quantized, x: Any, activation: str) -> tuple[Any, Any]:
    """The kernel's result, and the activations' values."""
    packed = pack_linear(weight, weight.dtype)
    rows, values = activations(x, activation)
    y = np.full((len(x), ROWS), np.nan, np.float32)
    library.call(f"linear_{weight.dtype}__{activation}", 1, len(x), ROWS, COLUMNS, rows, packed, y)
    return y, values


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("name", planes.EXAMPLES)
def test_whole_sums_of_extremes_are_exact(libraries: dict[str, Library], variant: str, name: str) -> None:
    """Largest and smallest codes times activations of 127 and -127, all equal or in any order: nothing saturates or wraps."""
    rng = np.random.default_rng(0)
    bits, low = packing_of(name).seams()["bits"], packing_of(name).seams()["low"]
    codes = np.array([low, low + 2**bits - 1], np.int16)

    def part(which: str, shape: tuple[int, ...]) -> Any:
        if which in ("scales", "d", "dmin"):
            return np.ones(shape)
        if which == "zeros":
            return rng.choice([0.0, 1.5, 2**bits - 1.0], shape)
        if which == "codes":
            return np.stack(
                [np.full(shape[1], codes[0]), np.full(shape[1], codes[1]), *rng.choice(codes, (shape[0] - 2, shape[1]))]
            )
        return rng.choice([-128, 127] if name == "q6_k" else [0, 15 if name == "q2_k" else 63], shape)

    weight = stored(name, part)
    x = np.stack([np.full(COLUMNS, 127.0), np.full(COLUMNS, -127.0), *rng.choice([-127.0, 127.0], (5, COLUMNS))]).astype(np.float32)
    for activation in packing_of(name).activations[1:]:
        y, values = product(libraries[variant], weight, x, activation)
        exact = values @ weight.dequantize().astype(np.float64).T
        if name in SUPER_BLOCKS:  # sums can have more than 24 bits
            assert (np.abs(y - exact) <= 8 * U * (np.abs(values) @ np.abs(weight.dequantize()).T)).all()
        else:
            assert np.array_equal(y, exact)


@pytest.mark.parametrize("variant", NAMES)
def test_zero_points_need_not_be_whole(libraries: dict[str, Library], variant: str) -> None:
    """Any f16 number, also outside the range of codes."""
    rng = np.random.default_rng(1)

    def part(which: str, shape: tuple[int, ...]) -> Any:
        return rng.integers(0, 16, shape) if which == "codes" else rng.normal(7, 6, shape).astype(np.float16)

    weight = stored("uint4_g32", part)
    x = rng.standard_normal((7, COLUMNS), dtype=np.float32)
    for activation in packing_of("uint4_g32").activations:
        y, values = product(libraries[variant], weight, x, activation)
        meant = weight.dequantize().astype(np.float64)
        assert (np.abs(y - values @ meant.T) <= error_bound(values, meant, COLUMNS, activation)).all(), activation


@pytest.mark.parametrize("name", SUPER_BLOCKS)
def test_super_blocks_are_rounded_once(name: str) -> None:
    """Dequantized values are the exact ones rounded to f32, so every order of operations, fused or not, gives the same bits."""
    rng = np.random.default_rng(2)
    format = dtype(name)
    assert isinstance(format, Format)

    def part(which: str, shape: tuple[int, ...]) -> Any:
        if which in ("d", "dmin"):  # any f16 number, also those without a leading one
            return rng.integers(0, 0x7C00, shape).astype(np.uint16).view(np.float16) * rng.choice([-1, 1], shape).astype(np.float16)
        if which == "codes":
            low = packing_of(name).seams()["low"]
            return rng.integers(low, low + 2**format.bits, shape)
        return rng.integers(-128, 128, shape) if name == "q6_k" else rng.integers(0, 16 if name == "q2_k" else 64, shape)

    weight = stored(name, part)
    p = {n: v.astype(np.float64) for n, v in weight.parts.items()}
    sub = COLUMNS // p["sub_scales"].shape[1]
    exact = np.repeat(np.repeat(p["d"], 256 // sub, axis=1) * p["sub_scales"], sub, axis=1) * p["codes"]
    if "dmin" in p:
        exact -= np.repeat(np.repeat(p["dmin"], 256 // sub, axis=1) * p["sub_minimums"], sub, axis=1)
    assert same_bits(weight.dequantize(), exact.astype(np.float32))


def test_super_blocks_by_the_pass() -> None:
    """`quantize{format=q6_k}` and activations of groups that its sub-blocks fit in."""
    x, w = ops.param(name="x", type=Tensor("f32", (3, 256))), ops.weight(name="w", type=Tensor("bf16", (64, 256)))
    module = Module([Function("forward", [x], {"y": ops.linear(x, w)})])
    changed = RoundActivations().run(Quantize(format="q6_k").run(module, PassContext()), PassContext())
    (linear,) = [n for n in changed["forward"].nodes if n.op.name == "linear"]
    assert (linear.inputs[0].dtype, linear.inputs[1].dtype) == ("q8_g32", "q6_k")
