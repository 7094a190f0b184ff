"""GQSA: int4 by groups, of which a fixed share is pruned: int4_gN_sP (arXiv 2412.17560).

Groups are N columns (16, 32 or 64) of single rows. Of every unit of 16 rows exactly `pruned(16, columns)` groups are zero, P
percent, wherever in the unit they are; a last unit of fewer rows r has `pruned(r, columns)`. So every unit has the same work and
bytes: any division of units among threads is the paper's "task-centric" even division of the kept groups, and no partial sums have
to be joined.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemma.ir import size
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import uniform
from stemma.ir.formats.base import Array, Format, Quantized
from stemma.ir.size import SizeLike

NAMES = "int4_gN_sP"
_NAME = re.compile(r"int4_g(\d+)_s(\d+)$")
UNIT = 16  # rows that share a number of kept groups


@dataclass(frozen=True)
class GroupSparse(Format):
    """Parts: codes int8 [K] (-8..7; 0 in pruned groups), scales f32 [groups] (f16 values; 0 of pruned groups), kept bool [groups].

    value = code * scale. percent: of the groups of a unit that are pruned.
    """

    percent: int = 0

    @property
    def rows_together(self) -> int:
        return UNIT

    @property
    def activation_group(self) -> int:
        return max(32, self.group)

    def parts(self, columns: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        groups = columns // self.group
        return {"codes": (np.int8, (columns,)), "scales": (np.float32, (groups,)), "kept": (np.bool_, (groups,))}

    def pruned(self, rows: int, columns: int) -> int:
        """How many groups of so many rows of one unit are zero: P percent, rounded to the nearest, halves up."""
        return (2 * rows * (columns // self.group) * self.percent + 100) // 200

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        """Codes and a scale of every kept group, and a bit for every group."""
        groups = size.floordiv(elements, self.group)
        kept = groups - size.floordiv(groups * self.percent, 100)
        return kept * (self.group // 2 + 2) + size.floordiv(groups, 8)

    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        """Prunes the groups of least energy (sum of squares) of each unit; the others are rounded as int4_gN."""
        grouped = values.reshape(len(values), -1, self.group)
        kept = self.keep(np.einsum("rgi,rgi->rg", grouped, grouped, dtype=np.float64))
        dense = self.dense.round_rows((grouped * kept[..., None]).reshape(values.shape))
        return {**dense, "kept": kept}

    @property
    def dense(self) -> Format:
        """int4_gN: the format of what is kept."""
        found = uniform.parse(f"int4_g{self.group}")
        assert found is not None
        return found

    def keep(self, importance: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which groups stay, bool [rows, groups], by importance [rows, groups]: in every unit the least important are pruned.

        Of equals the first are pruned. Rows are those of a whole weight, or start at a multiple of 16.
        """
        rows, groups = importance.shape
        kept = np.ones((rows, groups), np.bool_)
        for start in range(0, rows, UNIT):
            unit = importance[start : start + UNIT].reshape(-1)
            count = self.pruned(len(unit) // groups, groups * self.group)
            kept[start : start + UNIT].reshape(-1)[np.argsort(unit, kind="stable")[:count]] = False
        return kept

    def dequantize(self, array: Quantized) -> NDArray[np.float32]:
        return self.dense.dequantize(array)


def parse(name: str) -> Format | None:
    """The group-sparse format of a name, or None."""
    found = _NAME.match(name)
    if not found:
        return None
    group, percent = int(found[1]), int(found[2])
    if group not in (16, 32, 64) or not 20 <= percent <= 60:
        raise TypeMismatch(f"{name}: groups of 16, 32 or 64 columns, of which 20 to 60 percent are pruned.")
    return GroupSparse(name, "quantized", 4, group, percent)
