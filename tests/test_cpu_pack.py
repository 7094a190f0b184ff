"""Packing of weights into the CPU kernels' panels and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.backends.cpu import pack


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
    assert back_scales is None if scales is None else np.array_equal(scales, np.asarray(back_scales))


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        pack.pack_linear(np.zeros((4, 96), np.int8), "int4_g64", np.zeros((4, 1), np.float16))
    with pytest.raises(ValueError, match="unknown packed weight format"):
        pack.linear_bytes(1, 1, "int5")
    with pytest.raises(ValueError, match="scales of shape"):
        pack.pack_linear(np.zeros((4, 64), np.int8), "int8", np.zeros(5, np.float32))
