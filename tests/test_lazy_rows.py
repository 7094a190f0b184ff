"""Rows of constant expressions that the interpreter asks for one by one: the same values as the whole, in few reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stemma.backends.cpu.formats.rows import pack_rows
from stemma.codegen.pack import _plain
from stemma.ir import Node, Quantized, Rows, Tensor, WeightStore, ops, quantize_array
from stemma.ir import rows as lazy
from stemma.ir.rows import LazyRows

WEIGHT = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
pytestmark = pytest.mark.quick


@pytest.mark.parametrize("format", ["int4_g32", "int4_g32_s40"])
@pytest.mark.parametrize("taken", [64, 1 << 10, 1 << 22])
def test_taken_rows_are_those_of_the_whole(format: str, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "TAKEN", taken)
    store = WeightStore()
    store.add("w", Tensor("f32", WEIGHT.shape), lambda: WEIGHT, lambda: WEIGHT)
    rows = LazyRows(ops.quantize(ops.weight(name="w", type=Tensor("f32", WEIGHT.shape)), dtype=format), store)
    whole = quantize_array(WEIGHT, format).dequantize()
    for ids in ([[3]], [[0, 299], [299, 7]], [range(300)], [range(0, 300, 3)], [[5, 5, 6, 40, 41, 200]]):
        places = np.array([list(row) for row in ids])
        assert np.array_equal(rows.take(places), whole[places])


def test_neighbours_are_read_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the neurons, as contextual sparsity picks them, is not a read and a rounding for each."""
    reads = []
    block = Rows.block

    def counted(self: Rows, node: Node, start: int, stop: int, raw: bool = False) -> Any:
        reads.append(node)
        return block(self, node, start, stop, raw)

    monkeypatch.setattr(Rows, "block", counted)
    store = WeightStore()
    store.add("w", Tensor("f32", WEIGHT.shape), lambda: WEIGHT, lambda: WEIGHT)
    rows = LazyRows(ops.weight(name="w", type=Tensor("f32", WEIGHT.shape)), store)
    rows.take(np.arange(0, 300, 3))
    assert len(reads) == 1
    rows.take(np.array([1, 2, 100, 290]))
    assert len(reads) == 4


@pytest.mark.parametrize("format", ["int8", "int4_g32"])
def test_rows_of_a_transposed_weight_are_packed(format: str) -> None:
    """As contextual sparsity stores down projections: rounding gives parts in the order of columns."""
    turned = quantize_array(WEIGHT[:256].T, format)
    in_columns = Quantized(format, {k: np.asfortranarray(v) for k, v in turned.parts.items()})
    in_rows = Quantized(format, {k: np.ascontiguousarray(v) for k, v in turned.parts.items()})
    assert np.array_equal(_plain(in_columns, format), pack_rows(in_rows, format))
