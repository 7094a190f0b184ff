"""Constant expressions by blocks of rows, so that no large weight is ever whole in memory, nor a float32 copy of it."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from stemma.ir.errors import CheckpointError
from stemma.ir.formats import Array, Format, Quantized, dtype
from stemma.ir.interpret import Context, evaluate_constant
from stemma.ir.node import Node
from stemma.ir.types import widen_bf16
from stemma.ir.weights import WeightStore

NEAR = 8  # rows with fewer between them are read in one piece
TAKEN = 1 << 22  # elements of such a piece


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
            return value[start:stop]
        if name == "weight":
            return self._stored(node, start, stop, raw)
        if name == "slice":
            first = int(node.attrs["start"])
            return self.block(node.inputs[0], first + start, first + stop, raw)
        if name == "concat":
            return self._joined(node, start, stop, raw)
        kind = dtype(node.dtype)
        if name == "quantize" and isinstance(kind, Format) and (together := kind.rows_together) > 1:
            first = start // together * together
            values = self.block(node.inputs[0], first, min(-(-stop // together) * together, int(node.shape[0])))  # type: ignore[arg-type]
            return node.op.evaluate(self.context, values, **node.attrs)[start - first : stop - first]
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
        if isinstance(part, Quantized):
            return part
        if node.dtype == "bf16":
            if ((part & np.uint16(0x7FFF)) >= np.uint16(0x7F80)).any():
                raise _not_a_number(name)
            return part if raw else widen_bf16(part)
        part = part.astype(self.context.numpy(node.dtype), copy=False)
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise _not_a_number(name)
        return part

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
            return Quantized.concatenate(parts)
        if dtype(node.dtype).kind == "float" and len({p.dtype == np.uint16 for p in parts}) > 1:
            parts = [widen_bf16(p) if p.dtype == np.uint16 else p for p in parts]
        return np.concatenate(parts)


class LazyRows:
    """The value of a constant expression as the interpreter's linear and embedding read it: rows when they are asked for."""

    def __init__(self, node: Node, store: WeightStore) -> None:
        self._node, self._rows = node, Rows(node, store)
        self.shape = tuple(node.shape)

    def __getitem__(self, part: slice) -> Any:
        """Rows part.start..part.stop, within the shape."""
        return self._rows.block(self._node, part.start, min(part.stop, self.shape[0]))

    def take(self, ids: Array) -> Array:
        """The rows of integer ids, as floats, in the shape of ids and the row."""
        unique, places = np.unique(ids, return_inverse=True)
        most = max(1, TAKEN // prod(int(str(n)) for n in self.shape[1:]))
        cuts = np.flatnonzero((np.diff(unique) > NEAR) | (np.diff(unique // most) > 0)) + 1
        found = np.concatenate([self._some(part) for part in np.split(unique, cuts)])
        return np.asarray(found[places.reshape(ids.shape)])

    def _some(self, ids: Array) -> Array:
        """Rows of ascending ids as floats, read together with those between them."""
        first = int(ids[0])
        rows = self[first : int(ids[-1]) + 1]
        return np.asarray((rows.dequantize() if isinstance(rows, Quantized) else rows)[ids - first])


def _finite(node: Node, value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
        raise _not_a_number(node.attrs["name"])
    return value


def _not_a_number(name: str) -> CheckpointError:
    return CheckpointError(
        f"The weight {name!r} holds NaN or infinite values. The checkpoint is damaged, or its training diverged."
    )
