"""Lowerings of elementwise ATen operators; ATen's type promotion becomes explicit casts."""

from __future__ import annotations

import math

from stemma.frontend.aten import Call, Number, Unsupported, Value, common, constant, lower, node, to
from stemma.ir import Node, Op, ops
from stemma.ir.formats import dtype

INF = math.inf


def _unary(name: str, op: Op) -> None:
    @lower(f"aten.{name}.default")
    def function(call: Call, x: Node) -> Node:
        return to(op(to(x, call.dtype)), call.dtype)


for _name in ("exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "erf", "sigmoid", "silu", "neg"):
    _unary(_name, getattr(ops, _name))


def _rounding(name: str, op: Op) -> None:
    @lower(f"aten.{name}.default")
    def function(call: Call, x: Node) -> Node:
        return op(x) if x.tensor.is_float else x


for _name in ("floor", "ceil", "round"):
    _rounding(_name, getattr(ops, _name))


@lower("aten.abs.default")
def absolute(call: Call, x: Node) -> Node:
    return ops.abs(x)


@lower("aten.sign.default", "aten.sgn.default")
def sign(call: Call, x: Node) -> Node:
    return ops.sign(x)


def _arithmetic(op: Op, a: Value, b: Value, name: str) -> Node:
    return op(node(a, name), node(b, name))


def _is(value: Value, number: Number) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == number


@lower("aten.add.Tensor", "aten.add.Scalar")
def add(call: Call, a: Value, b: Value, alpha: Number = 1) -> Node:
    if call.dtype == "bool":
        return _arithmetic(ops.logical_or, a, b, "bool")
    if alpha != 1:
        b = mul(call, b, alpha)
    if _is(b, 0) and isinstance(a, Node):  # position ids of an empty cache: arange + 0
        return to(a, call.dtype)
    return _arithmetic(ops.add, a, b, call.dtype)


@lower("aten.sub.Tensor", "aten.sub.Scalar")
def sub(call: Call, a: Value, b: Value, alpha: Number = 1) -> Node:
    return _arithmetic(ops.sub, a, b if alpha == 1 else mul(call, b, alpha), call.dtype)


@lower("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(call: Call, a: Value, b: Value, alpha: Number = 1) -> Node:
    return sub(call, b, a, alpha)


@lower("aten.mul.Tensor", "aten.mul.Scalar")
def mul(call: Call, a: Value, b: Value) -> Node:
    if call.dtype == "bool":
        return _arithmetic(ops.logical_and, a, b, "bool")
    if _is(b, 1) and isinstance(a, Node):
        return to(a, call.dtype)
    return _arithmetic(ops.mul, a, b, call.dtype)


@lower("aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor")
def div(call: Call, a: Value, b: Value) -> Node:
    return to(_arithmetic(ops.div, a, b, call.dtype), call.dtype)


@lower("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def div_mode(call: Call, a: Value, b: Value, *, rounding_mode: str | None = None) -> Node:
    if rounding_mode is None:
        return div(call, a, b)
    if rounding_mode == "floor":
        return _arithmetic(ops.floordiv, a, b, call.dtype)
    if dtype(call.dtype).kind == "float":
        return trunc(call, _arithmetic(ops.div, a, b, call.dtype))
    left, right = node(a, call.dtype), node(b, call.dtype)
    return ops.sign(left) * ops.sign(right) * ops.floordiv(ops.abs(left), ops.abs(right))


@lower("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(call: Call, a: Value, b: Value) -> Node:
    return _arithmetic(ops.floordiv, a, b, call.dtype)


@lower("aten.remainder.Tensor", "aten.remainder.Scalar")
def remainder(call: Call, a: Value, b: Value) -> Node:
    return _arithmetic(ops.mod, a, b, call.dtype)


@lower("aten.fmod.Tensor", "aten.fmod.Scalar")
def fmod(call: Call, a: Value, b: Value) -> Node:
    left, right = node(a, call.dtype), node(b, call.dtype)
    return ops.sign(left) * ops.mod(ops.abs(left), ops.abs(right))


@lower("aten.trunc.default")
def trunc(call: Call, x: Node) -> Node:
    return ops.where(ops.lt(x, constant(0, x.dtype)), ops.ceil(x), ops.floor(x)) if x.tensor.is_float else x


@lower("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(call: Call, base: Value, exponent: Value) -> Node:
    if isinstance(base, Node) and isinstance(exponent, (int, float)):
        x = to(base, call.dtype)
        if exponent in (1, 2, 3, 4):
            product = x
            for _ in range(int(exponent) - 1):
                product = product * x
            return product
        known = {0.5: ops.sqrt, -0.5: ops.rsqrt, -1: ops.reciprocal}
        if x.tensor.is_float and exponent in known:
            return known[exponent](x)
    if dtype(call.dtype).kind != "float":
        raise Unsupported("powers of integers are lowered for the exponents 1 to 4 only")
    return _arithmetic(ops.pow, base, exponent, call.dtype)


@lower("aten.square.default")
def square(call: Call, x: Node) -> Node:
    return to(x, call.dtype) * to(x, call.dtype)


def _choice(name: str, op: Op) -> None:
    @lower(*(f"aten.{n}" for n in (f"{name}imum.default", f"{name}.other")))
    def function(call: Call, a: Value, b: Value) -> Node:
        return _arithmetic(op, a, b, call.dtype)


_choice("max", ops.maximum)
_choice("min", ops.minimum)


@lower("aten.clamp.default", "aten.clamp.Tensor", "aten.clip.default", "aten.hardtanh.default")
def clamp(call: Call, x: Node, min: Value | None = None, max: Value | None = None) -> Node:
    if call.name == "aten.hardtanh.default":
        min, max = -1.0 if min is None else min, 1.0 if max is None else max
    y = to(x, call.dtype)
    y = y if min is None else ops.maximum(y, node(min, call.dtype))
    return y if max is None else ops.minimum(y, node(max, call.dtype))


@lower("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(call: Call, x: Node, min: Value) -> Node:
    return clamp(call, x, min)


@lower("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(call: Call, x: Node, max: Value) -> Node:
    return clamp(call, x, None, max)


def _comparison(name: str) -> None:
    op: Op = getattr(ops, name)

    @lower(f"aten.{name}.Tensor", f"aten.{name}.Scalar")
    def function(call: Call, a: Value, b: Value) -> Node:
        kind = common(a, b)
        if kind == "bool" and name not in ("eq", "ne"):
            kind = "u8"
        return _arithmetic(op, a, b, kind)


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _comparison(_name)


def _logical(name: str, op: Op) -> None:
    @lower(f"aten.logical_{name}.default")
    def logical(call: Call, *values: Node) -> Node:
        return op(*(to(v, "bool") for v in values))

    overloads = ("default",) if name == "not" else ("Tensor", "Scalar")

    @lower(*(f"aten.bitwise_{name}.{o}" for o in overloads), *(f"aten.__{name}__.{o}" for o in overloads if name != "not"))
    def bitwise(call: Call, *values: Value) -> Node:
        if call.dtype != "bool":
            raise Unsupported("bitwise operators are lowered for booleans only")
        return op(*(node(v, "bool") for v in values))


_logical("and", ops.logical_and)
_logical("or", ops.logical_or)
_logical("not", ops.logical_not)


@lower("aten.logical_xor.default", "aten.bitwise_xor.Tensor")
def logical_xor(call: Call, a: Node, b: Node) -> Node:
    if call.dtype != "bool":
        raise Unsupported("bitwise operators are lowered for booleans only")
    return ops.ne(to(a, "bool"), to(b, "bool"))


@lower("aten.isnan.default")
def isnan(call: Call, x: Node) -> Node:
    return ops.ne(x, x)


@lower("aten.isinf.default")
def isinf(call: Call, x: Node) -> Node:
    return ops.eq(ops.abs(x), constant(INF, x.dtype)) if x.tensor.is_float else ops.ne(x, x)


@lower("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(call: Call, condition: Node, a: Value, b: Value) -> Node:
    return ops.where(to(condition, "bool"), node(a, call.dtype), node(b, call.dtype))


@lower("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(call: Call, x: Node, mask: Node, value: Value) -> Node:
    return ops.where(mask, node(value, x.dtype), x)


@lower("aten.log1p.default")
def log1p(call: Call, x: Node) -> Node:
    return ops.log(to(x, call.dtype) + 1.0)


@lower("aten.expm1.default")
def expm1(call: Call, x: Node) -> Node:
    return ops.exp(to(x, call.dtype)) - 1.0


@lower("aten.log2.default")
def log2(call: Call, x: Node) -> Node:
    return ops.log(to(x, call.dtype)) * (1 / math.log(2))


@lower("aten.exp2.default")
def exp2(call: Call, x: Node) -> Node:
    return ops.exp(to(x, call.dtype) * math.log(2))


@lower("aten.tan.default")
def tan(call: Call, x: Node) -> Node:
    return ops.sin(to(x, call.dtype)) / ops.cos(to(x, call.dtype))


@lower("aten.relu.default")
def relu(call: Call, x: Node) -> Node:
    return ops.maximum(x, constant(0, x.dtype))


@lower("aten.relu6.default")
def relu6(call: Call, x: Node) -> Node:
    return clamp(call, x, 0, 6)


@lower("aten.leaky_relu.default")
def leaky_relu(call: Call, x: Node, negative_slope: float = 0.01) -> Node:
    return ops.where(ops.gt(x, constant(0, x.dtype)), x, x * negative_slope)


@lower("aten.elu.default")
def elu(call: Call, x: Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Node:
    low = (ops.exp(ops.minimum(x, constant(0, x.dtype)) * input_scale) - 1.0) * alpha
    return ops.where(ops.gt(x, constant(0, x.dtype)), x, low) * scale


@lower("aten.gelu.default")
def gelu(call: Call, x: Node, *, approximate: str = "none") -> Node:
    return ops.gelu(x, approximate=approximate)


@lower("aten.log_sigmoid.default")
def log_sigmoid(call: Call, x: Node) -> Node:
    # min(x, 0) - log(1 + exp(-|x|)) does not overflow.
    return ops.minimum(x, constant(0, x.dtype)) - ops.log(ops.exp(-ops.abs(x)) + 1.0)


@lower("aten.softplus.default")
def softplus(call: Call, x: Node, beta: Number = 1, threshold: Number = 20) -> Node:
    scaled = x * float(beta)
    stable = ops.maximum(scaled, constant(0, x.dtype)) + ops.log(ops.exp(-ops.abs(scaled)) + 1.0)
    return ops.where(ops.gt(scaled, constant(threshold, x.dtype)), x, stable * (1 / float(beta)))


@lower("aten.mish.default")
def mish(call: Call, x: Node) -> Node:
    return x * ops.tanh(softplus(call, x))


@lower("aten.hardsigmoid.default")
def hardsigmoid(call: Call, x: Node) -> Node:
    return clamp(call, x + 3.0, 0, 6) * (1 / 6)


@lower("aten.hardswish.default")
def hardswish(call: Call, x: Node) -> Node:
    return x * hardsigmoid(call, x)


@lower("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(call: Call, a: Node, b: Node, weight: Value) -> Node:
    return a + (b - a) * node(weight, a.dtype)


@lower("aten.addcmul.default")
def addcmul(call: Call, x: Node, a: Node, b: Node, *, value: Number = 1) -> Node:
    return x + (a * b if value == 1 else a * b * float(value))
