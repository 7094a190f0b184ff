"""The weight formats that the CPU has kernels for: a file here, its text in templates/cores, and a line in FAMILIES for each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.formats import codebook, group_sparse, lookup, plain, planes, two_four, uniform
from stemma.backends.cpu.formats.base import PANEL, UNIT, Bytes, Packing
from stemma.ir import DType, Quantized, dtype


class Family(Protocol):
    """A file of packings. EXAMPLES: names that the tests of all formats try."""

    __name__: str

    @property
    def EXAMPLES(self) -> tuple[str, ...]: ...

    def packing(self, format: DType) -> Packing | None:
        """How weights of an element type are packed, or None when it is not of this family."""


FAMILIES: tuple[Family, ...] = (plain, uniform, planes, lookup, group_sparse, codebook, two_four)
ACTIVATIONS = ("q8_g32", "q8_g64", "q8_g128")
"""Types of activations that are rounded while running."""


@lru_cache(maxsize=None)
def packing(name: str) -> Packing | None:
    """How weights of an element type are packed; None when no kernel multiplies with them."""
    for family in FAMILIES:
        if found := family.packing(dtype(name)):
            return found
    return None


def packing_of(name: str) -> Packing:
    """As `packing`; ValueError when there is none."""
    if (found := packing(name)) is None:
        raise ValueError(f"the CPU has no kernel for weights of {name}")
    return found


def linear_bytes(outputs: int, columns: int, name: str) -> int:
    """Bytes of a packed weight."""
    return -(-outputs // PANEL) * packing_of(name).panel_bytes(columns)


def pack_panels(weight: Any, name: str) -> Iterator[Bytes]:
    """The packed weight [N, K], one panel at a time, so that it is never held twice. ValueError when it does not fit."""
    columns, made = weight.shape[1], packing_of(name)
    if reason := made.refusal(columns):
        raise ValueError(reason)
    for first in range(0, weight.shape[0], PANEL):
        yield made.pack_panel(weight[first : first + PANEL])


def pack_linear(weight: Any, name: str) -> Bytes:
    """All panels in one array of `linear_bytes` bytes."""
    return np.concatenate(list(pack_panels(weight, name)))


def unpack_linear(packed: Bytes, outputs: int, columns: int, name: str) -> Any:
    """The inverse of `pack_linear`: a `Quantized`, f32 values, or bf16 bits."""
    panels = np.ascontiguousarray(packed).reshape(-(-outputs // PANEL), -1)
    rows = [packing_of(name).unpack_panel(p, columns) for p in panels]
    return (Quantized.concatenate(rows) if isinstance(rows[0], Quantized) else np.concatenate(rows))[:outputs]


def q8_row_bytes(columns: int, group: int) -> int:
    """Bytes of one row of q8 activations: codes padded to 64, then f32 scales and i32 sums of codes per group, padded to 64."""
    return -(-(-(-columns // 64) * 64 + -(-columns // group) * 8) // 64) * 64


def pair_order(half: int) -> NDArray[np.int64]:
    """Row order of concat(gate, up), each `half` rows, for a linear kernel with `pair`: 16 rows of gate, 16 of up, and so on."""
    if half % UNIT:
        raise ValueError(f"a paired linear needs each half to have a multiple of {UNIT} outputs, got {half}")
    index = np.arange(half).reshape(-1, 1, UNIT)
    return np.concatenate([index, index + half], axis=1).reshape(-1)
