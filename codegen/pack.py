"""Packs constant expressions into the weights blob, as a stream: one tensor at a time, large ones in blocks of rows.

Rows of an expression are computed independently where its operations allow it (plain weights, joins and slices of rows,
elementwise operations, quantization), so that neither a float32 copy nor the whole of a large weight is ever in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from stemma.backends.cpu.formats import pack_linear, pair_order
from stemma.backends.cpu.formats.rows import pack_rows
from stemma.codegen.schedule import Packed
from stemma.ir import Array, Node, Rows, StemmaError, WeightStore
from stemma.ir.formats import Quantized
from stemma.ir.types import numpy_dtype, round_bf16

SMALL, LARGE = 64, 4096  # alignments: of every tensor, of those that have at least LARGE bytes
BLOCK = 1 << 21  # elements of one block of rows
PANEL = 64


@dataclass(frozen=True)
class Layout:
    """Offsets of packed weights in the blob, and its size."""

    offsets: tuple[int, ...]
    total: int


def place(table: Sequence[Packed]) -> Layout:
    """Offsets in the order of the table."""
    offsets, end = [], 0
    for packed in table:
        alignment = LARGE if packed.bytes >= LARGE else SMALL
        end = -(-end // alignment) * alignment
        offsets.append(end)
        end += packed.bytes
    return Layout(tuple(offsets), end)


def stream(
    table: Sequence[Packed], layout: Layout, store: WeightStore, progress: Callable[[int, int], None] | None = None
) -> Iterator[bytes | memoryview]:
    """The blob in chunks. CheckpointError names a weight that is missing or not finite; CompileError one that does not fit.

    `progress(done, total)` is told the bytes so far.
    """
    done = 0
    with ThreadPoolExecutor(_threads()) as pool:
        for packed, offset in zip(table, layout.offsets, strict=True):
            if offset > done:
                yield bytes(offset - done)
                done = offset
            written = 0
            for chunk in _chunks(packed, store, pool):
                view = memoryview(chunk.data).cast("B")
                written += len(view)
                yield view
                if progress:
                    progress(done + written, layout.total)
            if written != packed.bytes:
                raise StemmaError(f"{packed.buffer.name} was packed into {written} bytes instead of {packed.bytes}: this is a bug.")
            done += written


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(packed: Packed, store: WeightStore, pool: ThreadPoolExecutor) -> Iterator[Array]:
    """The bytes of one weight. Blocks are prepared ahead by the pool, a bounded number of them, and come in order."""
    node = packed.node
    rows = Rows(node, store)
    if node.tensor.rank < 2:
        yield _plain(rows.whole(node), node.dtype)
        return
    count = int(node.shape[0])  # type: ignore[arg-type]
    columns = max(1, int(node.tensor.elements) // max(1, count))  # type: ignore[arg-type]
    step = max(1, BLOCK // columns)
    if packed.layout != "rows":
        step = -(-step // PANEL) * PANEL
    make = {"rows": _rows_block, "panel": _panel_block, "pair": _pair_block}[packed.layout]
    if not rows.blockwise(node):
        rows.whole(node)  # once, before the threads ask for parts of it
    waiting: deque[Future[Array]] = deque()
    for start in range(0, count, step):
        waiting.append(pool.submit(make, rows, node, start, min(count, start + step)))
        if len(waiting) > _threads() + 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _rows_block(rows: Rows, node: Node, start: int, stop: int) -> Array:
    return _plain(rows.block(node, start, stop, raw=True), node.dtype)


def _panel_block(rows: Rows, node: Node, start: int, stop: int) -> Array:
    return pack_linear(rows.block(node, start, stop, raw=True), node.dtype)


def _pair_block(rows: Rows, node: Node, start: int, stop: int) -> Array:
    """Packed rows start..stop of a joined gate and up weight: 16 rows of one, 16 of the other, and so on."""
    half = int(node.shape[0]) // 2  # type: ignore[arg-type]
    lo, hi = start // 2, stop // 2
    parts = [rows.block(node, base + lo, base + hi, raw=True) for base in (0, half)]
    order = pair_order(hi - lo)
    joined = Quantized.concatenate(parts) if isinstance(parts[0], Quantized) else np.concatenate(parts)
    return pack_linear(joined[order], node.dtype)


def _plain(value: Any, name: str) -> Array:
    """Row-major bytes in the storage type."""
    if isinstance(value, Quantized):  # of a transposed weight the parts are in the order of columns
        return pack_rows(Quantized(value.dtype, {k: np.ascontiguousarray(v) for k, v in value.parts.items()}), name)
    if name == "bf16" and value.dtype != np.uint16:
        value = round_bf16(value)
    return np.ascontiguousarray(value, numpy_dtype(name)).reshape(-1).view(np.uint8)
