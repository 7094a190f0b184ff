"""Generated kernels in CUDA C++: one thread per output element, or per row where a row is reduced first."""

from __future__ import annotations

from collections.abc import Sequence

from stemma.backends.c_family import ARITHMETIC, DOUBLE, HELPERS, KEYWORDS, CFamily, product, unravel
from stemma.backends.dialect import Buffer, Grid, Reduction, bare

BLOCK = 256

PREAMBLE = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
""" + HELPERS.replace("template <> @", "template <> __device__ __forceinline__").replace("@", "static __device__ __forceinline__")

RESERVED = KEYWORDS | frozenset("item half threadIdx blockIdx blockDim gridDim warpSize int2 float4 dim3 saturate".split())


class Cuda(CFamily):
    """CUDA C++. A launch covers `Rendered.threads` items with blocks of `block` threads, along x and then y."""

    def convert(self, text: str, source: str, target: str) -> str:
        if target == "bf16":
            return f"__bfloat162float(__float2bfloat16_rn({bare(text)}))"
        if target == "f16":
            return f"__half2float(__float2half_rn({bare(text)}))"
        return super().convert(text, source, target)

    def load(self, buffer: Buffer, offset: str) -> str:
        place = f"{buffer.name}[{offset}]"
        form = {"bool": "({0} != 0)", "bf16": "__bfloat162float({0})", "f16": "__half2float({0})"}.get(buffer.dtype, "{0}")
        return form.format(place)

    def store(self, buffer: Buffer, offset: str, value: str) -> str:
        form = {"bf16": "__float2bfloat16_rn({0})", "f16": "__float2half_rn({0})"}.get(buffer.dtype, "{0}")
        return f"{buffer.name}[{offset}] = {form.format(value)};"

    def reduce(self, reduction: Reduction) -> tuple[list[str], str, list[str]]:
        return self.serial_reduction(reduction, "{T} {name} = {value};")

    def kernel(
        self, name: str, buffers: Sequence[Buffer], dims: Sequence[str], nests: Sequence[tuple[Grid, list[str]]]
    ) -> list[str]:
        pointers = [f"{'' if b.written else 'const '}{self.memory_type(b.dtype)}* __restrict__ {b.name}" for b in buffers]
        arguments = ", ".join([*pointers, *(f"{self.index} {d}" for d in dims)])
        lines = [
            f'extern "C" __global__ void __launch_bounds__({self.block}) {name}({arguments}) {{',
            f"  {self.index} item = ((({self.index})blockIdx.y * gridDim.x) + blockIdx.x) * {self.block} + threadIdx.x;",
        ]
        for i, (grid, body) in enumerate(nests):
            if i:
                lines.append(f"  item -= {product(tuple(e for _, e in nests[i - 1][0].loops))};")
            lines += [f"  // {grid.note}", f"  if (0 <= item && item < {product(tuple(e for _, e in grid.loops))}) {{"]
            lines += [f"    const {self.index} {variable} = {value};" for variable, value in unravel("item", grid.loops)]
            lines += [*(f"    {line}" for line in body), "  }"]
        return [*lines, "}"]


_INTEGERS = {"i64": "int64_t", "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t"}
_MATH = {
    "exp": "expf({0})", "log": "logf({0})", "tanh": "tanhf({0})", "erf": "erff({0})", "sigmoid": "(1.0f / (1.0f + expf(-({0}))))",
    "sin": "sinf({0})", "cos": "cosf({0})", "pow": "powf({0}, {1})", "sqrt": "sqrtf({0})", "rsqrt": "(1.0f / sqrtf({0}))",
    "floor": "floorf({0})", "ceil": "ceilf({0})", "round": "rintf({0})",
}  # fmt: skip

CUDA = Cuda(
    name="CUDA C++",
    memory={"f64": "double", "f32": "float", "bf16": "__nv_bfloat16", "f16": "__half", "bool": "uint8_t", **_INTEGERS},
    value={"f64": "double", "f32": "float", "bf16": "float", "f16": "float", "bool": "bool", **_INTEGERS},
    index="int64_t",
    functions=ARITHMETIC | DOUBLE | _MATH,
    reserved=RESERVED,
    preamble=PREAMBLE,
    block=BLOCK,
)
