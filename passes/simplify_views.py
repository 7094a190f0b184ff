"""Rules that simplify the movement of elements: reshapes, transposes, broadcasts, slices, joins."""

from __future__ import annotations

from stemma.ir import Node, ops
from stemma.passes.rewrite import NoMatch, rule
from stemma.passes.selftest import example

A = example("a", "f32[n, 4]")
N = A.shape[0]
BROADCASTING = frozenset({
    "add", "sub", "mul", "div", "floordiv", "mod", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "where",
})  # fmt: skip


@rule(
    lambda x: x, roots=("reshape", "broadcast_to"),
    cases=[{"x": ops.reshape(A, shape=(N, 4))}, {"x": ops.broadcast_to(A, shape=(N, 4))}],
)  # fmt: skip
def same_shape(x: Node) -> Node:
    """reshape(x, shape=x.shape), broadcast_to(x, shape=x.shape) -> x"""
    if x.shape != x.inputs[0].shape:
        raise NoMatch("the shape changes")
    return x.inputs[0]


@rule(lambda x, s, t: ops.reshape(ops.reshape(x, shape=s), shape=t), cases=[{"x": "f32[n, 4]", "s": (2, N, 2), "t": (N * 4,)}])
def double_reshape(x: Node, s: tuple[int, ...], t: tuple[int, ...]) -> Node:
    """reshape(reshape(x)) -> reshape(x)"""
    return ops.reshape(x, shape=t)


@rule(
    lambda x, s, t: ops.broadcast_to(ops.broadcast_to(x, shape=s), shape=t),
    cases=[{"x": "f32[4]", "s": (1, 4), "t": (3, N, 4)}],
)
def double_broadcast(x: Node, s: tuple[int, ...], t: tuple[int, ...]) -> Node:
    """broadcast_to(broadcast_to(x)) -> broadcast_to(x)"""
    return ops.broadcast_to(x, shape=t)


@rule(
    lambda x, p: ops.transpose(x, axes=p),
    cases=[{"x": "f32[n, 4]", "p": (0, 1)}, {"x": "f32[n, 3, 1, 4]", "p": (0, 2, 1, 3)}, {"x": "f32[1, n]", "p": (1, 0)}],
)
def transpose_that_moves_nothing(x: Node, p: tuple[int, ...]) -> Node:
    """transpose(x) -> reshape(x), when only axes of size 1 change places; transpose(x, axes=(0, 1, ...)) -> x"""
    kept = [a for a in p if x.shape[a] != 1]
    if kept != sorted(kept):
        raise NoMatch("axes larger than 1 change places")
    shape = tuple(x.shape[a] for a in p)
    return x if shape == x.shape else ops.reshape(x, shape=shape)


@rule(
    lambda x, p, q: ops.transpose(ops.transpose(x, axes=p), axes=q),
    cases=[{"x": "f32[n, 3, 4]", "p": (1, 2, 0), "q": (1, 0, 2)}, {"x": "f32[n, 3, 4]", "p": (1, 2, 0), "q": (2, 0, 1)}],
)
def double_transpose(x: Node, p: tuple[int, ...], q: tuple[int, ...]) -> Node:
    """transpose(transpose(x, axes=p), axes=q) -> transpose(x, axes=p after q)"""
    axes = tuple(p[a] for a in q)
    return x if axes == tuple(range(len(axes))) else ops.transpose(x, axes=axes)


@rule(lambda x: x, roots=("slice",), cases=[{"x": ops.slice(A, axis=0, start=0, stop=N)}])
def full_slice(x: Node) -> Node:
    """slice(x) of a whole axis -> x"""
    if x.shape != x.inputs[0].shape or x.attrs["step"] != 1:
        raise NoMatch("the slice leaves something out")
    return x.inputs[0]


@rule(
    lambda x, i, a, b, s, c, d: ops.slice(ops.slice(x, axis=i, start=a, stop=b, step=s), axis=i, start=c, stop=d),
    cases=[{"x": "f32[9, n]", "i": 0, "a": 2, "b": 9, "s": s, "c": 1, "d": 3} for s in (1, 2)],
)
def double_slice(x: Node, i: int, a: int, b: int, s: int, c: int, d: int) -> Node:
    """slice(slice(x, start=a, step=s), start=c, stop=d) -> slice(x, start=a + c * s, step=s)"""
    stop = a + (d - 1) * s + 1 if s != 1 else a + d
    return ops.slice(x, axis=i, start=a + c * s, stop=stop, step=s)


B, C = example("b", "f32[n, 2]"), example("c", "f32[n, 3]")


@rule(
    lambda x: x, roots=("slice",),
    cases=[{"x": ops.slice(ops.concat(A, B, C, axis=1), axis=1, start=s, stop=t)} for s, t in ((4, 6), (0, 4), (7, 8))],
)  # fmt: skip
def slice_of_concat(x: Node) -> Node:
    """slice(concat(a, b, ...)) -> slice(b), when it lies inside one of them"""
    joined, axis = x.inputs[0], x.attrs["axis"]
    if joined.op.name != "concat" or joined.attrs["axis"] != axis:
        raise NoMatch("it does not slice a concat along its axis")
    start, stop = x.attrs["start"], x.attrs["stop"]
    if not isinstance(start, int) or not isinstance(stop, int):
        raise NoMatch("the bounds are symbolic")
    for part in joined.inputs:
        extent = part.shape[axis]
        if not isinstance(extent, int):
            break
        if 0 <= start and stop <= extent:
            return ops.slice(part, axis=axis, start=start, stop=stop, step=x.attrs["step"])
        start, stop = start - extent, stop - extent
    raise NoMatch("it reaches over several of the joined tensors")


@rule(
    lambda x: x, roots=("concat",),
    cases=[{"x": ops.concat(A, axis=0)},
           {"x": ops.concat(*(ops.slice(A, axis=1, start=s, stop=t) for s, t in ((0, 1), (1, 3), (3, 4))), axis=1)}],
)  # fmt: skip
def concat_of_slices(x: Node) -> Node:
    """concat(x) -> x; concat(slice(x, 0, a), slice(x, a, b), ...) -> slice(x, 0, b)"""
    if len(x.inputs) == 1:
        return x.inputs[0]
    first, axis = x.inputs[0], x.attrs["axis"]
    stop = first.attrs.get("start")
    for part in x.inputs:
        fits = part.op.name == "slice" and part.attrs["axis"] == axis and part.attrs["step"] == 1
        if not fits or part.inputs != first.inputs or part.attrs["start"] != stop:
            raise NoMatch("the parts are not neighbouring slices of one tensor")
        stop = part.attrs["stop"]
    return ops.slice(first.inputs[0], axis=axis, start=first.attrs["start"], stop=stop)


def _smallest(x: Node) -> Node:
    """`x` without the broadcasts, and the reshapes that only add or drop leading axes of size 1, above it."""
    while x.op.name in ("broadcast_to", "reshape"):
        inner = x.inputs[0]
        if x.op.name == "reshape":
            shape, core = list(x.shape), list(inner.shape)
            while shape and shape[0] == 1:
                shape.pop(0)
            while core and core[0] == 1:
                core.pop(0)
            if shape != core:
                break
        x = inner
    return x


_ROW = example("r", "f32[4]")


@rule(
    lambda x: x, roots=BROADCASTING,
    cases=[{"x": A + ops.broadcast_to(_ROW, shape=(N, 4))}, {"x": ops.reshape(_ROW, shape=(1, 4)) * A},
           {"x": A * ops.broadcast_to(ops.constant(value=2.0, dtype="f32"), shape=(1, 1))}],
)  # fmt: skip
def implicit_broadcast(x: Node) -> Node:
    """add(x, broadcast_to(y, x.shape)) -> add(x, y), and every other operation that broadcasts its operands anyway"""
    inputs = list(x.inputs)
    for i, operand in enumerate(inputs):
        smaller = _smallest(operand)
        if smaller is not operand:
            shorter = x.op(*inputs[:i], smaller, *inputs[i + 1 :])
            if shorter.type == x.type:
                inputs[i] = smaller
    if tuple(inputs) == x.inputs:
        raise NoMatch("no operand is broadcast explicitly, or the result takes its shape from one that is")
    return x.op(*inputs)


VIEWS = (
    same_shape, double_reshape, double_broadcast, transpose_that_moves_nothing, double_transpose, full_slice, double_slice,
    slice_of_concat, concat_of_slices, implicit_broadcast,
)  # fmt: skip
