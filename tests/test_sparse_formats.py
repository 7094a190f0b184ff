"""Rules of the sparse and codebook formats that the laws of all formats do not cover."""

from __future__ import annotations

import numpy as np
import pytest

from stemma.backends.cpu.formats import pack_linear, packing_of
from stemma.ir import Quantized, Rows, Tensor, TypeMismatch, WeightStore, dtype, format_of, ops, quantize_array
from stemma.ir.formats import codebook
from stemma.ir.formats.group_sparse import GroupSparse


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


@pytest.mark.parametrize(("name", "rows", "counts"), [("int4_g64_s50", 40, [64, 64, 32]), ("int4_g16_s20", 17, [410, 26])])
def test_every_unit_keeps_the_same_number_of_groups(name: str, rows: int, counts: list[int]) -> None:
    """16 rows lose a fixed number of groups, those of least energy, wherever they are; a unit of fewer rows loses its share."""
    w = normal(rows, 512) * np.linspace(0.1, 2, rows, dtype=np.float32)[:, None]
    stored = quantize_array(w, name)
    kept, group = stored.parts["kept"], dtype(name).group
    assert [int(kept[u : u + 16].sum()) for u in range(0, rows, 16)] == counts
    energy = (w.reshape(rows, -1, group) ** 2).sum(-1)
    assert energy[:16][kept[:16]].min() >= energy[:16][~kept[:16]].max()
    pruned = stored.codes.reshape(rows, -1, group)[~kept]
    assert not pruned.any() and not stored.scales[~kept].any()


def test_rows_of_a_rounded_weight_do_not_depend_on_the_block() -> None:
    """A row is rounded with the 16 that it belongs to, whichever rows are asked for."""
    w = normal(50, 128)
    store = WeightStore()
    store.add("w", Tensor("f32", w.shape), lambda: w, raw=lambda: w)
    node = ops.quantize(ops.weight(name="w", type=Tensor("f32", w.shape)), dtype="int4_g32_s40")
    rows, whole = Rows(node, store), quantize_array(w, "int4_g32_s40")
    for start, stop in ((0, 50), (3, 4), (17, 40), (47, 50)):
        block = rows.block(node, start, stop)
        assert all(np.array_equal(block.parts[p], whole.parts[p][start:stop]) for p in whole.parts)


def test_rows_that_break_the_rules_are_not_packed() -> None:
    """A unit with too many kept groups, four columns with three codes: errors that say so, not wrong sums."""
    stored = quantize_array(normal(16, 256), "int4_g64_s50")
    dense = Quantized("int4_g64_s50", {**stored.parts, "kept": np.ones((16, 4), np.bool_)})
    with pytest.raises(ValueError, match="keep more than 32 groups"):
        pack_linear(dense, "int4_g64_s50")
    three = Quantized("int4_g64_2of4", quantize_array(normal(16, 256), "int4_g64").parts)
    with pytest.raises(ValueError, match="more than two codes"):
        pack_linear(three, "int4_g64_2of4")


def test_names_and_sizes_that_do_not_exist() -> None:
    for name in ("int4_g8_s50", "int4_g64_s70", "int4_g32_2of4", "nu4_o2000"):
        with pytest.raises(TypeMismatch, match=name):
            dtype(name)
    assert "up to 131072" in packing_of("int4_g64_s50").refusal(1 << 18)
    assert "more than the 65536 columns" in packing_of("nu4_o1").refusal(1 << 17)


def test_of_four_columns_the_largest_two_stay() -> None:
    w = normal(8, 128)
    codes = quantize_array(w, "int4_g64_2of4").codes.reshape(8, -1, 4)
    order = np.argsort(-np.abs(w.reshape(8, -1, 4)), axis=-1)
    assert not np.take_along_axis(codes, order[..., 2:], -1).any()
    assert (np.take_along_axis(codes, order[..., :1], -1) != 0).mean() > 0.95


def test_codebook_puts_its_values_where_the_weights_are() -> None:
    """Sensitive columns come out nearer than with equal weights; values of outliers are exact up to f16."""
    w = normal(6, 512)
    w[:, ::8] *= 0.1
    w[:, 100] = 40.0
    sensitivity = np.where(np.arange(512) % 8 == 0, 100.0, 1.0)
    plain, weighted = codebook.fit(w, None, 3, 2), codebook.fit(w, sensitivity, 3, 2)

    def error(parts: dict[str, np.ndarray]) -> float:
        return float((sensitivity * (format_of("nu3_o2").dequantize(Quantized("nu3_o2", parts)) - w) ** 2).sum())

    assert error(weighted) < 0.8 * error(plain)
    assert all((np.asarray(parts["columns"]) == 100).any(axis=1).all() for parts in (plain, weighted))
    back = format_of("nu3_o2").dequantize(Quantized("nu3_o2", plain))
    assert np.abs(back[:, 100] - 40).max() < 0.02


def test_codebook_of_odd_rows() -> None:
    """Rows with fewer values than entries or outliers, sensitivities that are zero, and those that do not fit."""
    few = codebook.fit(normal(3, 4), np.zeros(4), 4, 9)
    assert few["outliers"].shape == (3, 9) and not few["outliers"][:, 4:].any()
    assert np.abs(format_of("nu4_o9").dequantize(Quantized("nu4_o9", few)) - normal(3, 4)).max() < 1e-2
    for bad in (np.ones(5), -np.ones(4), np.full(4, np.nan)):
        with pytest.raises(TypeMismatch, match="sensitivities"):
            codebook.fit(normal(3, 4), bad, 4, 0)
    with pytest.raises(TypeMismatch, match="overflows f16"):
        codebook.fit(np.full((1, 8), 1e6, np.float32), None, 4, 0)


def test_a_group_of_activations_covers_a_group_of_weights() -> None:
    """RoundActivations asks the format: groups of 16 share the scale of 32 activations."""
    groups = {n: format_of(n).activation_group for n in ("int4_g16_s50", "int4_g32_s50", "int4_g64_s50", "nu4_o9")}
    assert groups == {"int4_g16_s50": 32, "int4_g32_s50": 32, "int4_g64_s50": 64, "nu4_o9": 64}
    assert all(f"q8_g{g}" in packing_of(n).activations for n, g in groups.items())
    assert isinstance(format_of("int4_g16_s50"), GroupSparse)
