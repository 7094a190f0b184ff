"""SqueezeLLM: a codebook of 8 or 16 values for every row, and a few outliers kept apart: nu{3,4}_oM (arXiv 2306.07629).

value = codebook[code], plus the row's outlier at that column. Every row has the same number M of outliers (0 to 1024), so the
sparse part is even by construction: it takes the place of SqueezeLLM's balanced CSR.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemma.ir.errors import TypeMismatch
from stemma.ir.formats.base import Array, Format, Quantized, as_f16, code_bytes
from stemma.ir.size import SizeLike

NAMES = "nu3_oM, nu4_oM"
_NAME = re.compile(r"nu([34])_o(\d+)$")
COLUMNS_MOST, OUTLIERS_MOST = 1 << 16, 1024
SENSITIVE = 9  # of so many outliers one is chosen by sensitivity, the others by magnitude: 0.05 of 0.45 percent in the paper


@dataclass(frozen=True)
class Codebook(Format):
    """Parts: codes int8 [K] (0..2^bits-1), codebook f32 [2^bits] (f16 values), outliers f32 [M] (f16 values), columns uint16 [M].

    The value of an outlier's column is codebook[code] + outlier: what is stored is the rest that the code leaves. Entries that a
    row does not need have the value 0. No column comes twice with a value that is not 0.
    """

    outliers: int = 0

    def parts(self, columns: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        return {
            "codes": (np.int8, (columns,)), "codebook": (np.float32, (2**self.bits,)),
            "outliers": (np.float32, (self.outliers,)), "columns": (np.uint16, (self.outliers,)),
        }  # fmt: skip

    def refusal(self, columns: int) -> str:
        if columns > COLUMNS_MOST:
            return f"A last axis of {columns} is more than the {COLUMNS_MOST} columns of {self.name}."
        return super().refusal(columns)

    def stored_bytes(self, elements: SizeLike, rows: SizeLike = 1) -> SizeLike:
        apart = 2 * (1 << self.bits) + 4 * self.outliers
        return code_bytes(elements, self.bits) + rows * apart

    def round_rows(self, values: NDArray[np.float32]) -> dict[str, Array]:
        return fit(values, None, self.bits, self.outliers, iterations=12)

    def dequantize(self, array: Quantized) -> NDArray[np.float32]:
        parts = array.parts
        values = np.take_along_axis(parts["codebook"], array.codes.astype(np.intp), axis=-1)
        flat = values.reshape(-1, values.shape[-1])
        rows = np.arange(len(flat))[:, None]
        np.add.at(flat, (rows, parts["columns"].reshape(len(flat), -1)), parts["outliers"].reshape(len(flat), -1))
        return flat.reshape(values.shape)


def fit(values: Array, weights: Array | None, bits: int, outliers: int, iterations: int = 50) -> dict[str, Array]:
    """The parts of nu{bits}_o{outliers} for finite rows [rows, K]: k-means in one dimension for each row.

    weights: sensitivities that are not negative, [K] or [rows, K] (the paper: squared gradients), None for equal ones; a row where
    all are zero has equal ones. Outliers are taken out first: of each row's, one of nine the most sensitive (when there are
    weights), the others the largest. Lloyd's iterations start from quantiles and stop when no code changes, or after `iterations`.
    TypeMismatch for a shape or values that do not fit, or values beyond f16.
    """
    rows, columns = values.shape
    values = np.asarray(values, np.float32)
    name = f"nu{bits}_o{outliers}"
    if weights is None:
        sensitivity = np.ones((1, 1), np.float64)
    else:
        sensitivity = np.asarray(weights, np.float64)
        if sensitivity.shape not in ((columns,), (rows, columns)) or not np.isfinite(sensitivity).all() or (sensitivity < 0).any():
            raise TypeMismatch(
                f"{name}: sensitivities of {sensitivity.shape} for values of {values.shape}: [K] or [rows, K], >= 0."
            )
    sensitivity = np.broadcast_to(sensitivity, values.shape)
    count = min(outliers, columns)
    apart = _outliers(values, sensitivity if weights is not None else None, count)
    inside = sensitivity.copy()
    np.put_along_axis(inside, apart, 0, axis=1)
    unused = ~inside.any(axis=1)
    inside[unused] = 1
    codebook = as_f16(_cluster(values, inside, 2**bits, iterations), name)
    middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
    codes = np.empty(values.shape, np.int8)
    for row in range(rows):
        codes[row] = np.searchsorted(middles[row], values[row])
    rest = np.take_along_axis(values, apart, 1) - np.take_along_axis(
        codebook, np.take_along_axis(codes, apart, 1).astype(np.intp), 1
    )
    unneeded = ((0, 0), (0, outliers - count))
    return {
        "codes": codes, "codebook": codebook,
        "outliers": np.pad(as_f16(rest, name), unneeded), "columns": np.pad(apart.astype(np.uint16), unneeded),
    }  # fmt: skip


def _outliers(values: NDArray[np.float32], sensitivity: Array | None, count: int) -> NDArray[np.intp]:
    """Columns [rows, count] of the values kept apart, ascending."""
    score = np.abs(values).astype(np.float64)
    if sensitivity is not None and count >= SENSITIVE:
        first = np.argpartition(-sensitivity, count // SENSITIVE - 1, axis=1)[:, : count // SENSITIVE]
        np.put_along_axis(score, first, np.inf, axis=1)
    if not count:
        return np.zeros((len(values), 0), np.intp)
    return np.sort(np.argpartition(-score, count - 1, axis=1)[:, :count], axis=1)


def _cluster(values: NDArray[np.float32], weights: Array, clusters: int, iterations: int) -> NDArray[np.float32]:
    """Ascending centres [rows, clusters] of a weighted k-means of each row; of a cluster without weight the centre stays."""
    rows, columns = values.shape
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    mass = np.zeros((rows, columns + 1))
    moment = np.zeros((rows, columns + 1))
    sorted_weights = np.take_along_axis(weights, order, 1)
    np.cumsum(sorted_weights, axis=1, out=mass[:, 1:])
    np.cumsum(sorted_weights * ordered, axis=1, out=moment[:, 1:])
    start = mass[:, -1:] * ((np.arange(clusters) + 0.5) / clusters)
    centres = np.take_along_axis(ordered, np.clip(_first_above(mass, start) - 1, 0, columns - 1), 1).astype(np.float64)
    edges = np.zeros((rows, clusters + 1), np.intp)
    edges[:, -1] = columns
    for _ in range(iterations):
        inner = _first_above(ordered, (centres[:, 1:] + centres[:, :-1]) / 2)
        if np.array_equal(inner, edges[:, 1:-1]):
            break
        edges[:, 1:-1] = inner
        weight = np.diff(np.take_along_axis(mass, edges, 1), axis=1)
        total = np.diff(np.take_along_axis(moment, edges, 1), axis=1)
        np.divide(total, weight, out=centres, where=weight > 0)
        centres.sort(axis=1)
    return centres.astype(np.float32)


def _first_above(ordered: Array, limits: Array) -> NDArray[np.intp]:
    """For each limit [rows, n] the number of a row's ascending values that are not above it: a binary search in all rows."""
    low = np.zeros(limits.shape, np.intp)
    high = np.full(limits.shape, ordered.shape[1], np.intp)
    while (low < high).any():
        middle = (low + high) // 2
        below = (np.take_along_axis(ordered, np.minimum(middle, ordered.shape[1] - 1), 1) <= limits) & (low < high)
        low = np.where(below, middle + 1, low)
        high = np.where(below, high, middle)
    return low


def parse(name: str) -> Format | None:
    """The codebook format of a name, or None."""
    found = _NAME.match(name)
    if not found:
        return None
    if (count := int(found[2])) > OUTLIERS_MOST:
        raise TypeMismatch(f"{name}: at most {OUTLIERS_MOST} outliers a row.")
    return Codebook(name, "quantized", int(found[1]), outliers=count)
