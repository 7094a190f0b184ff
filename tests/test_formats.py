"""Laws of every weight format, of the IR and of the CPU: a new one is tested by being listed in its family's EXAMPLES."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_harness import NAMES, Library, activations, build, linear, random_weight, same_bits, source
from stemma.backends.cpu.formats import FAMILIES, linear_bytes, pack_linear, packing_of, unpack_linear
from stemma.backends.cpu.render_templates import render
from stemma.ir import Format, Quantized, Tensor, TypeMismatch, dtype, quantize_array

U = 2.0**-24
WEIGHTS = [w for f in FAMILIES for w in f.EXAMPLES]
PAIRS = [(w, a) for w in WEIGHTS for a in packing_of(w).activations]
FORMATS = [w for w in WEIGHTS if isinstance(dtype(w), Format)]


def columns(name: str, count: int) -> int:
    """`count`, rounded up to rows that the format takes."""
    group = dtype(name).group or 1
    return -(-count // group) * group


def libraries_of(family: Any) -> dict[str, Library]:
    """The kernels of a family's examples, `linear_WEIGHT__ACTIVATION` and `embed_WEIGHT`, by instruction set."""
    kernels = []
    for w in family.EXAMPLES:
        made = packing_of(w)
        kernels += [linear(f"linear_{w}__{a}", w, a) for a in made.activations]
        kernels.append(
            render("embedding.hpp.j2", name=f"embed_{w}", weight=w, layout="panel", scale=1.5, core=made.core, **made.seams())
        )
    return build(source(kernels))


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda f: f.__name__.split(".")[-1])
def family_libraries(request: pytest.FixtureRequest) -> dict[str, Library]:
    return libraries_of(request.param)


@pytest.fixture
def weights(family_libraries: dict[str, Library]) -> Any:
    """The pairs (weight, activation) that the libraries of this family have."""
    native = next(iter(family_libraries.values())).native
    return [(w, a) for w, a in PAIRS if hasattr(native, f"run_linear_{w}__{a}")]


def error_bound(exact: Any, values: Any, k: int, activation: str) -> Any:
    """A rounding per product-sum (per group of exact integer dots), and of scale, zero point, conversion and total."""
    group = int(activation[4:]) if activation.startswith("q8") else 1
    return (2 * k / group + 6) * U * (np.abs(exact) @ np.abs(values).T) + 1e-37


@pytest.mark.parametrize("variant", NAMES)
def test_linear(family_libraries: dict[str, Library], weights: Any, variant: str) -> None:
    """Within the bound of float64; the same bits whatever the rows and threads."""
    library = family_libraries[variant]
    rng = np.random.default_rng(3)
    for weight, activation in weights:
        for n, least in ((1, 128), (63, 128), (65, 7), (100, 128), (20, 1024), (70, 2049), (7, 6150)):
            k = columns(weight, least)
            packed, values = random_weight(rng, n, k, weight)
            x = rng.standard_normal((64, k), dtype=np.float32)
            whole = np.zeros((64, n), np.float32)
            rows, exact = activations(x, activation)
            library.call(f"linear_{weight}__{activation}", 2, 64, n, k, rows, packed, whole)
            assert (np.abs(whole - exact @ values.T) <= error_bound(exact, values, k, activation)).all(), (weight, activation, n, k)
            for m, threads in ((1, 1), (1, 2), (2, 2), (7, 1), (13, 2), (64, 1)):
                part = np.full((m, n), np.nan, np.float32)
                library.call(f"linear_{weight}__{activation}", threads, m, n, k, np.ascontiguousarray(rows[64 - m :]), packed, part)
                assert same_bits(part, whole[64 - m :]), (weight, activation, n, k, m, threads)


@pytest.mark.parametrize("variant", NAMES)
def test_linear_of_a_weight_from_memory(family_libraries: dict[str, Library], weights: Any, variant: str) -> None:
    """A weight of more than 2 MB is split by panels, and its tiles are not equally high: the bits of a row are the same."""
    library = family_libraries[variant]
    rng = np.random.default_rng(18)
    for weight, activation in weights:
        k = columns(weight, 256)
        n = 64 * ((2 << 20) // packing_of(weight).panel_bytes(k) + 1) - 5
        packed, values = random_weight(rng, n, k, weight)
        rows, exact = activations(rng.standard_normal((23, k), dtype=np.float32), activation)
        whole = np.zeros((23, n), np.float32)
        library.call(f"linear_{weight}__{activation}", 2, 23, n, k, rows, packed, whole)
        assert (np.abs(whole - exact @ values.T) <= error_bound(exact, values, k, activation)).all(), (weight, activation)
        for m, threads in ((1, 1), (1, 2), (4, 2), (6, 1), (7, 2), (8, 1), (10, 2)):
            part = np.full((m, n), np.nan, np.float32)
            library.call(f"linear_{weight}__{activation}", threads, m, n, k, np.ascontiguousarray(rows[23 - m :]), packed, part)
            assert same_bits(part, whole[23 - m :]), (weight, activation, m, threads)


@pytest.mark.parametrize("variant", NAMES)
def test_embedding(family_libraries: dict[str, Library], weights: Any, variant: str) -> None:
    """Rows of a packed weight; zeros for tokens that are none."""
    rng = np.random.default_rng(9)
    for weight in dict.fromkeys(w for w, _ in weights):
        vocab, k = 130, columns(weight, 96)
        packed, values = random_weight(rng, vocab, k, weight)
        tokens = np.array([0, 129, 64, -1, 63, 130], np.int32)
        y = np.full((6, k), np.nan, np.float32)
        family_libraries[variant].call(f"embed_{weight}", 2, 6, vocab, k, tokens, packed, y)
        assert not y[[3, 5]].any()
        known = [0, 1, 2, 4]
        assert (np.abs(y[known] - 1.5 * values[tokens[known]]) <= 4 * U * np.abs(y[known])).all(), weight


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WEIGHTS), st.integers(1, 200), st.integers(1, 300), st.integers(0, 1 << 30))
def test_packing_round_trip(name: str, n: int, least: int, seed: int) -> None:
    """What was packed is unpacked, part by part, and has the promised size."""
    k = columns(name, least)
    w = np.random.default_rng(seed).standard_normal((n, k), dtype=np.float32)
    value: Any = quantize_array(w, name) if name in FORMATS else w if name == "f32" else w.view(np.uint32).astype(np.uint16)
    packed = pack_linear(value, name)
    assert packed.nbytes == linear_bytes(n, k, name)
    back = unpack_linear(packed, n, k, name)
    if isinstance(value, Quantized):
        assert back.parts.keys() == value.parts.keys()
        assert all(np.array_equal(back.parts[p], value.parts[p]) for p in value.parts)
    else:
        assert np.array_equal(back, value)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_as_declared(name: str) -> None:
    """Types and shapes of the parts; the size of the packed weight is what the element type says, with little padding."""
    k = columns(name, 512)
    stored = quantize_array(np.random.default_rng(0).standard_normal((128, k), dtype=np.float32), name)
    declared = dtype(name).parts(k)  # type: ignore[attr-defined]
    assert {n: (p.dtype.type, p.shape[1:]) for n, p in stored.parts.items()} == declared
    assert stored.dequantize().dtype == np.float32 and stored.dequantize().shape == (128, k)
    bytes_said = Tensor(name, (128, k)).bytes
    assert bytes_said <= linear_bytes(128, k, name) <= 1.02 * bytes_said + 512  # type: ignore[operator]


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_of_values_that_are_difficult(name: str) -> None:
    """Zeros stay zeros; rounding what was rounded changes little; NaN, infinities and rows that do not fit are errors."""
    k = columns(name, 256)
    assert not quantize_array(np.zeros((3, k), np.float32), name).dequantize().any()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((32, k), dtype=np.float32)
    x[0] = 1.0
    x[1] = -1e-30
    once = quantize_array(x, name).dequantize()
    assert np.isfinite(once).all()
    assert np.linalg.norm(once[2:] - x[2:]) < 0.95 * np.linalg.norm(x[2:])
    for bad in (np.nan, np.inf):
        y = x.copy()
        y[1, 3] = bad
        with pytest.raises(TypeMismatch, match="not finite"):
            quantize_array(y, name)
    if dtype(name).group:
        with pytest.raises(TypeMismatch, match="no multiple"):
            quantize_array(np.zeros((1, k + 1), np.float32), name)
