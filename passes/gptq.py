"""GPTQ (Frantar et al., arXiv 2210.17323): codes that keep a linear's outputs on calibration text, not its weights.

Columns of W [N, K] are rounded one after the other; what rounding a column changes is made up for by the columns that are left,
as the inverse Hessian of the inputs says: w_j -= (w_i - q_i) U_ij / U_ii for all j > i, with H^-1 = U^T U. Pruning works alike
(SparseGPT, arXiv 2301.00774): a pruned weight is one that is rounded to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stemma.ir import Array, Format, Node, PassError, Quantized, Rows, format_of
from stemma.ir.formats.base import as_f16
from stemma.ir.formats.lookup import Lookup
from stemma.ir.formats.uniform import Uniform
from stemma.passes.calibrate import CalibratedWeights, Site, float_rows, row_blocks, rows_of
from stemma.passes.hessian import Hessian, mean_squares

BLOCK = 128  # columns that are updated at once by a matrix product
Keep = Callable[[int, Array, Array], Array]


@dataclass(frozen=True)
class Gptq(CalibratedWeights):
    """Quantize weights with second-order compensation (GPTQ), in a format of uniform codes or of lookup tables.

    Weights that an earlier pass rounded to nearest in such a format keep it and get better codes: --preset small --pass gptq.
    damp: share of the mean of H's diagonal that is added to it. order: columns with the largest inputs first; with groups, whole
    groups are ordered, and columns within each. Scales are fitted to the updated weights when their group begins, and once more
    to the outputs at the end.
    """

    format: str = "int4_g64"
    damp: float = 0.01
    order: bool = True
    name: ClassVar[str] = "gptq"

    def validate(self) -> None:
        uniform_of(self.name, self.format)
        check_damp(self, self.damp)

    def takes(self, weight: Node) -> bool:
        return super().takes(weight) or (weight.op.name == "quantize" and _has_codes(format_of(weight.dtype)))

    def target(self, weight: Node) -> Format:
        name = weight.dtype if weight.op.name == "quantize" else self.format
        uniform_of(self.name, name)
        return format_of(name)

    def choose(self, site: Site, take: Callable[[Node], Rows]) -> Iterator[tuple[Node, Quantized]]:
        targets = {w: uniform_of(self.name, self.target(w).name) for w in site.weights}
        for group in dict.fromkeys(t.group for t in targets.values()):
            hessian = hessian_of(site, group, self.damp, order=self.order)
            for weight in (w for w in site.weights if targets[w].group == group):
                rows = take(weight)
                parts = [
                    compensate(float_rows(rows, start, stop), hessian, targets[weight])
                    for start, stop in row_blocks(rows_of(weight), site.columns)
                ]
                yield weight, Quantized.concatenate(parts)
            del hessian


@dataclass(frozen=True)
class _Signs(Uniform):
    """lut1_gN with the interface of uniform codes: -1 and +1."""

    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        return format_of(self.name).round_rows(values)

    def codes(self, grouped: NDArray[np.float32], scale: Array, zero: Array | None = None) -> NDArray[np.float32]:
        return np.where((grouped < 0) ^ (scale[..., None] < 0), np.float32(-1), np.float32(1))


def _has_codes(found: Format) -> bool:
    return isinstance(found, Lookup | Uniform) and not found.name.startswith("q8")


def uniform_of(owner: str, name: str) -> Uniform:
    """The uniform codes behind a format's name; PassError when it has none."""
    found = format_of(name)
    if not _has_codes(found):
        raise PassError(f"{owner}: format={name!r} has no uniform codes. Use int4_g64, int2_gN, int3_gN, uint4_gN, int8 or alike.")
    if isinstance(found, Lookup):
        if found.bits == 1:
            return _Signs(name, "quantized", 1, found.group, low=-1, high=1)
        found = replace(format_of(f"int{found.bits}_g{found.group}"), name=name)
    assert isinstance(found, Uniform)
    return found


def check_damp(owner: CalibratedWeights, damp: float) -> None:
    """PassError for a share of damping that is none."""
    if not 0 <= damp <= 1:
        raise PassError(f"{owner.name}: damp={damp} is out of range; use 0 to 1, 0.01 as a rule.")


def hessian_of(site: Site, group: int, damp: float, *, order: bool, inner: bool = True) -> Hessian:
    """The Hessian of a site's inputs, its columns in the order in which they are to be rounded (see `column_order`)."""
    squares = mean_squares(site.inputs)
    columns = column_order(squares, group, inner=inner) if order else np.arange(site.columns)
    return Hessian(site.inputs, squares, columns, damp)


def column_order(squares: NDArray[np.float64], group: int, *, inner: bool = True) -> NDArray[np.int64]:
    """Columns by descending mean square; groups stay together, ordered by that of their largest column.

    inner: whether the columns of a group are ordered too.
    """
    group = group or len(squares)
    grouped = squares.reshape(-1, group)
    places = np.argsort(-grouped, axis=1, kind="stable") if inner else np.tile(np.arange(group), (len(grouped), 1))
    outer = np.argsort(-grouped.max(axis=1), kind="stable")
    return np.asarray((outer[:, None] * group + places[outer]).reshape(-1))


def compensate(
    weight: NDArray[np.float32], hessian: Hessian, target: Uniform, keep: Keep | None = None, sweeps: int = 1
) -> Quantized:
    """GPTQ codes and scales of rows [R, K].

    keep: given the place of a group in its rows, its updated weights [G, R] and the diagonal of U there, says when the group begins
    which weights are not pruned, bool [G, R]. sweeps: of the last fit of the scales, see `refit`.
    """
    rows, columns = weight.shape
    group = target.group or columns
    w = np.ascontiguousarray(weight[:, hessian.order].T)  # [K, R]: a column is contiguous, and changes in place
    codes = np.empty((columns, rows), np.float32)
    groups = hessian.order[::group] // group  # of each group in this order, its place in the row
    names = ("scales", "zeros") if target.zeros else ("scales",)
    sides = np.empty((2, columns // group, rows), np.float32)
    diagonal = np.diagonal(hessian.factor(0, columns))
    kept = np.ones((group, 1), np.bool_)

    def rounded(i: int) -> Array:
        nonlocal kept
        g = i // group
        if i % group == 0:
            part = w[i : i + group]
            if keep is not None:
                kept = keep(int(groups[g]), part, diagonal[i : i + group])
                part = part * kept
            fitted = target.round_rows(np.ascontiguousarray(part.T))
            for side, name in zip(sides, names, strict=False):
                side[g] = fitted[name][:, 0]
        codes[i] = target.codes(w[i][:, None, None], *(side[g][:, None] for side in sides[: len(names)]))[:, 0, 0]
        if keep is not None:
            codes[i] *= kept[i % group]
        return np.asarray((codes[i] - sides[1][g] if target.zeros else codes[i]) * sides[0][g])

    feed_back(w, hessian, rounded, BLOCK if group % BLOCK == 0 else group * max(1, BLOCK // group))
    levels = codes - np.repeat(sides[1], group, axis=0) if target.zeros else codes
    np.take(weight.T, hessian.order, axis=0, out=w, mode="clip")  # the original values again, without another copy
    refit(w, levels, sides[0], hessian, target, sweeps)
    found = {"codes": codes, "scales": sides[0]} | ({"zeros": sides[1]} if target.zeros else {})
    places = {"codes": hessian.order, "scales": groups, "zeros": groups}
    return Quantized(target.name, {name: _placed(part, places[name], name) for name, part in found.items()})


def feed_back(w: NDArray[np.float32], hessian: Hessian, rounded: Callable[[int], Array], block: int = BLOCK) -> None:
    """Columns w [K, R], in the order of `hessian`, are rounded one by one, and those that are left make up for it, in place.

    rounded: given a column's number, what w[i], as it is by then, becomes. block: columns after which the rest is brought up to
    date; a group that begins with a block is.
    """
    columns, rows = w.shape
    for start in range(0, columns, block):
        stop = min(columns, start + block)
        factor = hessian.factor(start, stop)
        errors = np.empty((stop - start, rows), np.float32)
        for i in range(start, stop):
            error = (w[i] - rounded(i)) / factor[i - start, i - start]
            errors[i - start] = error
            w[i + 1 : stop] -= factor[i - start, i + 1 - start : stop - start, None] * error
        if stop < columns:
            w[stop:] -= factor[:, stop - start :].T @ errors


def refit(w: Array, levels: Array, scales: Array, hessian: Hessian, target: Uniform, sweeps: int = 1) -> None:
    """Fit scales [groups, R] to levels c [K, R] (codes less zero points) in place, so that (w - s c)^T H (w - s c) becomes least:
    group by group, each rounded as it is stored before the next.

    w: the original columns [K, R]; they become the errors that are left. All in the order of `hessian`.
    """
    group = len(levels) // len(scales)
    for g in range(len(scales)):
        w[g * group : (g + 1) * group] -= levels[g * group : (g + 1) * group] * scales[g]
    for _ in range(sweeps):
        for g in range(len(scales)):
            part = slice(g * group, (g + 1) * group)
            rows = hessian.rows(part.start, part.stop)
            level = levels[part]
            energy = np.einsum("ir,ir->r", level, rows[:, part] @ level)
            gain = np.einsum("ir,ir->r", level, rows @ w)
            best = scales[g] + np.divide(gain, energy, out=np.zeros_like(energy), where=energy > 0)
            best = np.where(energy > 0, best, np.float32(0))
            best = best if target.scale_bits == 32 else as_f16(best, target.name)
            w[part] += level * (scales[g] - best)
            scales[g] = best


def _placed(part: Array, places: Array, name: str) -> Array:
    """A part [n, R] in the order of processing as rows [R, n] in that of the weight."""
    found = np.empty(part.shape[::-1], np.int8 if name == "codes" else np.float32)
    found[:, places] = part.T
    return found
