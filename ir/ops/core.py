"""Leaves, projections and regions: what programs are made of besides arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemma.ir import size as sizes
from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import dtype
from stemma.ir.function import Function
from stemma.ir.node import Op
from stemma.ir.size import SizeLike
from stemma.ir.types import State, Tensor, Tuple, Type


class Param(Op):
    """A parameter of the enclosing function: `param(name=, type=)`."""

    name = "param"
    tags = frozenset({"leaf"})

    def infer(self, *, name: str, type: Tensor | State) -> Type:
        if not name.isidentifier():
            raise TypeMismatch(f"the parameter name {name!r} is not an identifier")
        return type

    def evaluate(self, ctx: Any, *, name: str, type: Tensor) -> Any:
        raise TypeMismatch(f"the parameter {name!r} has no value here")

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class Weight(Op):
    """A named weight of the model, loaded lazily: `weight(name=, type=)`. Its value is the stored one, widened to float."""

    name = "weight"
    tags = frozenset({"leaf"})

    def infer(self, *, name: str, type: Tensor) -> Type:
        if not all(isinstance(s, int) for s in type.shape):
            raise TypeMismatch(f"the weight {name!r} has a symbolic shape")
        return type

    def evaluate(self, ctx: Any, *, name: str, type: Tensor) -> Any:
        return ctx.weight(name, type)

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class Constant(Op):
    """A scalar: `constant(value=, dtype=)`, shape ()."""

    name = "constant"
    tags = frozenset({"leaf"})

    def infer(self, *, value: float | int | bool, dtype: str) -> Type:
        if not isinstance(value, (int, float, bool)):
            raise TypeMismatch(f"{value!r} is not a number")
        return Tensor(dtype, ())

    def evaluate(self, ctx: Any, *, value: float | int | bool, dtype: str) -> Any:
        return np.asarray(value, ctx.numpy(dtype))

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class SizeValue(Op):
    """A size as a scalar value: `size_value(size=, dtype="i64")`."""

    name = "size_value"
    tags = frozenset({"leaf"})

    def infer(self, *, size: SizeLike, dtype: str = "i64") -> Type:
        if not isinstance(size, (int, sizes.Size)):
            raise TypeMismatch(f"{size!r} is not a size")
        return Tensor(dtype, ())

    def evaluate(self, ctx: Any, *, size: SizeLike, dtype: str) -> Any:
        return np.asarray(ctx.size(size), ctx.numpy(dtype))

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


class Iota(Op):
    """0, 1, ... size-1: `iota(size=, dtype="i64")` -> dtype[size]."""

    name = "iota"
    tags = frozenset({"leaf"})

    def infer(self, *, size: SizeLike, dtype: str = "i64") -> Type:
        return Tensor(dtype, (size,))

    def evaluate(self, ctx: Any, *, size: SizeLike, dtype: str) -> Any:
        return np.arange(ctx.size(size)).astype(ctx.numpy(dtype))


class Get(Op):
    """Result `index` of a node with several results."""

    name = "get"

    def infer(self, value: Tuple, *, index: int) -> Type:
        if not isinstance(value, Tuple) or not 0 <= index < len(value.items):
            raise TypeMismatch(f"there is no result {index}")
        return value.items[index]

    def evaluate(self, ctx: Any, value: Any, *, index: int) -> Any:
        return value[index]

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


def _items(type: Type) -> tuple[Any, ...]:
    return type.items if isinstance(type, Tuple) else (type,)


def _check_region(body: Function, inputs: tuple[Type, ...], what: str) -> None:
    expected = tuple(p.type for p in body.params)
    if expected != inputs:
        raise TypeMismatch(f"the {what} takes {expected}, but is given {inputs}")


class Fused(Op):
    """One kernel: `fused(*inputs, body=)` evaluates the region `body` on the inputs. Backends claim it whole or generate it."""

    name = "fused"

    def infer(self, *inputs: Type, body: Function) -> Type:
        _check_region(body, inputs, "body")
        return body.type

    def evaluate(self, ctx: Any, *inputs: Any, body: Function) -> Any:
        results = ctx.call(body, inputs)
        return results[0] if len(results) == 1 else results

    def flops(self, type: Type, *inputs: Type, body: Function) -> SizeLike:
        total: SizeLike = 0
        for node in body.nodes:
            total = total + node.op.cost(node).flops
        return total


class Loop(Op):
    """`loop(*init, body=)`: runs `body(*carried) -> (again, *carried)` while `again` (bool scalar) is true, at least once."""

    name = "loop"

    def infer(self, *init: Type, body: Function) -> Type:
        _check_region(body, init, "loop body")
        again, *results = _items(body.type) or (None,)
        if again != Tensor("bool", ()):
            raise TypeMismatch("the first result of a loop body must be a bool scalar: whether to run again")
        for number, (carried, returned) in enumerate(zip(init, results)):
            if carried != returned:
                raise TypeMismatch(f"the loop carries {carried!r} as value {number}, but its body returns {returned!r}")
        if len(results) != len(init):
            raise TypeMismatch(f"the loop carries {len(init)} values, but its body returns {len(results)}")
        return Tuple(tuple(results))

    def evaluate(self, ctx: Any, *init: Any, body: Function) -> Any:
        again, carried = True, tuple(init)
        while again:
            go_on, *rest = ctx.call(body, carried)
            again, carried = bool(go_on), tuple(rest)
        return carried


class Cond(Op):
    """`cond(predicate, *inputs, then=, otherwise=)`: evaluates one of two regions with the same result types."""

    name = "cond"

    def infer(self, predicate: Type, *inputs: Type, then: Function, otherwise: Function) -> Type:
        if predicate != Tensor("bool", ()):
            raise TypeMismatch("the predicate must be a bool scalar")
        _check_region(then, inputs, "then branch")
        _check_region(otherwise, inputs, "otherwise branch")
        if then.type != otherwise.type:
            raise TypeMismatch(f"the branches return {then.type!r} and {otherwise.type!r}")
        return then.type

    def evaluate(self, ctx: Any, predicate: Any, *inputs: Any, then: Function, otherwise: Function) -> Any:
        results = ctx.call(then if bool(predicate) else otherwise, inputs)
        return results[0] if len(results) == 1 else results


class Cast(Op):
    """Convert to another element type; floats to bf16/f16 round to nearest even, floats to integers truncate."""

    name = "cast"
    tags = frozenset({"elementwise"})

    def infer(self, x: Tensor, *, dtype: str) -> Type:
        for name in (x.dtype, dtype):
            if _kind(name) == "quantized":
                raise TypeMismatch("quantized types are converted by quantize and dequantize")
        return Tensor(dtype, x.shape)

    def evaluate(self, ctx: Any, x: Any, *, dtype: str) -> Any:
        return ctx.cast(x, dtype)


def _kind(name: str) -> str:
    return dtype(name).kind


param, weight, constant, size_value, iota = Param(), Weight(), Constant(), SizeValue(), Iota()
get, fused, loop, cond, cast = Get(), Fused(), Loop(), Cond(), Cast()
