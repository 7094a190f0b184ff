"""GPTQ (Frantar et al., arXiv 2210.17323): codes that keep a linear's outputs on calibration text, not its weights.

Columns of W [N, K] are rounded one after the other; what rounding a column changes is made up for by the columns that are left,
as the inverse Hessian of the inputs says: w_j -= (w_i - q_i) U_ij / U_ii for all j > i, with H^-1 = U^T U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stemma.ir import Array, Format, Node, PassError, Quantized, Rows, format_of
from stemma.ir.formats.base import as_f16
from stemma.ir.formats.uniform import Uniform
from stemma.passes.calibrate import Calibrated, Site, float_rows, row_blocks
from stemma.passes.hessian import Hessian, mean_squares

BLOCK = 128  # columns that are updated at once by a matrix product


@dataclass(frozen=True)
class Gptq(Calibrated):
    """Quantize weights with second-order compensation (GPTQ), for a format of uniform codes.

    damp: share of the mean of H's diagonal that is added to it. order: columns with the largest inputs first; with groups, whole
    groups are ordered, and columns within each. Scales are fitted to the updated weights when their group begins.
    """

    format: str = "int4_g64"
    damp: float = 0.01
    order: bool = True
    name: ClassVar[str] = "gptq"

    def stored_format(self) -> Format:
        return uniform(self.name, self.format, self.damp)

    def choose(self, site: Site, take: Callable[[Node], Rows]) -> Iterator[tuple[Node, Quantized]]:
        target = self.stored_format()
        assert isinstance(target, Uniform)
        squares = mean_squares(site.inputs)
        order = column_order(squares, target.group) if self.order else np.arange(site.columns)
        hessian = Hessian(site.inputs, squares, order, self.damp)
        for weight in site.weights:
            rows, count = take(weight), int(str(weight.shape[0]))
            parts = [compensate(float_rows(rows, start, stop), hessian, target) for start, stop in row_blocks(count, site.columns)]
            yield weight, Quantized.concatenate(parts)


def uniform(owner: str, name: str, damp: float) -> Uniform:
    """The uniform format of this name; PassError when it is another kind, or `damp` is out of range."""
    found = format_of(name)
    if not isinstance(found, Uniform) or name.startswith("q8"):
        raise PassError(f"{owner}: format={name!r} has no uniform codes. Use int2_gN, int3_gN, int4_gN, int8, uint4_gN or alike.")
    if not 0 <= damp <= 1:
        raise PassError(f"{owner}: damp={damp} is out of range; use 0 to 1, 0.01 as a rule.")
    return found


def column_order(squares: NDArray[np.float64], group: int) -> NDArray[np.int64]:
    """Columns by descending mean square; groups stay together, ordered by that of their largest column."""
    group = group or len(squares)
    grouped = squares.reshape(-1, group)
    inner = np.argsort(-grouped, axis=1, kind="stable")
    outer = np.argsort(-grouped.max(axis=1), kind="stable")
    return np.asarray((outer[:, None] * group + inner[outer]).reshape(-1))


def compensate(weight: NDArray[np.float32], hessian: Hessian, target: Uniform) -> Quantized:
    """GPTQ codes and scales of rows [R, K]."""
    rows, columns = weight.shape
    group = target.group or columns
    w = np.ascontiguousarray(weight[:, hessian.order].T)  # [K, R]: a column is contiguous, and changes in place
    codes = np.empty((columns, rows), np.float32)
    groups = hessian.order[::group] // group  # of each group in this order, its place in the row
    names = ("scales", "zeros") if target.zeros else ("scales",)
    sides = np.empty((2, columns // group, rows), np.float32)
    block = BLOCK if group % BLOCK == 0 else group * max(1, BLOCK // group)
    for start in range(0, columns, block):
        stop = min(columns, start + block)
        factor = hessian.factor(start, stop)
        errors = np.empty((stop - start, rows), np.float32)
        for i in range(start, stop):
            if i % group == 0:
                fitted = target.round_rows(np.ascontiguousarray(w[i : i + group].T))
                for side, part in zip(sides, names, strict=False):
                    side[i // group] = fitted[part][:, 0]
            own = [side[i // group][:, None] for side in sides[: 1 + target.zeros]]
            codes[i] = target.codes(w[i][:, None, None], *own)[:, 0, 0]
            value = codes[i] - own[1][:, 0] if target.zeros else codes[i]
            error = (w[i] - value * own[0][:, 0]) / factor[i - start, i - start]
            errors[i - start] = error
            w[i + 1 : stop] -= factor[i - start, i + 1 - start : stop - start, None] * error
        if stop < columns:
            w[stop:] -= factor[:, stop - start :].T @ errors
    levels = codes - np.repeat(sides[1], group, axis=0) if target.zeros else codes
    refit(weight[:, hessian.order].T, levels, sides[0], hessian, target)
    found = {"codes": codes, "scales": sides[0]} | ({"zeros": sides[1]} if target.zeros else {})
    places = {"codes": hessian.order, "scales": groups, "zeros": groups}
    return Quantized(target.name, {name: _placed(part, places[name], name) for name, part in found.items()})


def refit(weight: Array, levels: Array, scales: Array, hessian: Hessian, target: Uniform, sweeps: int = 1) -> None:
    """Fit scales [groups, R] to levels c [K, R] (codes less zero points) in place, so that (w - s c)^T H (w - s c) becomes least:
    group by group, each rounded as it is stored before the next.

    weight: [K, R]. All in the order of `hessian`.
    """
    group = len(levels) // len(scales)
    error = weight - levels * np.repeat(scales, group, axis=0)
    for _ in range(sweeps):
        for g in range(len(scales)):
            part = slice(g * group, (g + 1) * group)
            rows = hessian.rows(part.start, part.stop)
            level = levels[part]
            energy = np.einsum("ir,ir->r", level, rows[:, part] @ level)
            gain = np.einsum("ir,ir->r", level, rows @ error)
            best = scales[g] + np.divide(gain, energy, out=np.zeros_like(energy), where=energy > 0)
            best = np.where(energy > 0, best, np.float32(0))
            best = best if target.scale_bits == 32 else as_f16(best, target.name)
            error[part] += level * (scales[g] - best)
            scales[g] = best


def _placed(part: Array, places: Array, name: str) -> Array:
    """A part [n, R] in the order of processing as rows [R, n] in that of the weight."""
    found = np.empty(part.shape[::-1], np.int8 if name == "codes" else np.float32)
    found[:, places] = part.T
    return found
