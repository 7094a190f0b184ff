"""Group-sparse int4 (GQSA). A panel lists its kept groups column by column, outputs ascending, in packs of up to 16 outputs:

masks    u64 a column of groups: bit i is set when output i of the panel keeps its group
scales   f16 a kept group
codes    a pack of W outputs is [N/8][W] little-endian dwords; byte i of a dword is (code[k+i] + 8) | (code[k+4+i] + 8) << 4

and zeros up to a multiple of 64 bytes, at least 64: the kernel reads packs by 16 outputs. Scales and codes have places for four
units of 16 rows; fewer rows leave the last ones empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.formats.base import PANEL, UNIT, Bytes, Packing, padded, quantized, raw
from stemma.ir import DType
from stemma.ir.formats.group_sparse import GroupSparse

GROUPS_MOST = 2048  # of a row: prepared rows of x have to fit into the scratch of a thread


class GroupSparseInt4(Packing):
    """Panels with the same number of kept groups."""

    @property
    def sparse(self) -> GroupSparse:
        """The format, with its own members."""
        assert isinstance(self.format, GroupSparse)
        return self.format

    def refusal(self, columns: int) -> str:
        group, name = self.format.group, self.format.name
        if columns % group:
            return f"{name} needs an input size that is a multiple of {group}, not {columns}"
        if columns > group * GROUPS_MOST:
            return f"{name} has kernels for inputs of up to {group * GROUPS_MOST}, not {columns}"
        return ""

    def places(self, columns: int) -> int:
        """Groups that a panel has place for."""
        return PANEL // UNIT * (UNIT * (columns // self.format.group) - self.sparse.pruned(UNIT, columns))

    def panel_bytes(self, columns: int) -> int:
        group = self.format.group
        return -(-(columns // group * 8 + self.places(columns) * (group // 2 + 2) + 64) // 64) * 64

    def pack_panel(self, rows: Any) -> Bytes:
        k, group = rows.shape[1], self.format.group
        groups = k // group
        kept = padded(rows.parts["kept"], PANEL, groups)
        if len(over := np.flatnonzero(kept.reshape(-1, UNIT * groups).sum(axis=1) > self.places(k) * UNIT // PANEL)):
            raise ValueError(
                f"rows {over[0] * UNIT} to {over[0] * UNIT + UNIT - 1} of a panel of {self.format.name} keep more than "
                f"{self.places(k) * UNIT // PANEL} groups: weights are joined or sliced only at multiples of 16 rows"
            )
        column, row = np.nonzero(kept.T)
        nibbles = (padded(rows.codes, PANEL, k) + np.int8(8)).astype(np.uint8).reshape(PANEL, groups, group // 8, 2, 4)
        dwords = np.ascontiguousarray(nibbles[..., 0, :] | nibbles[..., 1, :] << np.uint8(4)).view(np.uint32)[..., 0]
        panel = np.zeros(self.panel_bytes(k), np.uint8)
        masks, scales, codes = self._lists(panel, k)
        codes[self._order(kept)] = dwords[row, column]
        scales[: len(row)] = padded(rows.scales, PANEL, groups)[row, column]
        masks[:] = np.packbits(np.ascontiguousarray(kept.T), axis=1, bitorder="little")
        return raw(panel)

    def _lists(self, panel: Bytes, columns: int) -> tuple[Bytes, NDArray[np.float16], NDArray[np.uint32]]:
        """Views of a panel's lists: masks [groups, 8], scales, dwords of codes."""
        group, places = self.format.group, self.places(columns)
        scales = columns // group * 8
        codes = scales + places * 2
        end = codes + places * group // 2
        return panel[:scales].reshape(-1, 8), panel[scales:codes].view(np.float16), panel[codes:end].view(np.uint32)

    def _order(self, kept: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Where the dwords [kept groups, N/8] lie in the list of codes."""
        steps = self.format.group // 8
        counts = kept.sum(axis=0)
        column = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        place = np.arange(len(column)) - first[column]
        before = place // 16 * 16
        width = np.minimum(16, counts[column] - before)
        start = (first[column] + before) * steps + place - before
        return np.asarray(start[:, None] + np.arange(steps) * width[:, None])

    def unpack_panel(self, panel: Bytes, columns: int) -> Any:
        group = self.format.group
        masks, listed, words = self._lists(panel, columns)
        kept = np.unpackbits(masks, axis=1, bitorder="little").T.astype(np.bool_)
        column, row = np.nonzero(kept.T)
        scales = np.zeros(kept.shape, np.float32)
        scales[row, column] = listed[: len(row)]
        packed = np.ascontiguousarray(words[self._order(kept)])[..., None].view(np.uint8)
        nibbles = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).reshape(-1, group)
        codes = np.zeros((*kept.shape, group), np.int8)
        codes[row, column] = nibbles.astype(np.int8) - np.int8(8)
        return quantized(self.format, codes=codes.reshape(PANEL, columns), scales=scales, kept=kept)

    def seams(self) -> dict[str, Any]:
        return {"group": self.format.group, "percent": self.sparse.percent, "prepares": True}


def packing(format: DType) -> Packing | None:
    """The packing of a group-sparse format, or None. Activations: f32, and q8_gG with one scale for a whole group of the weight."""
    if not isinstance(format, GroupSparse):
        return None
    rounded = tuple(f"q8_g{g}" for g in (32, 64, 128) if g % format.group == 0)
    return GroupSparseInt4(format, "group_sparse", ("f32", *rounded))


EXAMPLES = ("int4_g16_s50", "int4_g32_s20", "int4_g64_s50")
"""Names that the tests of all formats try."""
