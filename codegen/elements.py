"""One element of each tensor operation, as a scalar of the kernel-level IR. `RULES[op](builder, node, index)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from stemma.codegen.index import Index, Indices
from stemma.ir import Node, SizeLike, dtype, ops, size


class Builder(Protocol):
    """What a rule may use."""

    indices: Indices

    def element(self, node: Node, index: Index) -> Node:
        """The element of `node` at `index`."""
        ...

    def reduction(self, extents: list[tuple[str, SizeLike]], kind: str, value: Callable[[Index], Node]) -> Node:
        """`value` combined over new loops of the given names and extents."""
        ...

    def part(self, index: SizeLike, cuts: list[SizeLike]) -> list[int]:
        """The parts (between consecutive cuts) that the index can be in; may restart lowering with a loop cut in two."""
        ...


Rule = Callable[[Builder, Node, Index], Node]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def elementwise(b: Builder, node: Node, index: Index) -> Node:
    """The operation itself, on the elements of its inputs at the broadcast index."""
    return node.op(*(b.element(i, _broadcast(index, i.shape)) for i in node.inputs), **node.attrs)


def _broadcast(index: Index, shape: tuple[SizeLike, ...]) -> Index:
    last = index[len(index) - len(shape) :]
    return tuple(0 if extent == 1 else i for i, extent in zip(last, shape, strict=True))


def cast(value: Node, name: str) -> Node:
    """The value as another element type; itself when it has that type."""
    return value if value.dtype == name else ops.cast(value, dtype=name)


def _within(b: Builder, index: SizeLike, extent: SizeLike) -> Node | None:
    """0 <= index < extent as a bool scalar; None when certain."""
    tests = []
    if not b.indices.at_least(index, 0):
        tests.append(ops.le(ops.constant(value=0, dtype="i64"), b.indices.scalar(index)))
    if not b.indices.below(index, extent):
        tests.append(ops.lt(b.indices.scalar(index), b.indices.scalar(extent)))
    return ops.logical_and(*tests) if len(tests) == 2 else tests[0] if tests else None


def _clamp(index: SizeLike, extent: SizeLike) -> SizeLike:
    return size.minimum(size.maximum(index, 0), extent - 1)


@_rule("constant", "size_value")
def _leaf(b: Builder, node: Node, index: Index) -> Node:
    return node


@_rule("iota")
def _iota(b: Builder, node: Node, index: Index) -> Node:
    return cast(b.indices.scalar(index[0]), node.dtype)


@_rule("cast")
def _cast(b: Builder, node: Node, index: Index) -> Node:
    return cast(b.element(node.inputs[0], index), node.dtype)


@_rule("reshape")
def _reshape(b: Builder, node: Node, index: Index) -> Node:
    return b.element(node.inputs[0], b.indices.reshape(index, node.shape, node.inputs[0].shape))


@_rule("transpose")
def _transpose(b: Builder, node: Node, index: Index) -> Node:
    source: list[SizeLike] = [0] * len(index)
    for i, axis in zip(index, node.attrs["axes"], strict=True):
        source[axis] = i
    return b.element(node.inputs[0], tuple(source))


@_rule("broadcast_to")
def _broadcast_to(b: Builder, node: Node, index: Index) -> Node:
    return b.element(node.inputs[0], _broadcast(index, node.inputs[0].shape))


@_rule("slice")
def _slice(b: Builder, node: Node, index: Index) -> Node:
    axis, start, step = node.attrs["axis"], node.attrs["start"], node.attrs["step"]
    return b.element(node.inputs[0], (*index[:axis], index[axis] * step + start, *index[axis + 1 :]))


@_rule("concat")
def _concat(b: Builder, node: Node, index: Index) -> Node:
    axis: int = node.attrs["axis"]
    cuts: list[SizeLike] = [0]
    for part in node.inputs:
        cuts.append(cuts[-1] + part.shape[axis])
    candidates = b.part(index[axis], cuts)

    def element(i: int, exact: bool) -> Node:
        inner = index[axis] - cuts[i]
        if node.inputs[i].shape[axis] == 1:
            inner = 0
        elif not exact:
            inner = _clamp(inner, node.inputs[i].shape[axis])
        return b.element(node.inputs[i], (*index[:axis], inner, *index[axis + 1 :]))

    if len(candidates) == 1:
        return element(candidates[0], True)
    value = element(candidates[-1], False)
    for i in reversed(candidates[:-1]):
        before = ops.lt(b.indices.scalar(index[axis]), b.indices.scalar(cuts[i + 1]))
        value = ops.where(before, element(i, False), value)
    return value


@_rule("pad")
def _pad(b: Builder, node: Node, index: Index) -> Node:
    source = node.inputs[0]
    outside = ops.constant(value=node.attrs["value"], dtype=node.dtype)
    inner: list[SizeLike] = []
    test: Node | None = None
    for i, extent, low, high in zip(index, source.shape, node.attrs["low"], node.attrs["high"], strict=True):
        if low == high == 0:
            inner.append(i)
            continue
        candidates = b.part(i, [0, low, low + extent, low + extent + high])
        if 1 not in candidates:
            return outside
        if len(candidates) == 1:
            inner.append(0 if extent == 1 else i - low)
            continue
        one = _within(b, i - low, extent)
        test = one if test is None else test if one is None else ops.logical_and(test, one)
        inner.append(0 if extent == 1 else _clamp(i - low, extent))
    value = b.element(source, tuple(inner))
    return value if test is None else ops.where(test, value, outside)


def _gathered(b: Builder, indices: Node, at: Index, extent: SizeLike) -> SizeLike:
    return b.indices.wrap(cast(b.element(indices, at), "i64"), extent)


@_rule("take")
def _take(b: Builder, node: Node, index: Index) -> Node:
    source, indices = node.inputs
    axis: int = node.attrs["axis"]
    end = axis + indices.tensor.rank
    place = _gathered(b, indices, index[axis:end], source.shape[axis])
    return b.element(source, (*index[:axis], place, *index[end:]))


@_rule("take_along")
def _take_along(b: Builder, node: Node, index: Index) -> Node:
    source, indices = node.inputs
    axis: int = node.attrs["axis"]
    place = _gathered(b, indices, _broadcast(index, indices.shape), source.shape[axis])
    return b.element(source, (*index[:axis], place, *index[axis + 1 :]))


def _reduced(b: Builder, node: Node, index: Index, axes: tuple[int, ...], kind: str) -> Node:
    source = node.inputs[0]
    kept = iter(index if not node.attrs["keepdims"] else [i for a, i in enumerate(index) if a not in axes])

    def value(loops: Index) -> Node:
        new = iter(loops)
        return b.element(source, tuple(next(new) if a in axes else rest[a] for a in range(source.tensor.rank)))

    rest = {a: next(kept) for a in range(source.tensor.rank) if a not in axes}
    return b.reduction([("k", source.shape[a]) for a in sorted(axes)], kind, value)


@_rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(b: Builder, node: Node, index: Index) -> Node:
    return _reduced(b, node, index, node.attrs["axes"], node.op.name.removeprefix("reduce_"))


@_rule("argmax")
def _argmax(b: Builder, node: Node, index: Index) -> Node:
    return _reduced(b, node, index, (node.attrs["axis"],), "argmax")


@_rule("cumsum")
def _cumsum(b: Builder, node: Node, index: Index) -> Node:
    axis: int = node.attrs["axis"]
    zero = ops.constant(value=0, dtype=node.dtype)

    def value(loops: Index) -> Node:
        element = b.element(node.inputs[0], (*index[:axis], loops[0], *index[axis + 1 :]))
        seen = ops.le(b.indices.scalar(loops[0]), b.indices.scalar(index[axis]))
        return ops.where(seen, element, zero)

    return b.reduction([("k", node.shape[axis])], "sum", value)


@_rule("matmul")
def _matmul(b: Builder, node: Node, index: Index) -> Node:
    left, right = node.inputs
    rank = node.tensor.rank

    def value(loops: Index) -> Node:
        (k,) = loops
        batch_a = _broadcast(index[: rank - 2], left.shape[:-2])
        batch_b = _broadcast(index[: rank - 2], right.shape[:-2])
        return ops.mul(b.element(left, (*batch_a, index[-2], k)), b.element(right, (*batch_b, k, index[-1])))

    return b.reduction([("k", left.shape[-1])], "sum", value)


@_rule("linear")
def _linear(b: Builder, node: Node, index: Index) -> Node:
    x, w = node.inputs[:2]

    def value(loops: Index) -> Node:
        (k,) = loops
        return ops.mul(cast(b.element(x, (*index[:-1], k)), node.dtype), cast(b.element(w, (index[-1], k)), node.dtype))

    total = b.reduction([("k", x.shape[-1])], "sum", value)
    return total if len(node.inputs) == 2 else ops.add(total, b.element(node.inputs[2], (index[-1],)))


@_rule("conv")
def _conv(b: Builder, node: Node, index: Index) -> Node:
    x, w = node.inputs[:2]
    batch, output, *space = index
    per_group = w.shape[1]
    group, _ = b.indices.divide(output, size.floordiv(w.shape[0], node.attrs["groups"]))

    def value(loops: Index) -> Node:
        channel, *kernel = loops
        test: Node | None = None
        place: list[SizeLike] = []
        for axis, (i, k) in enumerate(zip(space, kernel, strict=True)):
            padding, extent = node.attrs["padding"][axis], x.shape[2 + axis]
            at = i * node.attrs["stride"][axis] + k * node.attrs["dilation"][axis] - padding
            if padding:
                one = _within(b, at, extent)
                test = one if test is None else test if one is None else ops.logical_and(test, one)
                at = _clamp(at, extent)
            place.append(at)
        read = b.element(x, (batch, group * per_group + channel, *place))
        if test is not None:
            read = ops.where(test, read, ops.constant(value=0.0, dtype=node.dtype))
        return ops.mul(read, b.element(w, (output, channel, *kernel)))

    names = ["c", *(f"k{axis}" for axis in range(len(space)))]
    total = b.reduction(list(zip(names, w.shape[1:], strict=True)), "sum", value)
    return total if len(node.inputs) == 2 else ops.add(total, b.element(node.inputs[2], (output,)))


def rule_of(node: Node) -> Rule | None:
    """The rule of a node, None when its op has none."""
    if node.op.name in RULES:
        return RULES[node.op.name]
    if "elementwise" in node.op.tags and all(dtype(i.dtype).kind != "quantized" for i in node.inputs):
        return elementwise
    return None
