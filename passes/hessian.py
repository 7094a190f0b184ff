"""Second-order statistics of a linear's inputs: H = X^T X / tokens, and the Cholesky factor of its inverse.

One float32 matrix [K, K] holds both: H below the diagonal, the factor U above it (H^-1 = U^T U), so that a wide layer needs its H
once and nothing else of that size. GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774) read rows of U.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stemma.ir import Array, PassError

BLOCK = 256  # columns that are factored at a time
MOST_DAMPING = 1.0  # of the mean of H's diagonal


def mean_squares(chunks: Sequence[Array]) -> NDArray[np.float64]:
    """E[x_j^2] of every column of inputs [tokens, K]: the diagonal of H. PassError when an input is not finite."""
    total = np.zeros(chunks[0].shape[1], np.float64)
    for chunk in chunks:
        total += np.einsum("ij,ij->j", chunk, chunk, dtype=np.float64)
    if not np.isfinite(total).all():
        raise PassError("The model's activations on the calibration text are not finite (NaN or infinity): they cannot be used.")
    return np.asarray(total / sum(map(len, chunks)))


class Hessian:
    """H of inputs whose columns are taken in an order, with `damp` times the mean of its diagonal added to the diagonal.

    Columns that no input reaches are on their own: nothing compensates for them. damping: what was needed; more than `damp` when
    H was not positive definite in float32.
    """

    def __init__(self, chunks: Sequence[Array], squares: Array, order: Array, damp: float) -> None:
        self.order = order
        size = len(order)
        self._blocks = [slice(start, min(size, start + BLOCK)) for start in range(0, size, BLOCK)]
        self.matrix = _gram(chunks, order, self._blocks)
        self._plain = squares[order].astype(np.float32)
        self.damping = damp
        self.diagonal = self._damped()
        corners = [self.matrix[b, b].copy() for b in self._blocks]
        while not self._factor():
            if self.damping >= MOST_DAMPING:
                raise PassError("The inputs of a linear have no usable covariance, even with damp=1. Use more calibration text.")
            self.damping = min(MOST_DAMPING, max(10 * self.damping, 1e-4))
            self.diagonal = self._damped()
            for b, corner in zip(self._blocks, corners, strict=True):
                self.matrix[b, b] = corner
                self.matrix[: b.start, b] = self.matrix[b, : b.start].T
        self._corners = corners

    def _damped(self) -> NDArray[np.float32]:
        mean = float(self._plain.mean())
        return np.asarray(np.where(self._plain > 0, self._plain, mean or 1.0) + self.damping * mean, np.float32)

    def factor(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of U, columns from start on. What is left of the diagonal is not to be read."""
        return self.matrix[start:stop, start:]

    def inverse_diagonal(self) -> NDArray[np.float32]:
        """The diagonal of H^-1 = U^T U, in the order of the columns."""
        found = np.empty(len(self.order), np.float32)
        for b in self._blocks:
            found[b] = np.einsum("ij,ij->j", self.matrix[: b.stop, b], self.matrix[: b.stop, b])
        return found

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of the damped H, [stop - start, K]: a copy."""
        found = np.empty((stop - start, len(self.order)), np.float32)
        found[:, :start] = self.matrix[start:stop, :start]
        for b, corner in zip(self._blocks, self._corners, strict=True):
            lo, hi = max(b.start, start), min(b.stop, stop)
            if lo < hi:
                part = found[lo - start : hi - start]
                part[:, : b.start] = self.matrix[lo:hi, : b.start]
                part[:, b] = corner[lo - b.start : hi - b.start]
                part[:, b.stop :] = self.matrix[b.stop :, lo:hi].T
        found[np.arange(stop - start), np.arange(start, stop)] = self.diagonal[start:stop]
        return found

    def _factor(self) -> bool:
        """H = R R^T with R upper triangular, block column by block column from the last; then U = R^-1 in its place."""
        a = self.matrix
        for b in reversed(self._blocks):
            if b.stop < len(a):
                a[: b.stop, b] -= a[: b.stop, b.stop :] @ a[b, b.stop :].T
            corner = a[b, b].astype(np.float64)
            index = np.arange(len(corner))
            corner[index, index] += self.diagonal[b].astype(np.float64) - self._plain[b]
            try:
                upper = np.linalg.cholesky(corner[::-1, ::-1])[::-1, ::-1]
            except np.linalg.LinAlgError:
                return False
            inverse = np.triu(np.linalg.inv(upper))
            if not np.isfinite(inverse).all():
                return False
            a[: b.start, b] = a[: b.start, b] @ inverse.T.astype(np.float32)
            a[b, b] = inverse
        for b in self._blocks:
            for upper_block in self._blocks[: self._blocks.index(b)]:
                product = a[upper_block, upper_block.start : b.start] @ a[upper_block.start : b.start, b]
                a[upper_block, b] = -product @ a[b, b]
        return bool(np.isfinite(a[0]).all())


def _gram(chunks: Sequence[Array], order: Array, blocks: Sequence[slice]) -> NDArray[np.float32]:
    """X^T X / tokens of chunks [tokens, K] with the columns in this order; added up in float32, chunk by chunk."""
    size, tokens = len(order), sum(map(len, chunks))
    matrix = np.zeros((size, size), np.float32)
    for chunk in chunks:
        x = np.ascontiguousarray(chunk[:, order], np.float32)
        x *= np.float32(tokens**-0.5)
        for b in blocks:
            matrix[: b.stop, b] += x[:, : b.stop].T @ x[:, b]
    for b in blocks:
        matrix[b, : b.start] = matrix[: b.start, b].T
    return matrix
