"""Elementwise operations. Inputs broadcast like numpy arrays; element types must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import dtype
from stemma.ir.node import OPS, Op
from stemma.ir.size import SizeLike
from stemma.ir.types import Tensor, Type

ELEMENTWISE = frozenset({"elementwise"})


def broadcast(*shapes: tuple[SizeLike, ...]) -> tuple[SizeLike, ...]:
    """The numpy broadcast of shapes; symbolic sizes must be equal or 1."""
    rank = max(map(len, shapes))
    result: list[SizeLike] = [1] * rank
    for shape in shapes:
        for axis, s in enumerate(shape, rank - len(shape)):
            if s != 1:
                if result[axis] not in (1, s):
                    raise TypeMismatch(f"the shapes {' and '.join(map(str, shapes))} do not broadcast")
                result[axis] = s
    return tuple(result)


class Unary(Op, abstract=True):
    """An elementwise function of one tensor."""

    tags = ELEMENTWISE
    kinds = ("float",)
    function: Callable[..., Any]

    def infer(self, x: Tensor) -> Type:
        if dtype(x.dtype).kind not in self.kinds:
            raise TypeMismatch(f"needs {' or '.join(self.kinds)} elements")
        return x

    def evaluate(self, ctx: Any, x: Any) -> Any:
        with np.errstate(all="ignore"):
            return type(self).function(x)


def _unary(name: str, function: Callable[..., Any], doc: str, kinds: tuple[str, ...] = ("float",)) -> Op:
    attributes = {"name": name, "function": staticmethod(function), "__doc__": doc, "kinds": kinds}
    type(name.title(), (Unary,), attributes)
    return OPS[name]


class Binary(Op, abstract=True):
    """An elementwise function of two tensors of one element type."""

    tags = ELEMENTWISE
    kinds = ("float", "int")
    function: Callable[..., Any]
    result: str | None = None

    def infer(self, a: Tensor, b: Tensor) -> Type:
        if a.dtype != b.dtype:
            raise TypeMismatch("the element types differ; insert a cast")
        if dtype(a.dtype).kind not in self.kinds:
            raise TypeMismatch(f"needs {' or '.join(self.kinds)} elements")
        return Tensor(self.result or a.dtype, broadcast(a.shape, b.shape))

    def evaluate(self, ctx: Any, a: Any, b: Any) -> Any:
        with np.errstate(all="ignore"):
            return type(self).function(a, b)


def _binary(
    name: str, function: Callable[..., Any], doc: str, kinds: tuple[str, ...] = ("float", "int"), result: str | None = None
) -> Op:
    attributes = {"name": name, "function": staticmethod(function), "__doc__": doc, "kinds": kinds, "result": result}
    type(name.title(), (Binary,), attributes)
    return OPS[name]


class Where(Op):
    """`where(condition, a, b)`: a where the bool condition holds, else b."""

    name = "where"
    tags = ELEMENTWISE

    def infer(self, condition: Tensor, a: Tensor, b: Tensor) -> Type:
        if condition.dtype != "bool":
            raise TypeMismatch("the condition must be bool")
        if a.dtype != b.dtype:
            raise TypeMismatch("the element types differ; insert a cast")
        return Tensor(a.dtype, broadcast(condition.shape, a.shape, b.shape))

    def evaluate(self, ctx: Any, condition: Any, a: Any, b: Any) -> Any:
        return np.where(condition, a, b)


def _erf(x: Any) -> Any:
    """erf to double precision: the series below 3, a continued fraction above (Abramowitz and Stegun 7.1.5, 7.1.14)."""
    x = np.asarray(x)
    z = np.abs(x).astype(np.float64)
    small = np.minimum(z, 3.0)
    term, total = small.copy(), small.copy()
    for n in range(1, 60):
        term = term * (-small * small) / n
        total = total + term / (2 * n + 1)
    large = np.maximum(z, 3.0)
    fraction = np.zeros_like(large)
    for n in range(60, 0, -1):
        fraction = (n / 2) / (large + fraction)
    tail = 1 - np.exp(-large * large) / (np.sqrt(np.pi) * (large + fraction))
    return (np.sign(x) * np.where(z < 3.0, 2 / np.sqrt(np.pi) * total, tail)).astype(x.dtype)


def _divide(a: Any, b: Any) -> Any:
    return a / b


ALL = ("float", "int", "bool")
NUMBERS = ("float", "int")
neg = _unary("neg", np.negative, "-x", NUMBERS)
abs = _unary("abs", np.abs, "|x|", NUMBERS)
sign = _unary("sign", np.sign, "-1, 0 or 1", NUMBERS)
exp = _unary("exp", np.exp, "e**x")
log = _unary("log", np.log, "Natural logarithm.")
sqrt = _unary("sqrt", np.sqrt, "Square root.")
rsqrt = _unary("rsqrt", lambda x: 1 / np.sqrt(x), "1 / sqrt(x)")
reciprocal = _unary("reciprocal", lambda x: 1 / x, "1 / x")
sin = _unary("sin", np.sin, "Sine of x in radians.")
cos = _unary("cos", np.cos, "Cosine of x in radians.")
tanh = _unary("tanh", np.tanh, "Hyperbolic tangent.")
erf = _unary("erf", _erf, "Gauss error function.")
sigmoid = _unary("sigmoid", lambda x: 1 / (1 + np.exp(-x)), "1 / (1 + exp(-x))")
floor = _unary("floor", np.floor, "Largest integer not above x, as a float.")
ceil = _unary("ceil", np.ceil, "Smallest integer not below x, as a float.")
round = _unary("round", np.rint, "Nearest integer, ties to even, as a float.")
logical_not = _unary("logical_not", np.logical_not, "not x", ("bool",))

add = _binary("add", np.add, "a + b")
sub = _binary("sub", np.subtract, "a - b")
mul = _binary("mul", np.multiply, "a * b")
div = _binary("div", _divide, "a / b of floats", ("float",))
floordiv = _binary("floordiv", np.floor_divide, "Largest integer not above a / b.", NUMBERS)
mod = _binary("mod", np.mod, "a - floor(a / b) * b: the sign of b, as in Python.", NUMBERS)
pow = _binary("pow", np.power, "a ** b", ("float",))
maximum = _binary("maximum", np.maximum, "The larger of a and b.")
minimum = _binary("minimum", np.minimum, "The smaller of a and b.")
eq = _binary("eq", np.equal, "a == b", ALL, "bool")
ne = _binary("ne", np.not_equal, "a != b", ALL, "bool")
lt = _binary("lt", np.less, "a < b", NUMBERS, "bool")
le = _binary("le", np.less_equal, "a <= b", NUMBERS, "bool")
gt = _binary("gt", np.greater, "a > b", NUMBERS, "bool")
ge = _binary("ge", np.greater_equal, "a >= b", NUMBERS, "bool")
logical_and = _binary("logical_and", np.logical_and, "a and b", ("bool",))
logical_or = _binary("logical_or", np.logical_or, "a or b", ("bool",))
where = Where()
