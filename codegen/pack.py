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

from stemma.backends.cpu.pack import pack_linear, pair_order
from stemma.codegen.schedule import Packed
from stemma.ir import Array, CheckpointError, Context, Node, StemmaError, TypeMismatch, WeightStore, evaluate_constant
from stemma.ir.types import Quantized, dtype, numpy_dtype, round_bf16, widen_bf16

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
    return _panels(rows.block(node, start, stop, raw=True), node.dtype)


def _pair_block(rows: Rows, node: Node, start: int, stop: int) -> Array:
    """Packed rows start..stop of a joined gate and up weight: 16 rows of one, 16 of the other, and so on."""
    half = int(node.shape[0]) // 2  # type: ignore[arg-type]
    lo, hi = start // 2, stop // 2
    parts = [rows.block(node, base + lo, base + hi, raw=True) for base in (0, half)]
    order = pair_order(hi - lo)
    if isinstance(parts[0], Quantized):
        codes, scales = (np.concatenate([getattr(p, a) for p in parts])[order] for a in ("codes", "scales"))
        return _panels(Quantized(node.dtype, codes, scales), node.dtype)
    return _panels(np.concatenate(parts)[order], node.dtype)


def _panels(value: Any, name: str) -> Array:
    if isinstance(value, Quantized):
        scales = value.scales[:, 0] if name == "int8" else value.scales.astype(np.float16)
        return pack_linear(value.codes, name, scales)
    return pack_linear(value, name)


def _plain(value: Any, name: str) -> Array:
    """Row-major bytes in the storage type."""
    if isinstance(value, Quantized):
        raise TypeMismatch(f"a weight of {name} has no plain row layout")
    if name == "bf16" and value.dtype != np.uint16:
        value = round_bf16(value)
    return np.ascontiguousarray(value, numpy_dtype(name)).reshape(-1).view(np.uint8)


class Rows:
    """Values of a constant expression, by rows (steps of the first axis). Parts that need all rows are evaluated once."""

    def __init__(self, root: Node, store: WeightStore) -> None:
        self.root, self.store = root, store
        self.context = Context(store, np.float32)
        self._whole: dict[Node, Any] = {}

    def whole(self, node: Node) -> Any:
        """The value of a whole expression, remembered."""
        if node not in self._whole:
            if node.op.name == "weight":
                self._whole[node] = _finite(node, self.context.weight(node.attrs["name"], node.tensor))
            else:
                self._whole[node] = evaluate_constant(node, self._checked, np.float32)
        return self._whole[node]

    def _checked(self, name: str) -> Any:
        value = self.store(name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
            raise _not_a_number(name)
        return value

    def blockwise(self, node: Node) -> bool:
        """Whether rows of the value can be computed from rows of the inputs."""
        name = node.op.name
        if name == "weight":
            return self.store.raw(node.attrs["name"]) is not None
        if name == "concat":
            return bool(node.attrs["axis"] == 0)
        if name == "slice":
            return bool(node.attrs["axis"] == 0 and node.attrs["step"] == 1)
        return name in ("quantize", "dequantize") or "elementwise" in node.op.tags

    def block(self, node: Node, start: int, stop: int, raw: bool = False) -> Any:
        """Rows start..stop. With `raw`, bf16 values may come as their bits (uint16)."""
        name = node.op.name
        if not self.blockwise(node):
            value = self.whole(node)
            if isinstance(value, Quantized):
                return Quantized(value.dtype, value.codes[start:stop], value.scales[start:stop])
            return value[start:stop]
        if name == "weight":
            return self._stored(node, start, stop, raw)
        if name == "slice":
            first = int(node.attrs["start"])
            return self.block(node.inputs[0], first + start, first + stop, raw)
        if name == "concat":
            return self._joined(node, start, stop, raw)
        parts = [self._operand(i, node, start, stop) for i in node.inputs]
        return node.op.evaluate(self.context, *parts, **node.attrs)

    def _operand(self, value: Node, user: Node, start: int, stop: int) -> Any:
        same = value.tensor.rank == user.tensor.rank and value.shape[:1] == user.shape[:1]
        return self.block(value, start, stop) if same else self.whole(value)

    def _stored(self, node: Node, start: int, stop: int, raw: bool) -> Any:
        name = node.attrs["name"]
        stored = self.store.raw(name)
        if stored.shape != node.shape:
            raise CheckpointError(f"The weight {name!r} has the shape {stored.shape}, the module expects {node.shape}.")
        part = stored[start:stop]
        if node.dtype == "bf16":
            if ((part & np.uint16(0x7FFF)) > np.uint16(0x7F80)).any():
                raise _not_a_number(name)
            return part if raw else widen_bf16(part)
        part = part.astype(self.context.numpy(node.dtype), copy=False)
        return _finite(node, part)

    def _joined(self, node: Node, start: int, stop: int, raw: bool) -> Any:
        parts, offset = [], 0
        for value in node.inputs:
            extent = int(value.shape[0])  # type: ignore[arg-type]
            lo, hi = max(start - offset, 0), min(stop - offset, extent)
            if lo < hi:
                parts.append(self.block(value, lo, hi, raw))
            offset += extent
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], Quantized):
            codes, scales = (np.concatenate([getattr(p, a) for p in parts]) for a in ("codes", "scales"))
            return Quantized(node.dtype, codes, scales)
        if dtype(node.dtype).kind == "float" and len({p.dtype == np.uint16 for p in parts}) > 1:
            parts = [widen_bf16(p) if p.dtype == np.uint16 else p for p in parts]
        return np.concatenate(parts)


def _finite(node: Node, value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
        raise _not_a_number(node.attrs["name"])
    return value


def _not_a_number(name: str) -> CheckpointError:
    return CheckpointError(
        f"The weight {name!r} contains NaN (not a number). The checkpoint is damaged or the training diverged; compile another one."
    )
