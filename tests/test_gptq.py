"""GPTQ: the factor of the inverse Hessian, and what compensation brings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Array, PassError, Quantized, dtype, quantize_array
from stemma.ir.formats.uniform import Uniform
from stemma.passes.gptq import column_order, compensate
from stemma.passes.hessian import Hessian, mean_squares

pytestmark = pytest.mark.quick
NAMES = ("int8", "int8_g32", "int4_g32", "int4_g64", "int3_g32", "int2_g32", "uint4_g32", "uint3_g32", "uint2_g32", "ternary_g32")


def correlated(rng: np.random.Generator, tokens: int, columns: int) -> Array:
    """Inputs with strong directions, as activations have."""
    mix = rng.standard_normal((columns, columns)) * rng.exponential(1, columns) ** 2
    return (rng.standard_normal((tokens, columns)) @ mix).astype(np.float32)


def made(x: Array, name: str, damp: float = 0.01) -> Hessian:
    squares = mean_squares([x])
    return Hessian([x[:100], x[100:]], squares, column_order(squares, dtype(name).group), damp)


def uniform(name: str) -> Uniform:
    found = dtype(name)
    assert isinstance(found, Uniform)
    return found


def output_error(w: Array, q: Quantized, hessian: Hessian) -> float:
    """(w - q) H (w - q)^T, summed over rows."""
    h = hessian.rows(0, w.shape[1]).astype(np.float64)
    e = (w - q.dequantize())[:, hessian.order].astype(np.float64)
    return float(np.einsum("ri,ij,rj->", e, h, e, optimize=True))


@pytest.mark.parametrize("columns", [8, 96, 256, 600])
def test_factor(columns: int) -> None:
    """U^T U is the inverse of the damped H, and H itself can still be read."""
    rng = np.random.default_rng(columns)
    x = correlated(rng, 900, columns)
    order = rng.permutation(columns)
    hessian = Hessian([x[:500], x[500:]], mean_squares([x]), order, 0.05)
    h = (x.T.astype(np.float64) @ x / len(x))[order][:, order]
    h += 0.05 * np.diag(h).mean() * np.eye(columns)
    np.testing.assert_allclose(hessian.rows(0, columns), h, atol=1e-5 * np.abs(h).max())
    some = slice(columns // 3, columns // 3 * 2)
    np.testing.assert_array_equal(hessian.rows(some.start, some.stop), hessian.rows(0, columns)[some])
    u = np.triu(hessian.factor(0, columns)).astype(np.float64)
    np.testing.assert_allclose(u.T @ u @ h, np.eye(columns), atol=2e-3)
    np.testing.assert_allclose(hessian.inverse_diagonal(), np.diag(np.linalg.inv(h)), rtol=2e-3)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(NAMES), columns=st.sampled_from([64, 192, 320]), seed=st.integers(0, 999))
def test_outputs_are_closer_than_with_rounding(name: str, columns: int, seed: int) -> None:
    """With correlated inputs, the error of the outputs is below that of rounding each weight to nearest."""
    rng = np.random.default_rng(seed)
    x, w = correlated(rng, 700, columns), rng.standard_normal((24, columns), dtype=np.float32)
    hessian = made(x, name)
    q = compensate(w, hessian, uniform(name))
    assert {n: (p.dtype, p.shape) for n, p in q.parts.items()} == {
        n: (p.dtype, p.shape) for n, p in quantize_array(w, name).parts.items()
    }
    assert output_error(w, q, hessian) < output_error(w, quantize_array(w, name), hessian)


@pytest.mark.parametrize("name", NAMES)
def test_unrelated_inputs_are_rounded_to_nearest(name: str) -> None:
    """With an identity Hessian nothing is made up for: every code is the nearest under the scales of rounding to nearest."""
    rng = np.random.default_rng(2)
    w, target = rng.standard_normal((40, 128), dtype=np.float32), uniform(name)
    x = np.eye(128, dtype=np.float32) * np.float32(128**0.5)
    hessian = Hessian([x], mean_squares([x]), np.arange(128), 0.0)
    q, nearest = compensate(w, hessian, target), quantize_array(w, name)
    sides = [nearest.parts[part] for part in ("scales", "zeros") if part in nearest.parts]
    expected = target.codes(w.reshape(40, -1, target.group or 128), *sides).reshape(w.shape)
    np.testing.assert_array_equal(q.codes, expected)
    assert output_error(w, q, hessian) <= output_error(w, nearest, hessian)


@pytest.mark.parametrize("name", NAMES)
def test_difficult_values(name: str) -> None:
    """Rows of zeros and of one value, groups of zeros, inputs that are never there or always zero, two equal inputs."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((8, 128), dtype=np.float32)
    w[0], w[1], w[2, :32] = 0, -0.75, 0
    x = correlated(rng, 300, 128)
    x[:, 5], x[:, 64:96], x[:, 7] = 0, 0, x[:, 6]
    q = compensate(w, made(x, name), uniform(name)).dequantize()
    assert np.isfinite(q).all() and not q[0].any()
    dead = compensate(w, made(np.zeros_like(x), name), uniform(name)).dequantize()
    assert (np.abs(dead - w) <= np.abs(w).max(axis=1, keepdims=True) * 1.01).all()


def test_damping_grows_until_it_works() -> None:
    """Inputs of rank one without damping: more is taken; inputs that are not finite are an error."""
    x = np.outer(np.arange(1, 200), np.ones(64)).astype(np.float32)
    assert made(x, "int4_g32", 0.0).damping >= 1e-4
    x[3, 3] = np.inf
    with pytest.raises(PassError, match="not finite"), np.errstate(all="ignore"):
        made(x, "int4_g32")
