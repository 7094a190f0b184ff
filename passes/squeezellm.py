"""SqueezeLLM (Kim et al., arXiv 2306.07629): a codebook for every row by weighted k-means, and a few outliers kept apart.

The weight of an element is its sensitivity. The paper takes squared gradients, the diagonal Fisher information E[(g_i x_j)^2] of
an output's gradient g_i and an input x_j. Clusters are made within rows, where only the ratio of weights matters; when gradient
and input are independent it is E[x_j^2], which needs no gradients. That is what is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Format, Node, PassError, Quantized, Rows, format_of
from stemma.ir.formats.codebook import fit
from stemma.passes.calibrate import CalibratedWeights, Site, columns_of, float_rows, row_blocks, rows_of
from stemma.passes.hessian import mean_squares

MOST_OUTLIERS = 0.05


@dataclass(frozen=True)
class SqueezeLLM(CalibratedWeights):
    """Store weights of linears as codes of a codebook per row, chosen by sensitivity, with outliers apart (SqueezeLLM).

    bits: 3 or 4. outliers: share of a row's elements that are kept apart in f16.
    """

    bits: int = 4
    outliers: float = 0.0045
    name: ClassVar[str] = "squeezellm"

    def target(self, weight: Node) -> Format:
        if self.bits not in (3, 4) or not 0 <= self.outliers <= MOST_OUTLIERS:
            raise PassError(
                f"squeezellm: bits={self.bits} and outliers={self.outliers} are not available; use 3 or 4 bits, and a share of "
                f"outliers from 0 to {MOST_OUTLIERS}."
            )
        return format_of(f"nu{self.bits}_o{round(self.outliers * columns_of(weight))}")

    def choose(self, site: Site, take: Callable[[Node], Rows]) -> Iterator[tuple[Node, Quantized]]:
        squares, target = mean_squares(site.inputs), self.target(site.weights[0])
        for weight in site.weights:
            rows = take(weight)
            parts = [
                fit(float_rows(rows, start, stop), squares, self.bits, round(self.outliers * site.columns))
                for start, stop in row_blocks(rows_of(weight), 4 * site.columns)  # fit computes in float64
            ]
            yield weight, Quantized.concatenate([Quantized(target.name, part) for part in parts])
