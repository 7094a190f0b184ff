"""Values of decoding programs while they are traced: arrays with Python's operators, and the functions on them.

A program is an ordinary Python function that is called once, with traced values. Nothing is computed then: every operation adds a
node to the IR.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from stemma.ir import size as sizes
from stemma.ir.node import Node
from stemma.ir.size import SizeLike
from stemma.ir.trace_scope import Cell, build, fail, scope
from stemma.ir.types import Tensor, Type

Number = bool | int | float


class Value:
    """An array that is known when the program runs. Operators work as numpy's; `&`, `|`, `~` on bools; element types never mix."""

    __array_ufunc__ = None  # numpy leaves mixed operations to the methods below

    def __init__(self, node: Node, hint: str = "c") -> None:
        self.home, self.made, self.hint = scope(), node, hint

    @property
    def node(self) -> Node:
        """The node in the region that is being traced."""
        return scope().value(self)

    @property
    def type(self) -> Type:
        return self.made.type

    @property
    def shape(self) -> tuple[SizeLike, ...]:
        """Numbers, or sizes that are known when the program runs."""
        return self.made.shape

    @property
    def dtype(self) -> str:
        return self.made.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return f"<value {self.type!r}>"

    # Python that needs to know a value now

    def __bool__(self) -> bool:
        fail(
            "a Python `if`, `while`, `and`, `or` or `not` on a traced value; it is known only when the program runs. Use p.where to"
            " choose values, p.cond for branches, p.loop to repeat, and & | ~ between conditions."
        )

    def _unknown(self, *_: Any) -> NoReturn:
        fail("a number is needed while tracing; this value is known only when the program runs. Use its own operators, or a fixed"
             " option (p.Fixed[int]).")  # fmt: skip

    __int__ = __index__ = __float__ = __complex__ = __round__ = _unknown

    def __len__(self) -> int:
        if not self.rank or not isinstance(self.shape[0], int):
            fail("the length of this value is known only when the program runs. `.shape[0]` is a size; `p.loop` repeats.")
        return self.shape[0]

    def __iter__(self) -> Iterator[Value]:
        if not self.rank or not isinstance(self.shape[0], int):
            fail("iteration over a size that is known only when the program runs. Use p.loop with a counter.")
        return iter([self[i] for i in range(self.shape[0])])

    __hash__ = object.__hash__

    # operators

    def __add__(self, other: Value | Number) -> Value:
        return binary("add", self, other)

    def __radd__(self, other: Number) -> Value:
        return binary("add", other, self)

    def __sub__(self, other: Value | Number) -> Value:
        return binary("sub", self, other)

    def __rsub__(self, other: Number) -> Value:
        return binary("sub", other, self)

    def __mul__(self, other: Value | Number) -> Value:
        return binary("mul", self, other)

    def __rmul__(self, other: Number) -> Value:
        return binary("mul", other, self)

    def __truediv__(self, other: Value | Number) -> Value:
        return binary("div", self, other)

    def __rtruediv__(self, other: Number) -> Value:
        return binary("div", other, self)

    def __floordiv__(self, other: Value | Number) -> Value:
        return binary("floordiv", self, other)

    def __rfloordiv__(self, other: Number) -> Value:
        return binary("floordiv", other, self)

    def __mod__(self, other: Value | Number) -> Value:
        return binary("mod", self, other)

    def __rmod__(self, other: Number) -> Value:
        return binary("mod", other, self)

    def __pow__(self, other: Value | Number) -> Value:
        return binary("pow", self, other)

    def __rpow__(self, other: Number) -> Value:
        return binary("pow", other, self)

    def __matmul__(self, other: Value) -> Value:
        return binary("matmul", self, other)

    def __and__(self, other: Value | bool) -> Value:
        return binary("logical_and", self, other)

    def __or__(self, other: Value | bool) -> Value:
        return binary("logical_or", self, other)

    __rand__, __ror__ = __and__, __or__

    def __lt__(self, other: Value | Number) -> Value:
        return binary("lt", self, other)

    def __le__(self, other: Value | Number) -> Value:
        return binary("le", self, other)

    def __gt__(self, other: Value | Number) -> Value:
        return binary("gt", self, other)

    def __ge__(self, other: Value | Number) -> Value:
        return binary("ge", self, other)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return binary("eq", self, other)

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return binary("ne", self, other)

    def __invert__(self) -> Value:
        return unary("logical_not", self)

    def __neg__(self) -> Value:
        return unary("neg", self)

    def __abs__(self) -> Value:
        return unary("abs", self)

    # element types

    def to(self, dtype: str) -> Value:
        """The same numbers as "f32", "i32", "i64" or "bool"; floats to integers truncate."""
        if dtype == self.dtype:
            return self
        return self != 0 if dtype == "bool" else Value(build("cast", self.node, dtype=dtype))

    def float(self) -> Value:
        return self.to("f32")

    def int(self) -> Value:
        return self.to("i32")

    def long(self) -> Value:
        return self.to("i64")

    # shapes

    def reshape(self, *shape: SizeLike) -> Value:
        return Value(build("reshape", self.node, shape=shape))

    def transpose(self, *axes: Any) -> Value:
        """Axes in that order; without axes, reversed."""
        return Value(build("transpose", self.node, axes=axes or tuple(reversed(range(self.rank)))))

    def broadcast_to(self, *shape: SizeLike) -> Value:
        return Value(build("broadcast_to", self.node, shape=shape))

    def __getitem__(self, index: Any) -> Value:
        """Numbers, slices, None, `...`, and integer values (a scalar, or a row of them) as indices; those must be in range."""
        parts = list(index) if isinstance(index, tuple) else [index]
        given = sum(i is not None and i is not Ellipsis for i in parts)
        if given > self.rank:
            fail(f"{given} indices for {self!r}.")
        where = next((n for n, i in enumerate(parts) if i is Ellipsis), len(parts))
        parts[where : where + 1] = [slice(None)] * (self.rank - given)
        node, axis = self.node, 0
        for part in parts:
            if part is None:
                node = build("reshape", node, shape=(*node.shape[:axis], 1, *node.shape[axis:]))
            elif isinstance(part, slice):
                node = _slice(node, axis, part)
            elif isinstance(part, Value):
                node = build("take", node, part.node, axis=axis)
                axis += part.rank - 1
            else:
                node = _pick(node, axis, part)
                axis -= 1
            axis += 1
        return self if node is self.made else Value(node)

    # reductions

    def sum(self, axis: Any = None) -> Value:
        return self._reduce("reduce_sum", axis)

    def max(self, axis: Any = None) -> Value:
        return self._reduce("reduce_max", axis)

    def min(self, axis: Any = None) -> Value:
        return self._reduce("reduce_min", axis)

    def any(self, axis: Any = None) -> Value:
        return self._reduce("reduce_max", axis)

    def all(self, axis: Any = None) -> Value:
        return self._reduce("reduce_min", axis)

    def _reduce(self, name: str, axis: Any) -> Value:
        axes = tuple(range(self.rank)) if axis is None else (axis % max(self.rank, 1),)
        return Value(build(name, self.node, axes=axes)) if self.rank else self

    def argmax(self, axis: Any = -1) -> Value:
        """i32 index of the largest, the first of equals."""
        return Value(build("argmax", self.node, axis=axis % max(self.rank, 1))).int()

    def argmin(self, axis: Any = -1) -> Value:
        """i32 index of the smallest, the first of equals."""
        return (-self).argmax(axis)

    def cumsum(self, axis: Any = -1) -> Value:
        return Value(build("cumsum", self.node, axis=axis % max(self.rank, 1)))

    def put(self, index: Any, value: Any, axis: Any = 0) -> Value:
        """A copy in which the slice at `index` (a scalar, or a row of them) along `axis` is `value`, which is broadcast."""
        axis %= max(self.rank, 1)
        at = as_value(index, "i32")
        row = at if at.rank else at.reshape(1)
        shape = (*self.shape[:axis], row.shape[0], *self.shape[axis + 1 :])
        updates = as_value(value, self.dtype)
        if not at.rank and updates.rank == self.rank - 1:
            updates = updates.reshape(*updates.shape[:axis], 1, *updates.shape[axis:])
        if updates.shape != shape:
            updates = updates.broadcast_to(*shape)
        return Value(build("scatter", self.node, row.node, updates.node, axis=axis))


def _slice(node: Node, axis: int, part: slice) -> Node:
    extent = node.shape[axis]
    for bound in (part.start, part.stop, part.step):
        if isinstance(bound, Value):
            fail("a slice needs bounds that are known before the program runs; take the elements with an index value instead.")

    def place(at: Any, default: SizeLike) -> SizeLike:
        if at is None:
            return default
        negative = isinstance(at, int) and at < 0
        return sizes.maximum(extent + at, 0) if negative else sizes.minimum(at, extent)

    start, stop = place(part.start, 0), place(part.stop, extent)
    stop = sizes.maximum(start, stop)
    if start == 0 and stop == extent and part.step in (None, 1):
        return node
    return build("slice", node, axis=axis, start=start, stop=stop, step=1 if part.step is None else part.step)


def _pick(node: Node, axis: int, at: Any) -> Node:
    if isinstance(at, bool) or not (isinstance(at, sizes.Size) or hasattr(at, "__index__")):
        fail(f"{at!r} is not an index.")
    at = at if isinstance(at, sizes.Size) else int(at)
    extent = node.shape[axis]
    start = extent + at if isinstance(at, int) and at < 0 else at
    picked = build("slice", node, axis=axis, start=start, stop=start + 1)
    return build("reshape", picked, shape=(*node.shape[:axis], *node.shape[axis + 1 :]))


# ---- values from numbers ----------------------------------------------------------------------------------------------


def kind_of(number: Any) -> str:
    """The element type that a Python number has by itself."""
    if isinstance(number, bool):
        return "bool"
    return "i32" if hasattr(number, "__index__") else "f32"


def as_value(x: Any, dtype: str | None = None) -> Value:
    """A value: itself, or a constant for a number, a size or a list. TraceError for other things."""
    if isinstance(x, Value):
        return x
    if isinstance(x, sizes.Size):
        return Value(build("size_value", size=x, dtype=dtype or "i32"))
    if isinstance(x, (list, tuple)) or (isinstance(x, np.ndarray) and x.ndim):
        return array(x, dtype)
    if isinstance(x, Cell) or not (hasattr(x, "__index__") or isinstance(x, float) or hasattr(x, "__float__")):
        fail(f"{x!r} is not a value of the program: a traced value, a number or a list of numbers is needed here.")
    kind = kind_of(x)
    if dtype is not None and kind != dtype and (kind == "f32" or "bool" in (kind, dtype)):
        fail(f"the number {x!r} meets {dtype} elements. Convert the value first: .float(), .int(), .long() or .to('bool').")
    kind = dtype or kind
    value = float(x) if kind == "f32" else bool(x) if kind == "bool" else int(x)
    return Value(build("constant", value=value, dtype=kind))


def unary(name: str, x: Any) -> Value:
    """An elementwise operation of one value."""
    return Value(build(name, as_value(x).node))


def binary(name: str, a: Any, b: Any) -> Value:
    """An operation of two values; a number becomes a constant of the other's element type."""
    like = next((x.dtype for x in (a, b) if isinstance(x, Value)), None)
    return Value(build(name, as_value(a, like).node, as_value(b, like).node))


def array(values: Sequence[Any] | Any, dtype: str | None = None) -> Value:
    """A constant array of numbers or nested lists of them: i32 for integers, else f32."""
    shape: list[int] = []
    flat = values.tolist() if hasattr(values, "tolist") else list(values)
    level = flat
    while isinstance(level, (list, tuple)):
        shape.append(len(level))
        level = level[0] if level else 0
    for _ in shape[1:]:
        if any(len(row) != len(flat[0]) for row in flat):
            fail("the rows of an array must have one length.")
        flat = [x for row in flat for x in row]
    if any(not isinstance(x, (int, float)) for x in flat):
        fail("an array holds numbers that are known while tracing; join traced values with p.stack or p.concat.")
    kind = dtype or ("f32" if any(isinstance(x, float) for x in flat) else "i32")
    stored = "f32" if kind == "f32" else "i32"
    row = Value(build("array", values=tuple(float(x) if stored == "f32" else int(x) for x in flat), dtype=stored))
    return (row.reshape(*shape) if len(shape) > 1 else row).to(kind)


def full(shape: SizeLike | Sequence[SizeLike], value: Number, dtype: str | None = None) -> Value:
    """An array of one number."""
    extents = (shape,) if isinstance(shape, (int, sizes.Size)) else tuple(shape)
    return as_value(value, dtype or kind_of(value)).broadcast_to(*extents)


def arange(size: SizeLike, dtype: str = "i32") -> Value:
    """0, 1, ... size - 1."""
    return Value(build("iota", size=size, dtype=dtype))


# ---- functions --------------------------------------------------------------------------------------------------------


def where(condition: Any, a: Any, b: Any) -> Value:
    """`a` where the condition holds, else `b`; all three broadcast."""
    like = next((x.dtype for x in (a, b) if isinstance(x, Value)), None)
    if like is None and "f32" in (kind_of(a), kind_of(b)):
        like = "f32"
    return Value(build("where", as_value(condition).node, as_value(a, like).node, as_value(b, like).node))


def maximum(a: Any, b: Any) -> Value:
    return binary("maximum", a, b)


def minimum(a: Any, b: Any) -> Value:
    return binary("minimum", a, b)


def exp(x: Value) -> Value:
    return unary("exp", x)


def log(x: Value) -> Value:
    return unary("log", x)


def sqrt(x: Value) -> Value:
    return unary("sqrt", x)


def sigmoid(x: Value) -> Value:
    return unary("sigmoid", x)


def floor(x: Value) -> Value:
    return unary("floor", x)


def concat(*parts: Any, axis: int = 0) -> Value:
    """Values joined along an axis."""
    like = next((x.dtype for x in parts if isinstance(x, Value)), None)
    values = [as_value(x, like) for x in parts]
    return Value(build("concat", *(v.node for v in values), axis=axis % max(values[0].rank, 1)))


def stack(*parts: Any) -> Value:
    """Values of one shape as the rows of a new first axis."""
    like = next((x.dtype for x in parts if isinstance(x, Value)), None)
    return concat(*(as_value(x, like)[None] for x in parts))


def take_along(x: Value, indices: Value, axis: int = -1) -> Value:
    """result[.., i, ..] = x[.., indices[.., i, ..], ..]."""
    return Value(build("take_along", x.node, indices.node, axis=axis % max(x.rank, 1)))


def top_k(x: Value, k: int) -> tuple[Value, Value]:
    """The k largest of the last axis, largest first, ties by the lower index: (values f32[..., k], indices i32[..., k])."""
    node = build("top_k", x.node, k=k)
    return Value(build("get", node, index=0)), Value(build("get", node, index=1))


def log_softmax(x: Value) -> Value:
    """x - log(sum(exp(x))) over the last axis, stable. -inf stays -inf; a row of nothing else gives NaN."""
    below = x - x.max(-1)[..., None]
    return below - log(exp(below).sum(-1)[..., None])


def logsumexp(x: Value) -> Value:
    """log(sum(exp(x))) over the last axis, stable: what log-probabilities are below logits."""
    top = x.max(-1)
    return top + log(exp(x - top[..., None]).sum(-1))


def softmax(x: Value) -> Value:
    """exp(x) / sum(exp(x)) over the last axis, stable."""
    return Value(build("softmax", x.node, axis=max(x.rank, 1) - 1))


def entropy(logits: Value) -> Value:
    """-sum(p log p) in nats over the last axis, p = softmax(logits)."""
    logp = log_softmax(logits)
    return -where(logp > float("-inf"), exp(logp) * logp, 0.0).sum(-1)


def noise(seed: Value | int, sequence: Value | int, positions: Value | int, size: int) -> Value:
    """Gumbel noise f32[n, size] counted by (seed, sequence, position): the noise that `select` adds at those positions."""
    where_ = as_value(positions, "i32")
    row = where_ if where_.rank else where_.reshape(1)
    return Value(build("noise", as_value(seed, "i64").node, as_value(sequence, "i64").node, row.node, size=size))


def tensor_type(type: Tensor | tuple[str, Sequence[SizeLike]]) -> Tensor:
    """A tensor type from ("f32", (4,))."""
    return type if isinstance(type, Tensor) else Tensor(type[0], tuple(type[1]))


def host(function: str, *values: Any, type: Tensor | tuple[str, Sequence[SizeLike]]) -> Value:
    """The result of a Python function that the caller gives by name; it gets arrays, and must return one of that type."""
    return Value(build("host", *(as_value(v).node for v in values), function=function, type=tensor_type(type)))


def call(function: str, *values: Any, type: Tensor | tuple[str, Sequence[SizeLike]]) -> Value:
    """The result of a compiled function of the artifact; `type` is that of its result."""
    return Value(build("call", *(as_value(v).node for v in values), function=function, type=tensor_type(type)))
