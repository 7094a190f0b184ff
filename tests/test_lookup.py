"""Table lookup beyond the laws of all formats: sums are exact integers, and equal to those of the multiply kernels bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.kernel_harness import NAMES, Library, activations, aligned, build, linear, same_bits, source
from stemma.backends.base import Inputs, Refusal
from stemma.backends.cpu.claims import linear as claim
from stemma.backends.cpu.formats import pack_linear, packing_of, q8_row_bytes
from stemma.ir import Function, Quantized, Tensor, TypeMismatch, dtype, format_of, ops, quantize_array

PAIRS = (("lut1_g32", "q8_g32"), ("lut2_g64", "q8_g32"), ("lut3_g128", "q8_g64"), ("lut4_g128", "q8_g128"))
TWINS = (("lut2_g64", "int2_g64"), ("lut3_g64", "int3_g64"), ("lut4_g64", "int4_g64"))
LEVELS = {1: (-1, 1), 2: (-2, 1), 3: (-4, 3), 4: (-8, 7)}


@pytest.fixture(scope="module")
def libraries() -> dict[str, Library]:
    pairs = dict.fromkeys([*PAIRS, *((w, "q8_g64") for twin in TWINS for w in twin)])
    return build(source([linear(f"{w}__{a}", w, a) for w, a in pairs]))


def packed(weight: Quantized) -> Any:
    """The packed weight, aligned."""
    body = pack_linear(weight, weight.dtype)
    out = aligned(body.shape, np.uint8)
    out[:] = body
    return out


def whole_rows(codes: Any, group: int) -> Any:
    """Rows of q8 activations with these codes int8 [M, K] and all scales 1."""
    rows, k = codes.shape
    out = aligned((rows, q8_row_bytes(k, group)), np.uint8)
    width, groups = -(-k // 64) * 64, k // group
    out[:, :k] = codes.view(np.uint8)
    out[:, width : width + 4 * groups] = np.ones((rows, groups), np.float32).view(np.uint8)
    sums = codes.reshape(rows, groups, group).sum(axis=2, dtype=np.int32)
    out[:, width + 4 * groups : width + 8 * groups] = sums.view(np.uint8)
    return out


@pytest.mark.parametrize("variant", NAMES)
def test_sums_are_exact_integers(libraries: dict[str, Library], variant: str) -> None:
    """Extreme codes included: scales are 1, so a result is an integer below 2^24, and any rounding or overflow would show."""
    rng = np.random.default_rng(4)
    for name, activation in PAIRS:
        low, high = LEVELS[dtype(name).bits]
        for n, k in ((70, 384), (65, 2048)):
            codes = rng.integers(low, high + 1, (n, k)).astype(np.int8)
            codes[0], codes[1] = low, high
            codes[2] = np.where(np.arange(k) % 2, low, high)
            if low == -1:
                codes[codes == 0] = 1
            weight = Quantized(name, {"codes": codes, "scales": np.ones((n, k // dtype(name).group), np.float32)})
            x = rng.integers(-127, 128, (9, k)).astype(np.int8)
            x[0], x[1], x[2] = 127, -127, 0
            x[3] = rng.choice([-127, 127], k)
            x[4] = rng.choice([-64, 63, 64], k)  # quads at both sides of 255, the most that a byte holds
            x[5, 16:] = 0
            y = np.full((9, n), np.nan, np.float32)
            libraries[variant].call(f"{name}__{activation}", 2, 9, n, k, whole_rows(x, int(activation[4:])), packed(weight), y)
            assert np.array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64)), (name, n, k)


@pytest.mark.parametrize("variant", NAMES)
def test_equal_to_the_multiply_kernels(libraries: dict[str, Library], variant: str) -> None:
    """The same codes and scales give the same bits, whatever multiplies them; so the error against a multiply kernel is zero."""
    rng = np.random.default_rng(5)
    for name, twin in TWINS:
        stored = quantize_array(rng.standard_normal((130, 1024), dtype=np.float32), twin)
        for spread in (1.0, 6.0):
            x = np.sign(rng.standard_normal((8, 1024))) * np.abs(rng.standard_normal((8, 1024))) ** spread
            rows, _ = activations(x.astype(np.float32), "q8_g64")
            looked, multiplied = np.zeros((8, 130), np.float32), np.ones((8, 130), np.float32)
            library = libraries[variant]
            library.call(f"{name}__q8_g64", 2, 8, 130, 1024, rows, packed(Quantized(name, stored.parts)), looked)
            library.call(f"{twin}__q8_g64", 2, 8, 130, 1024, rows, packed(stored), multiplied)
            assert same_bits(looked, multiplied), (name, twin)


def test_rounding_is_that_of_the_uniform_format() -> None:
    """The same codes and scales as int{b}_gN; one bit keeps signs and the mean magnitude."""
    x = np.random.default_rng(6).standard_normal((16, 256), dtype=np.float32)
    for name, twin in TWINS:
        looked, multiplied = quantize_array(x, name), quantize_array(x, twin)
        assert all(np.array_equal(looked.parts[p], multiplied.parts[p]) for p in multiplied.parts)
        assert Tensor(name, (16, 256)).bytes == Tensor(twin, (16, 256)).bytes
    signs = quantize_array(x, "lut1_g64")
    assert np.array_equal(signs.codes, np.where(x < 0, -1, 1))
    means = np.abs(x).reshape(16, 4, 64).mean(axis=2)
    assert np.allclose(signs.scales, means, rtol=2.0**-11)


def test_what_does_not_fit_is_said() -> None:
    """Groups, columns and activations that the kernels do not take."""
    with pytest.raises(TypeMismatch, match="multiple of 32"):
        dtype("lut2_g48")
    with pytest.raises(TypeMismatch, match="lut1_gN"):
        dtype("lut5_g64")
    with pytest.raises(TypeMismatch, match="no multiple of the group 64 of lut1_g64"):
        format_of("lut1_g64").quantize(np.zeros((2, 96), np.float32))
    assert "multiple of 128, not 64" in packing_of("lut2_g128").refusal(64)
    assert "at most 65536" in packing_of("lut2_g128").refusal(1 << 17)
    x, w = (ops.param(name=n, type=Tensor(t, s)) for n, t, s in (("x", "f32", (2, 64)), ("w", "lut2_g64", (8, 64))))
    refused = claim(Function("", [x, w], {"y": ops.linear(x, w)}), Inputs(constant=frozenset({1})))
    assert isinstance(refused, Refusal) and "f32 do not multiply weights of lut2_g64; q8_g32, q8_g64 do" in refused.reason
