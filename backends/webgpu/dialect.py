"""Generated kernels in WGSL: one invocation per output element, or per row where a row is reduced first.

WGSL has 32-bit scalars only. In memory i64 is i32, bool is u32; bf16, f16, i16, i8 and u8 are packed into u32 words, and are
written by atomics on their word, because neighbours belong to other invocations. f64 does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stemma.backends.c_family import parenthesised, product, shortest, unravel
from stemma.backends.dialect import Buffer, Dialect, Grid, Reduction, bare
from stemma.ir import CompileError, dtype

BLOCK = 64
BITS = {"bf16": 16, "f16": 16, "i16": 16, "i8": 8, "u8": 8}

PREAMBLE = """\
var<private> st_infinity_bits: u32 = 0x7f800000u;
var<private> st_nan_bits: u32 = 0x7fc00000u;
fn st_infinity() -> f32 { return bitcast<f32>(st_infinity_bits); }
fn st_nan() -> f32 { return bitcast<f32>(st_nan_bits); }
fn st_floordiv(a: i32, b: i32) -> i32 {
  let q = a / b;
  return select(q, q - 1, q * b != a && ((a < 0) != (b < 0)));
}
fn st_mod(a: i32, b: i32) -> i32 { return a - st_floordiv(a, b) * b; }
// erf as an odd rational function on [-4, 4], 1 beyond.
fn st_erf(x: f32) -> f32 {
  let c = clamp(x, -4.0, 4.0);
  let z = c * c;
  let p = ((((((-2.72614225801306e-10 * z + 2.77068142495902e-08) * z - 2.10102402082508e-06) * z - 5.69250639462346e-05) * z
    - 7.34990630326855e-04) * z - 2.95459980854025e-03) * z - 1.60960333262415e-02);
  let q = ((((-1.45660718464996e-05 * z - 2.13374055278905e-04) * z - 1.68282697438203e-03) * z - 7.37332916720468e-03) * z
    - 1.42647390514189e-02);
  return c * p / q;
}
fn st_pow(a: f32, b: f32) -> f32 {
  let magnitude = pow(abs(a), b);
  let odd = (i32(b) & 1) != 0;
  return select(magnitude, select(magnitude, -magnitude, odd), a < 0.0);
}
fn st_bf16_bits(x: f32) -> u32 {
  let u = bitcast<u32>(x);
  let rounded = (u + 0x7fffu + ((u >> 16u) & 1u)) >> 16u;
  return select(rounded, (u >> 16u) | 0x40u, (u & 0x7fffffffu) > 0x7f800000u);
}
fn st_f16_bits(x: f32) -> u32 { return pack2x16float(vec2f(x, 0.0)) & 0xffffu; }
fn st_from_bf16(bits: u32) -> f32 { return bitcast<f32>(bits << 16u); }
fn st_from_f16(bits: u32) -> f32 { return unpack2x16float(bits).x; }
"""

RESERVED = frozenset(
    "abs acos alias all any array asin asm async atan atomic auto await become bf16 bitcast bool break case cast catch "
    "ceil clamp class const const_assert continue continuing cos cosh count crate cross debugger default degrees "
    "determinant diagnostic discard distance do dot dyn else enable enum exp exp2 export extends extern f16 f32 false "
    "final finally floor fma fn for fract friend from function get global goto group groups half i32 i64 if impl import "
    "in index inline instanceof interface item layout length let local log log2 loop macro mat match max min mix mod "
    "modf module move mut mutable namespace new nil normalize null nullptr of operator override pack packed params pass "
    "patch pixel pow precise precision private protected ptr pub public radians readonly ref reflect refract regardless "
    "register require requires resource return round saturate select self set shared sign sin sinh sizeof sizes "
    "smoothstep sqrt static std step storage struct super switch tan tanh target template texture this throw trait "
    "transpose true trunc try type typedef typeof u32 u64 u8 uniform union unless unpack unsigned use using var vec "
    "vec2f virtual void volatile wgsl where while with workgroup write writeonly yield".split()
)


class Wgsl(Dialect):
    """WGSL; sizes are members of one uniform buffer, bound after the storage buffers. Groups of `block` along x and then y."""

    def literal(self, value: float | int | bool, kind: str) -> str:
        match dtype(kind).kind:
            case "bool":
                return "true" if value else "false"
            case "float":
                self.value_type(kind)
                if math.isinf(value):
                    return "(-st_infinity())" if value < 0 else "st_infinity()"
                return "st_nan()" if math.isnan(value) else parenthesised(shortest(float(value), kind) + "f")
        if not -(2**31) <= int(value) < 2**31:
            raise CompileError(f"{self.name} has no 64-bit integers; the constant {value} does not fit 32 bits.")
        return parenthesised(str(int(value)))

    def convert(self, text: str, source: str, target: str) -> str:
        if target in ("bf16", "f16"):
            text = bare(text)
            return f"st_from_{target}(st_{target}_bits({text if dtype(source).kind == 'float' else f'f32({text})'}))"
        if target == "u8":
            return f"(i32({bare(text)}) & 255)"
        if target in ("i8", "i16"):
            shift = 32 - BITS[target]
            return f"((i32({bare(text)}) << {shift}u) >> {shift}u)"
        return text if self.value_type(source) == self.value_type(target) else f"{self.value_type(target)}({bare(text)})"

    def load(self, buffer: Buffer, offset: str) -> str:
        if buffer.dtype == "bool":
            return f"({buffer.name}[{offset}] != 0u)"
        if buffer.dtype not in BITS:
            return f"{buffer.name}[{offset}]"
        bits, per_word = BITS[buffer.dtype], 32 // BITS[buffer.dtype]
        word = f"{buffer.name}[({offset}) / {per_word}]"
        word = f"atomicLoad(&{word})" if buffer.written else word
        field = f"(({word} >> ({bits}u * u32(({offset}) % {per_word}))) & {2**bits - 1}u)"
        if buffer.dtype in ("bf16", "f16"):
            return f"st_from_{buffer.dtype}({field})"
        return f"i32({field})" if buffer.dtype == "u8" else f"((i32({field}) << {32 - bits}u) >> {32 - bits}u)"

    def store(self, buffer: Buffer, offset: str, value: str) -> str:
        if buffer.dtype == "bool":
            return f"{buffer.name}[{offset}] = select(0u, 1u, {value});"
        if buffer.dtype not in BITS:
            return f"{buffer.name}[{offset}] = {value};"
        bits, per_word = BITS[buffer.dtype], 32 // BITS[buffer.dtype]
        word, shift = f"&{buffer.name}[({offset}) / {per_word}]", f"({bits}u * u32(({offset}) % {per_word}))"
        field = f"st_{buffer.dtype}_bits({value})" if buffer.dtype in ("bf16", "f16") else f"(u32({value}) & {2**bits - 1}u)"
        return f"atomicAnd({word}, ~({2**bits - 1}u << {shift})); atomicOr({word}, {field} << {shift});"

    def define(self, type: str, name: str, value: str) -> str:
        return f"let {name}: {type} = {value};"

    def loop(self, variable: str, begin: str, end: str) -> str:
        return f"for (var {variable}: i32 = {begin}; {variable} < ({end}); {variable} = {variable} + 1) {{"

    def reduce(self, reduction: Reduction) -> tuple[list[str], str, list[str]]:
        return self.serial_reduction(reduction, "var {name}: {T} = {value};")

    def kernel(
        self, name: str, buffers: Sequence[Buffer], dims: Sequence[str], nests: Sequence[tuple[Grid, list[str]]]
    ) -> list[str]:
        lines = []
        for binding, b in enumerate(buffers):
            access = "read_write" if b.written else "read"
            element = "atomic<u32>" if b.written and b.dtype in BITS else self.memory_type(b.dtype)
            lines.append(f"@group(0) @binding({binding}) var<storage, {access}> {b.name}: array<{element}>;")
        if dims:
            members = ", ".join(f"{d.removeprefix(self.size_prefix)}: i32" for d in dims)
            lines += [f"struct Sizes {{ {members} }}", f"@group(0) @binding({len(buffers)}) var<uniform> sizes: Sizes;"]
        lines += [
            f"@compute @workgroup_size({self.block})",
            f"fn {name}(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u,",
            "    @builtin(local_invocation_index) local: u32) {",
            f"  var item: i32 = i32((group.y * groups.x + group.x) * {self.block}u + local);",
        ]
        for i, (grid, body) in enumerate(nests):
            if i:
                lines.append(f"  item = item - {product(tuple(e for _, e in nests[i - 1][0].loops))};")
            lines += [f"  // {grid.note}", f"  if (0 <= item && item < {product(tuple(e for _, e in grid.loops))}) {{"]
            lines += [f"    let {variable}: i32 = {value};" for variable, value in unravel("item", grid.loops)]
            lines += [*(f"    {line}" for line in body), "  }"]
        return [*lines, "}"]


_INTEGERS = dict.fromkeys(("i64", "i32", "i16", "i8", "u8"), "i32")

WGSL = Wgsl(
    name="WGSL",
    memory={"f32": "f32", "i64": "i32", "i32": "i32", "bool": "u32", **dict.fromkeys(BITS, "u32")},
    value={"f32": "f32", "bf16": "f32", "f16": "f32", "bool": "bool", **_INTEGERS},
    index="i32",
    functions={
        "neg": "(-{0})", "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})",
        "eq": "({0} == {1})", "ne": "({0} != {1})", "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})",
        "ge": "({0} >= {1})", "logical_and": "({0} & {1})", "logical_or": "({0} | {1})", "logical_not": "(!{0})",
        "where": "select({2}, {1}, {0})", "abs": "abs({0})", "sign": "sign({0})", "maximum": "max({0}, {1})",
        "minimum": "min({0}, {1})", "floordiv:int": "st_floordiv({0}, {1})", "mod:int": "st_mod({0}, {1})",
        "floordiv": "floor({0} / {1})", "mod": "({0} - floor({0} / {1}) * {1})", "exp": "exp({0})", "log": "log({0})",
        "sqrt": "sqrt({0})", "rsqrt": "inverseSqrt({0})", "reciprocal": "(1.0f / {0})", "sin": "sin({0})", "cos": "cos({0})",
        "tanh": "tanh(clamp({0}, -15.0f, 15.0f))", "erf": "st_erf({0})", "sigmoid": "(1.0f / (1.0f + exp(-({0}))))",
        "floor": "floor({0})", "ceil": "ceil({0})", "round": "round({0})", "pow": "st_pow({0}, {1})",
    },
    reserved=RESERVED,
    preamble=PREAMBLE,
    block=BLOCK,
    size_prefix="sizes.",
    max_buffers=8,
    index_bits=32,
)  # fmt: skip
