"""Generated kernels in C++ for the CPU: loops that the compiler vectorises, on the helpers of support.hpp.j2.

Sums over an axis use 16 partial sums (element k goes to lane k % 16) and one fixed tree, so that the result depends on the extent
alone: not on the instruction set's width, the number of threads, or the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stemma.backends.dialect import Buffer, Dialect, Grid
from stemma.ir import Node, dtype

GRAIN = 16384  # elementary operations of one chunk of work: some microseconds, many times the cost of claiming it
BLOCK = 16384  # columns of a long row that one chunk computes

PREAMBLE = """\
// ---- helpers of generated kernels ------------------------------------------------------------------------------------
#if defined(__clang__)
#define ST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ST_INDEPENDENT _Pragma("GCC ivdep")
#endif
#define ST_TERM(variable) [&](int64_t variable) __attribute__((always_inline))

namespace {

template <class T> [[maybe_unused]] static ST_INLINE T st_max(T a, T b) { return (a > b || a != a) ? a : b; }
template <class T> [[maybe_unused]] static ST_INLINE T st_min(T a, T b) { return (a < b || a != a) ? a : b; }
template <class T> [[maybe_unused]] static ST_INLINE T st_sign(T a) { return (T)((a > 0) - (a < 0)); }
template <class T> [[maybe_unused]] static ST_INLINE T st_abs(T a) { return a < 0 ? (T)-a : a; }
template <class T> [[maybe_unused]] static ST_INLINE T st_floordiv(T a, T b) {
  T q = a / b;
  return q * b != a && ((a < 0) != (b < 0)) ? q - 1 : q;
}
template <> [[maybe_unused]] ST_INLINE float st_floordiv<float>(float a, float b) { return __builtin_floorf(a / b); }
template <> [[maybe_unused]] ST_INLINE double st_floordiv<double>(double a, double b) { return __builtin_floor(a / b); }
template <class T> [[maybe_unused]] static ST_INLINE T st_mod(T a, T b) { return a - st_floordiv<T>(a, b) * b; }
[[maybe_unused]] static ST_INLINE int64_t st_least(int64_t a, int64_t b) { return a < b ? a : b; }

// Combines term(0..n-1) in sixteen lanes, element k in lane k % 16, then the lanes in one tree.
template <class T, class Combine, class Term>
static ST_INLINE T st_lanes(int64_t n, T empty, Combine combine, Term term) {
  alignas(64) T total[16], part[16];
  for (int lane = 0; lane < 16; ++lane) total[lane] = empty;
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) {
    for (int lane = 0; lane < 16; ++lane) part[lane] = term(k + lane);
    for (int lane = 0; lane < 16; ++lane) total[lane] = combine(total[lane], part[lane]);
  }
  for (int lane = 0; k + lane < n; ++lane) total[lane] = combine(total[lane], term(k + lane));
  for (int half = 8; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) total[lane] = combine(total[lane], total[lane + half]);
  return total[0];
}
template <class T, class Term> [[maybe_unused]] static ST_INLINE T st_sum(int64_t n, Term term) {
  return st_lanes<T>(n, (T)0, [](T a, T b) { return a + b; }, term);
}
template <class T, class Term> [[maybe_unused]] static ST_INLINE T st_largest(int64_t n, Term term) {
  return st_lanes<T>(n, term(0), [](T a, T b) { return a > b ? a : b; }, term);
}
template <class T, class Term> [[maybe_unused]] static ST_INLINE T st_smallest(int64_t n, Term term) {
  return st_lanes<T>(n, term(0), [](T a, T b) { return a < b ? a : b; }, term);
}
// The same for few elements, in order.
template <class T, class Term> [[maybe_unused]] static ST_INLINE T st_sum_few(int64_t n, Term term) {
  T total = 0;
  for (int64_t k = 0; k < n; ++k) total = total + term(k);
  return total;
}
// Index of the largest, the first of equals.
template <class Term> [[maybe_unused]] static ST_INLINE int64_t st_argmax(int64_t n, Term term) {
  int64_t best = 0;
  auto largest = term(0);
  for (int64_t k = 1; k < n; ++k) {
    auto value = term(k);
    if (value > largest) largest = value, best = k;
  }
  return best;
}

}  // namespace
"""

RESERVED = frozenset(
    "alignas auto bool break case char class const continue default delete do double else enum extern false float for goto if inline "
    "int long namespace new operator private public register return short signed sizeof static struct switch template this throw "
    "true try typedef union unsigned using virtual void volatile while and or not xor team chunk item rows blocks begin end grain "
    "exp log sqrt sin cos tanh erf pow floor ceil abs y0 y1 yn j0 j1 jn signal time index main".split()
)


class Cpp(Dialect):
    """C++ with one thread team; a kernel is called by every thread."""

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
                return _parenthesised(f"{_shortest(float(value), kind)}{suffix}")
            case _:
                return _parenthesised(f"INT64_C({int(value)})" if abs(int(value)) >= 2**31 else str(int(value)))

    def convert(self, text: str, source: str, target: str) -> str:
        if target in ("bf16", "f16"):
            plain = text if source in ("f32", "bf16", "f16") else f"(float)({text})"
            return f"st_f32(st_{target}({plain}))"
        if target == "bool":
            return f"({text} != 0)"
        if self.value[source] == self.value[target] and dtype(target).kind == "float":
            return text
        return f"({self.value[target]})({text})"

    def load(self, buffer: Buffer, offset: str) -> str:
        place = f"{buffer.name}[{offset}]"
        if buffer.dtype == "bool":
            return f"({place} != 0)"
        return f"st_f32({place})" if buffer.dtype in ("bf16", "f16") else place

    def store(self, buffer: Buffer, offset: str, value: str) -> str:
        value = f"st_{buffer.dtype}({value})" if buffer.dtype in ("bf16", "f16") else value
        return f"{buffer.name}[{offset}] = {value};"

    def define(self, type: str, name: str, value: str) -> str:
        return f"const {type} {name} = {value};"

    def loop(self, variable: str, begin: str, end: str) -> str:
        return f"for (int64_t {variable} = {begin}; {variable} < {end}; ++{variable}) {{"

    def reduce(
        self, kind: str, node: Node, result: str, variables: Sequence[tuple[str, str]], small: bool
    ) -> tuple[list[str], str, list[str]]:
        value = self.value_type(node.inputs[0].dtype)
        opening, closing = [], []
        for depth, (variable, extent) in enumerate(variables):
            last = depth == len(variables) - 1
            if kind == "argmax":
                call = "st_argmax"
            elif kind == "sum":
                few = (small and last) or (not last) or dtype(node.dtype).kind != "float"
                call = f"st_sum_few<{value}>" if few else f"st_sum<{value}>"
            else:
                call = f"st_{'largest' if kind == 'max' else 'smallest'}<{value}>"
            head = f"const {self.value_type(node.dtype)} {result} = " if depth == 0 else "return "
            opening.append(f"{head}{call}({extent}, ST_TERM({variable}) {{")
            closing.append("});")
        return opening, "return {value};", closing

    def kernel(
        self, name: str, buffers: Sequence[Buffer], dims: Sequence[str], nests: Sequence[tuple[Grid, list[str]]]
    ) -> list[str]:
        pointers = [f"{'' if b.written else 'const '}{self.memory_type(b.dtype)}* {b.name}" for b in buffers]
        lines = [f"static void {name}({', '.join(['Team& team', *pointers, *(f'int64_t {d}' for d in dims)])}) {{"]
        for grid, body in nests:
            lines += ["  {", *(f"    {line}" for line in _parallel(grid, body)), "  }"]
        return [*lines, "}"]


def _parallel(grid: Grid, body: list[str]) -> list[str]:
    """Chunks of consecutive iterations of the parallel loops, taken by the threads of the team."""
    rows = " * ".join(f"({extent})" if " " in extent else extent for _, extent in grid.loops) or "1"
    lines = [f"// {grid.note}", f"const int64_t rows = {rows};"]
    work = grid.work
    items = "rows"
    if grid.inner is not None:
        lines.append(f"const int64_t blocks = ({grid.inner[1]} + {BLOCK - 1}) / {BLOCK};")
        work = f"st_least({work}, {BLOCK})"
        items = "rows * blocks"
    lines.append(f"const int64_t grain = 1 + {GRAIN} / (1 + {work});")
    lines.append(f"team.parallel(({items} + grain - 1) / grain, [&](int64_t chunk) {{")
    lines.append(f"  for (int64_t item = chunk * grain; item < st_least({items}, (chunk + 1) * grain); ++item) {{")
    rest = "item"
    if grid.inner is not None:
        lines.append(f"    const int64_t begin = item % blocks * {BLOCK}, end = st_least({grid.inner[1]}, begin + {BLOCK});")
        rest = "item / blocks"
    for i, (variable, extent) in reversed(list(enumerate(grid.loops))):
        wrapped = f"({extent})" if " " in extent else extent
        inside = f"({rest})" if " " in rest else rest
        lines.append(f"    const int64_t {variable} = {rest};" if i == 0 else f"    const int64_t {variable} = {inside} % {wrapped};")
        rest = f"{inside} / {wrapped}"
    lines += [f"    {line}" for line in body]
    return [*lines, "  }", "});"]


def _shortest(value: float, kind: str) -> str:
    """The shortest decimal that reads back as the same number."""
    if kind != "f64":
        import numpy as np

        text = str(np.float32(value))
    else:
        text = repr(value)
    return text if any(c in text for c in ".en") else f"{text}.0"


def _parenthesised(text: str) -> str:
    return f"({text})" if text.startswith("-") else text


_MATH = {
    "exp": "st_exp({0})", "log": "st_log({0})", "tanh": "st_tanh({0})", "erf": "st_erf({0})", "sigmoid": "st_sigmoid({0})",
    "sin": "sinf({0})", "cos": "cosf({0})", "pow": "powf({0}, {1})", "sqrt": "vsqrt({0})", "rsqrt": "(1.0f / vsqrt({0}))",
    "reciprocal": "(1.0f / {0})", "floor": "__builtin_floorf({0})", "ceil": "__builtin_ceilf({0})", "round": "__builtin_rintf({0})",
    "exp:f64": "exp({0})", "log:f64": "log({0})", "tanh:f64": "tanh({0})", "erf:f64": "erf({0})",
    "sigmoid:f64": "(1.0 / (1.0 + exp(-({0}))))", "sin:f64": "sin({0})", "cos:f64": "cos({0})", "pow:f64": "pow({0}, {1})",
    "sqrt:f64": "sqrt({0})", "rsqrt:f64": "(1.0 / sqrt({0}))", "reciprocal:f64": "(1.0 / {0})", "floor:f64": "floor({0})",
    "ceil:f64": "ceil({0})", "round:f64": "rint({0})",
}  # fmt: skip
ARITHMETIC = {
    "neg": "(-{0})", "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})",
    "eq": "({0} == {1})", "ne": "({0} != {1})", "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})",
    "logical_and": "({0} & {1})", "logical_or": "({0} | {1})", "logical_not": "(!{0})", "where": "({0} ? {1} : {2})",
    "abs": "st_abs<{T}>({0})", "sign": "st_sign<{T}>({0})", "maximum": "st_max<{T}>({0}, {1})",
    "minimum": "st_min<{T}>({0}, {1})", "floordiv": "st_floordiv<{T}>({0}, {1})", "mod": "st_mod<{T}>({0}, {1})",
}  # fmt: skip
_INTEGERS = {"i64": "int64_t", "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t"}

CPU = Cpp(
    name="C++",
    memory={"f64": "double", "f32": "float", "bf16": "bf16", "f16": "f16", "bool": "uint8_t", **_INTEGERS},
    value={"f64": "double", "f32": "float", "bf16": "float", "f16": "float", "bool": "bool", **_INTEGERS},
    index="int64_t",
    functions=ARITHMETIC | _MATH,
    reserved=RESERVED,
    preamble=PREAMBLE,
    independent="ST_INDEPENDENT",
)
