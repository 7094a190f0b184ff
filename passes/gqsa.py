"""GQSA (arXiv 2412.17560): int4 with whole groups pruned, calibrated in two stages.

1. Groups are chosen by saliency, s_g = sum_j w_j^2 / [H^-1]_jj, the least ones of every 16 rows are pruned, and the others
   are rounded; the columns that are left make up for both, as in GPTQ.
2. The scales of what is kept are fitted by least squares to the original layer's outputs, (w - s c)^T H (w - s c).

The paper trains weights and scales of a block by gradients in its first stage, and all scales through the whole model in its
second; here both are solved layer by layer, without gradients. The paper's own saliency could not be read: this is that of optimal
brain surgeons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stemma.ir import Format, Node, PassError, Quantized, Rows, format_of
from stemma.ir.formats.group_sparse import GroupSparse
from stemma.passes.calibrate import CalibratedWeights, Site, float_rows, row_blocks, rows_of
from stemma.passes.gptq import check_damp, compensate, hessian_of, uniform_of

SWEEPS = 4  # of the second stage over all groups


@dataclass(frozen=True)
class Gqsa(CalibratedWeights):
    """Prune groups of int4 weights by saliency, quantize the others (GQSA). Embeddings, and what is tied to them, are left alone.

    sparsity: percent of the groups that are pruned, 20 to 60. group: columns of a group: 16, 32 or 64. damp: see gptq.
    """

    embeddings: bool = False
    sparsity: int = 50
    bits: int = 4
    group: int = 32
    damp: float = 0.01
    name: ClassVar[str] = "gqsa"

    def validate(self) -> None:
        check_damp(self, self.damp)
        if self.bits != 4:
            raise PassError(f"gqsa: bits={self.bits} is not available; what is kept has 4.")
        if self.group not in (16, 32, 64) or not 20 <= self.sparsity <= 60:
            raise PassError(
                f"gqsa: group={self.group} and sparsity={self.sparsity} are not available; use groups of 16, 32 or 64 columns, "
                "and a sparsity of 20 to 60 percent."
            )

    def target(self, weight: Node) -> Format:
        return format_of(f"int4_g{self.group}_s{self.sparsity}")

    def choose(self, site: Site, take: Callable[[Node], Rows]) -> Iterator[tuple[Node, Quantized]]:
        target = self.target(site.weights[0])
        assert isinstance(target, GroupSparse)
        dense = uniform_of(self.name, target.dense.name)
        hessian = hessian_of(site, self.group, self.damp, order=True)
        worth = np.empty(site.columns)
        worth[hessian.order] = 1 / hessian.inverse_diagonal().astype(np.float64)
        for weight in site.weights:
            rows, parts = take(weight), []
            for start, stop in row_blocks(rows_of(weight), site.columns, target.rows_together):
                values = float_rows(rows, start, stop)
                saliency = (values.astype(np.float64) ** 2 * worth).reshape(len(values), -1, self.group).sum(axis=-1)
                kept = target.keep(saliency)
                made = compensate(values, hessian, dense, lambda g, w, d: np.broadcast_to(kept[:, g], w.shape), SWEEPS)  # noqa: B023
                parts.append(Quantized(target.name, {**made.parts, "kept": kept}))
            yield weight, Quantized.concatenate(parts)
