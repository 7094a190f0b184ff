"""What C++ for the CPU and CUDA C++ have in common."""

from __future__ import annotations

import math
from abc import ABC

import numpy as np

from stemma.backends.dialect import Dialect, bare
from stemma.ir import dtype

# Helpers of integer and float arithmetic with the meaning that the IR gives it; @ stands for the function specifiers.
HELPERS = """\
template <class T> @ T st_max(T a, T b) { return (a > b || a != a) ? a : b; }
template <class T> @ T st_min(T a, T b) { return (a < b || a != a) ? a : b; }
template <class T> @ T st_sign(T a) { return (T)((a > 0) - (a < 0)); }
template <class T> @ T st_abs(T a) { return a < 0 ? (T)-a : a; }
template <> @ float st_abs<float>(float a) { return fabsf(a); }
template <> @ double st_abs<double>(double a) { return fabs(a); }
template <class T> @ T st_floordiv(T a, T b) {
  T q = a / b;
  return q * b != a && ((a < 0) != (b < 0)) ? q - 1 : q;
}
template <> @ float st_floordiv<float>(float a, float b) { return floorf(a / b); }
template <> @ double st_floordiv<double>(double a, double b) { return floor(a / b); }
template <class T> @ T st_mod(T a, T b) { return a - st_floordiv<T>(a, b) * b; }
"""

KEYWORDS = frozenset(
    "alignas alignof and asm auto bool break case catch char class const constexpr continue default delete do double else enum "
    "explicit export extern false final float for friend goto if inline int long mutable namespace new noexcept not nullptr "
    "operator or override private protected public register return short signed sizeof static struct switch template this throw "
    "true try typedef typename union unsigned using virtual void volatile while xor bf16 f16 main "
    "exp expf log logf sqrt sqrtf sin sinf cos cosf tan tanh tanhf erf erff pow powf floor floorf ceil ceilf round rint rintf abs "
    "fabs fmax fmin signbit y0 y1 yn j0 j1 jn gamma signal time index div remainder".split()
)

ARITHMETIC = {
    "neg": "(-{0})", "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})",
    "eq": "({0} == {1})", "ne": "({0} != {1})", "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})",
    "ge": "({0} >= {1})", "logical_and": "({0} & {1})", "logical_or": "({0} | {1})", "logical_not": "(!{0})",
    "where": "({0} ? {1} : {2})", "abs": "st_abs<{T}>({0})", "sign": "st_sign<{T}>({0})", "maximum": "st_max<{T}>({0}, {1})",
    "minimum": "st_min<{T}>({0}, {1})", "floordiv": "st_floordiv<{T}>({0}, {1})", "mod": "st_mod<{T}>({0}, {1})",
    "reciprocal": "(1.0f / {0})", "reciprocal:f64": "(1.0 / {0})",
}  # fmt: skip

DOUBLE = {
    "exp:f64": "exp({0})", "log:f64": "log({0})", "tanh:f64": "tanh({0})", "erf:f64": "erf({0})",
    "sigmoid:f64": "(1.0 / (1.0 + exp(-({0}))))", "sin:f64": "sin({0})", "cos:f64": "cos({0})", "pow:f64": "pow({0}, {1})",
    "sqrt:f64": "sqrt({0})", "rsqrt:f64": "(1.0 / sqrt({0}))", "floor:f64": "floor({0})", "ceil:f64": "ceil({0})",
    "round:f64": "rint({0})",
}  # fmt: skip


class CFamily(Dialect, ABC):
    """C++ spelling of constants, definitions and loops."""

    def convert(self, text: str, source: str, target: str) -> str:
        """A cast between types that the language has itself."""
        if target == "bool":
            return f"({text} != 0)"
        if self.value[source] == self.value[target] and dtype(target).kind == "float":
            return text
        return f"({self.value[target]})({bare(text)})"

    def literal(self, value: float | int | bool, kind: str) -> str:
        match dtype(kind).kind:
            case "bool":
                return "true" if value else "false"
            case "float":
                suffix = "" if kind == "f64" else "f"
                if math.isinf(value):
                    return f"(-__builtin_inf{suffix}())" if value < 0 else f"__builtin_inf{suffix}()"
                if math.isnan(value):
                    return f'__builtin_nan{suffix}("")'
                return parenthesised(shortest(float(value), kind) + suffix)
        number = int(value)
        if number == -(2**63):
            return "INT64_MIN"
        return parenthesised(f"{number}ll" if abs(number) >= 2**31 else str(number))

    def define(self, type: str, name: str, value: str) -> str:
        return f"const {type} {name} = {value};"

    def loop(self, variable: str, begin: str, end: str) -> str:
        return f"for ({self.index} {variable} = {begin}; {variable} < {end}; ++{variable}) {{"


def shortest(value: float, kind: str) -> str:
    """The shortest decimal that reads back as the same number of the element type."""
    text = repr(value) if kind == "f64" else str(np.float32(value))
    return text if any(c in text for c in ".en") else f"{text}.0"


def parenthesised(text: str) -> str:
    """Negative constants in parentheses."""
    return f"({text})" if text.startswith("-") else text


def product(extents: tuple[str, ...]) -> str:
    """The product of extents, as text."""
    return " * ".join(f"({e})" if " " in e else e for e in extents) or "1"


def unravel(item: str, loops: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """The loop variables of a work item, innermost fastest: (variable, expression)."""
    found = []
    rest = item
    for i, (variable, extent) in reversed(list(enumerate(loops))):
        wrapped = f"({extent})" if " " in extent else extent
        inside = f"({rest})" if " " in rest else rest
        found.append((variable, rest if i == 0 else f"{inside} % {wrapped}"))
        rest = f"{inside} / {wrapped}"
    return found
