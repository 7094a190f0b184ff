"""Generated kernels in C++ for the CPU: loops that the compiler vectorises, on the helpers of support.hpp.j2.

Sums over an axis use 16 partial sums (element k goes to lane k % 16) and one fixed tree, so that the result depends on the extent
alone: not on the instruction set's width, the number of threads, or the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from stemma.backends.c_family import ARITHMETIC, DOUBLE, HELPERS, KEYWORDS, CFamily, product, unravel
from stemma.backends.dialect import Buffer, Grid, Reduction, bare
from stemma.ir import dtype

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

%HELPERS%
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
_SPECIAL = HELPERS.replace("template <> @", "template <> [[maybe_unused]] ST_INLINE")
PREAMBLE = PREAMBLE.replace("%HELPERS%", _SPECIAL.replace("@", "[[maybe_unused]] static ST_INLINE"))

RESERVED = KEYWORDS | frozenset("team chunk item count blocks begin end grain".split())


class Cpp(CFamily):
    """C++ with one thread team; a kernel is called by every thread."""

    def convert(self, text: str, source: str, target: str) -> str:
        if target in ("bf16", "f16"):
            plain = bare(text) if source in ("f32", "bf16", "f16") else f"(float)({bare(text)})"
            return f"st_f32(st_{target}({plain}))"
        return super().convert(text, source, target)

    def load(self, buffer: Buffer, offset: str) -> str:
        place = f"{buffer.name}[{offset}]"
        if buffer.dtype == "bool":
            return f"({place} != 0)"
        return f"st_f32({place})" if buffer.dtype in ("bf16", "f16") else place

    def store(self, buffer: Buffer, offset: str, value: str) -> str:
        value = f"st_{buffer.dtype}({value})" if buffer.dtype in ("bf16", "f16") else value
        return f"{buffer.name}[{offset}] = {value};"

    def reduce(self, reduction: Reduction) -> tuple[list[str], str, list[str]]:
        term, floating = self.value_type(reduction.term), dtype(reduction.term).kind == "float"
        opening: list[str] = []
        closing: list[str] = []
        for depth, (variable, extent) in enumerate(reduction.loops):
            innermost = depth == len(reduction.loops) - 1
            call = {"argmax": "st_argmax", "max": f"st_largest<{term}>", "min": f"st_smallest<{term}>"}.get(reduction.kind)
            if call is None:
                call = f"st_sum<{term}>" if floating and innermost and not reduction.short else f"st_sum_few<{term}>"
            head = f"const {self.value_type(reduction.type)} {reduction.result} = " if depth == 0 else "return "
            opening.append("  " * depth + f"{head}{call}({extent}, ST_TERM({variable}) {{")
            closing.insert(0, "  " * depth + "});")
        return opening, "return {bare};", closing

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
    lines = [f"// {grid.note}", f"const int64_t count = {product(tuple(extent for _, extent in grid.loops))};"]
    work = grid.work
    items = "count"
    if grid.inner is not None:
        lines.append(f"const int64_t blocks = ({grid.inner[1]} + {BLOCK - 1}) / {BLOCK};")
        work = f"st_least({work}, {BLOCK})"
        items = "count * blocks"
    lines.append(f"const int64_t grain = 1 + {GRAIN} / (1 + {work});")
    lines.append(f"team.parallel(({items} + grain - 1) / grain, [&](int64_t chunk) {{")
    lines.append(f"  for (int64_t item = chunk * grain; item < st_least({items}, (chunk + 1) * grain); ++item) {{")
    rest = "item"
    if grid.inner is not None:
        lines.append(f"    const int64_t begin = item % blocks * {BLOCK}, end = st_least({grid.inner[1]}, begin + {BLOCK});")
        rest = "item / blocks"
    lines += [f"    const int64_t {variable} = {value};" for variable, value in unravel(rest, grid.loops)]
    lines += [f"    {line}" for line in body]
    return [*lines, "  }", "});"]


_MATH = {
    "exp": "st_exp({0})", "log": "st_log({0})", "tanh": "st_tanh({0})", "erf": "st_erf({0})", "sigmoid": "st_sigmoid({0})",
    "sin": "sinf({0})", "cos": "cosf({0})", "pow": "powf({0}, {1})", "sqrt": "vsqrt({0})", "rsqrt": "(1.0f / vsqrt({0}))",
    "floor": "floorf({0})", "ceil": "ceilf({0})", "round": "rintf({0})",
}  # fmt: skip
_INTEGERS = {"i64": "int64_t", "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t"}

CPU = Cpp(
    name="C++",
    memory={"f64": "double", "f32": "float", "bf16": "bf16", "f16": "f16", "bool": "uint8_t", **_INTEGERS},
    value={"f64": "double", "f32": "float", "bf16": "float", "f16": "float", "bool": "bool", **_INTEGERS},
    index="int64_t",
    functions=ARITHMETIC | DOUBLE | _MATH,
    reserved=RESERVED,
    preamble=PREAMBLE,
    independent="ST_INDEPENDENT",
)
