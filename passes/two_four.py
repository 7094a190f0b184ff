"""2:4 sparsity with int4 codes, as SparseGPT prunes (Frantar & Alistarh, arXiv 2301.00774).

Of every four consecutive columns the two are pruned whose removal costs least, w_j^2 / U_jj^2; the columns that are left make up
for pruning and rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stemma.ir import Array, Format, Node, PassError, Quantized, Rows, format_of
from stemma.ir.formats.two_four import TwoFour as TwoFourFormat
from stemma.ir.formats.two_four import keep
from stemma.passes.calibrate import CalibratedWeights, Site, float_rows, row_blocks, rows_of
from stemma.passes.gptq import check_damp, compensate, hessian_of, uniform_of

SWEEPS = 4  # of the last fit of the scales


@dataclass(frozen=True)
class TwoFour(CalibratedWeights):
    """Prune two of every four weights and quantize the others to int4 (2:4). Embeddings, and what is tied to them, are left alone.

    group: columns that share a scale, 64 or 128. damp: see gptq.
    """

    embeddings: bool = False
    group: int = 64
    damp: float = 0.01
    name: ClassVar[str] = "two_four"

    def validate(self) -> None:
        check_damp(self, self.damp)
        if self.group not in (64, 128):
            raise PassError(f"two_four: group={self.group} is not available; use 64 or 128 columns.")

    def target(self, weight: Node) -> Format:
        return format_of(f"int4_g{self.group}_2of4")

    def choose(self, site: Site, take: Callable[[Node], Rows]) -> Iterator[tuple[Node, Quantized]]:
        target = self.target(site.weights[0])
        assert isinstance(target, TwoFourFormat)
        dense = uniform_of(self.name, target.dense.name)
        hessian = hessian_of(site, self.group, self.damp, order=True, inner=False)
        for weight in site.weights:
            rows, parts = take(weight), []
            for start, stop in row_blocks(rows_of(weight), site.columns):
                made = compensate(float_rows(rows, start, stop), hessian, dense, _cheapest, SWEEPS)
                parts.append(Quantized(target.name, made.parts))
            yield weight, Quantized.concatenate(parts)


def _cheapest(group: int, weights: Array, diagonal: Array) -> Array:
    return keep(np.ascontiguousarray((weights / diagonal[:, None]).T ** 2)).T
