"""SqueezeLLM (Kim et al., arXiv 2306.07629): a codebook for every row by weighted k-means, and a few outliers kept apart.

The weight of an element is its sensitivity. The paper takes squared gradients, the diagonal Fisher information E[(g_i x_j)^2] of
an output's gradient g_i and an input x_j. Clusters are made within rows, where only the ratio of weights matters; when gradient
and input are independent it is E[x_j^2], which needs no gradients. That is what is used here.

With `compensate`, codes are then chosen as GPTQ does, column by column under these codebooks: not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stemma.ir import Array, Format, Node, PassError, Quantized, Rows, format_of
from stemma.ir.formats.base import as_f16
from stemma.ir.formats.codebook import fit
from stemma.passes.calibrate import CalibratedWeights, Site, columns_of, float_rows, row_blocks, rows_of
from stemma.passes.gptq import check_damp, feed_back, hessian_of
from stemma.passes.hessian import Hessian, mean_squares

MOST_OUTLIERS = 0.05


@dataclass(frozen=True)
class SqueezeLLM(CalibratedWeights):
    """Store weights of linears as codes of a codebook per row, chosen by sensitivity, with outliers apart (SqueezeLLM).

    bits: 3 or 4. outliers: share of a row's elements that are kept apart in f16. compensate: choose codes so that the columns that
    are left make up for what rounding a column changes (see gptq); damp: for that.
    """

    bits: int = 4
    outliers: float = 0.0045
    compensate: bool = False
    damp: float = 0.01
    name: ClassVar[str] = "squeezellm"

    def validate(self) -> None:
        check_damp(self, self.damp)
        if self.bits not in (3, 4) or not 0 <= self.outliers <= MOST_OUTLIERS:
            raise PassError(
                f"squeezellm: bits={self.bits} and outliers={self.outliers} are not available; use 3 or 4 bits, and a share of "
                f"outliers from 0 to {MOST_OUTLIERS}."
            )

    def target(self, weight: Node) -> Format:
        return format_of(f"nu{self.bits}_o{round(self.outliers * columns_of(weight))}")

    def choose(self, site: Site, take: Callable[[Node], Rows]) -> Iterator[tuple[Node, Quantized]]:
        squares, target = mean_squares(site.inputs), self.target(site.weights[0])
        hessian = hessian_of(site, 0, self.damp, order=True) if self.compensate else None
        for weight in site.weights:
            rows, parts = take(weight), []
            for start, stop in row_blocks(rows_of(weight), 4 * site.columns):  # fit computes in float64
                values = float_rows(rows, start, stop)
                found = fit(values, squares, self.bits, round(self.outliers * site.columns))
                parts.append(Quantized(target.name, found if hessian is None else compensated(values, found, hessian)))
            yield weight, Quantized.concatenate(parts)


def compensated(values: NDArray[np.float32], parts: dict[str, Array], hessian: Hessian) -> dict[str, Array]:
    """The parts of rows [R, K] with codes and outliers chosen again, under the same codebooks and outliers' columns."""
    count, columns = values.shape
    each, codebook = np.arange(count), parts["codebook"]
    middles = ((codebook[:, 1:] + codebook[:, :-1]) / 2).T
    apart = np.zeros((count, columns), np.bool_)
    np.put_along_axis(apart, parts["columns"].astype(np.intp), True, axis=1)
    w = np.ascontiguousarray(values[:, hessian.order].T)
    codes = np.empty((count, columns), np.int8)

    def rounded(i: int) -> Array:
        place = hessian.order[i]
        codes[:, place] = (w[i] > middles).sum(axis=0)
        return np.where(apart[:, place], w[i], codebook[each, codes[:, place]])

    feed_back(w, hessian, rounded)
    final = np.empty_like(values)
    final[:, hessian.order] = w.T
    rest = (final - np.take_along_axis(codebook, codes.astype(np.intp), 1))[each[:, None], parts["columns"].astype(np.intp)]
    return {**parts, "codes": codes, "outliers": as_f16(rest, "SqueezeLLM's outliers")}
