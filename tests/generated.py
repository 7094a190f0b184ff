"""Runs lowered bodies: by the interpreter at the kernel level, and compiled, all in one shared library."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stemma.backends.cpu.dialect import CPU
from stemma.backends.cpu.render_templates import render as template
from stemma.backends.dialect import Dialect
from stemma.codegen.lower import Kernel
from stemma.codegen.render import Rendered, render
from stemma.ir import Array, Function, Node, interpret, size
from stemma.ir.types import numpy_dtype, round_bf16, widen_bf16

FLAGS = (
    "-std=c++20", "-O1", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fPIC", "-shared", "-Wno-psabi", "-pthread",
)  # fmt: skip


def buffers(kernel: Kernel) -> list[tuple[str, Node]]:
    """Names (of inputs and outputs) and parameters of a kernel, in pointer order."""
    names = [*kernel.inputs, *(o for o in kernel.outputs if o not in kernel.alias)]
    return list(zip(names, kernel.function.params, strict=True))


def interpret_kernels(kernels: Sequence[Kernel], inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Array]:
    """Every buffer after the kernels have run in order, by name, in float64."""
    memory: dict[str, Any] = dict(inputs)
    for kernel in kernels:
        given = []
        for name, p in buffers(kernel):
            shape = tuple(size.evaluate(s, sizes) for s in p.shape)
            kind = numpy_dtype(p.dtype) if p.dtype != "bf16" else np.float64
            given.append(memory[name] if name in memory else np.full(shape, 77, kind))
        memory |= interpret(kernel.function, given, sizes=sizes)
    return memory


SHIM = """
#include <math.h>
#include <stdint.h>
#include <string.h>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
struct Three { unsigned x, y; };
static Three blockIdx, threadIdx, gridDim;
struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
static float __bfloat162float(__nv_bfloat16 x) { uint32_t u = (uint32_t)x.bits << 16; float f; memcpy(&f, &u, 4); return f; }
static __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t u; memcpy(&u, &x, 4); return {(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
static float __half2float(__half x) { return (float)x.value; }
static __half __float2half_rn(float x) { return {(_Float16)x}; }
"""
"""Enough of CUDA for the CPU to run a kernel's text, one thread after the other."""


class Native:
    """The kernels of several bodies in one library, compiled once per content (tests of several processes share it).

    With the CUDA dialect the kernels' text is compiled as C++ and every thread of the launch runs in turn.
    """

    def __init__(self, lowered: Mapping[str, Sequence[Kernel]], dialect: Dialect = CPU) -> None:
        self.lowered, self.dialect = lowered, dialect
        self.rendered: dict[str, Rendered] = {k.name: render(k, dialect) for ks in lowered.values() for k in ks}
        self.numbers = {name: i for i, name in enumerate(self.rendered)}
        self.flags = FLAGS if dialect is CPU else (*FLAGS, "-O0")
        self.source = self._source() if dialect is CPU else self._cuda_source()
        self.library = ctypes.CDLL(str(self._build()))
        if dialect is CPU:
            self.library.pool_new.restype = ctypes.c_void_p
            self.pools = {n: ctypes.c_void_p(self.library.pool_new(n)) for n in (1, 3)}

    def _cases(self, call: str) -> list[str]:
        lines = []
        for name, r in self.rendered.items():
            types = [f"{'' if b.written else 'const '}{self.dialect.memory_type(b.dtype)}*" for b in r.buffers]
            arguments = [*(f"({t})p[{i}]" for i, t in enumerate(types)), *(f"d[{i}]" for i in range(len(r.dims)))]
            lines.append(f"    case {self.numbers[name]}: {call.format(name=name, arguments=', '.join(arguments))} break;")
        return lines

    def _source(self) -> str:
        lines = [
            template("support.hpp.j2"), CPU.preamble, "namespace {", *(r.source for r in self.rendered.values()),
            "struct Call { int kernel; void** p; const int64_t* d; };", "static void run(Team& team, void* argument) {",
            "  Call* c = (Call*)argument;", "  void** p = c->p;", "  const int64_t* d = c->d;", "  switch (c->kernel) {",
            *self._cases("{name}(team, {arguments});"), "  }", "}", "}  // namespace",
            'extern "C" void* pool_new(int threads) { return pool_open(threads); }',
            'extern "C" void call(void* pool, int kernel, void** p, const int64_t* d) {', "  Call c{kernel, p, d};",
            "  pool_run((Pool*)pool, run, &c);", "}",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _cuda_source(self) -> str:
        preamble = "\n".join(line for line in self.dialect.preamble.splitlines() if "#include <cuda" not in line)
        lines = [
            SHIM, preamble, *(r.source for r in self.rendered.values()),
            'extern "C" void call(int64_t threads, int kernel, void** p, const int64_t* d) {',
            f"  const unsigned block = {self.dialect.block};", "  gridDim.x = 2;",
            "  for (blockIdx.y = 0; 2 * block * blockIdx.y < threads; ++blockIdx.y)",
            "  for (blockIdx.x = 0; blockIdx.x < 2; ++blockIdx.x)",
            "  for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) switch (kernel) {",
            *self._cases("{name}({arguments});"), "  }", "}",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _build(self) -> Path:
        compiler = os.environ.get("CXX") or "g++"
        assert shutil.which(compiler), "the op suite needs a C++ compiler: install g++ or set CXX"
        key = hashlib.sha256(repr((compiler, self.flags, self.source)).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"stemma-tests-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        kind = "ops" if self.dialect is CPU else "cuda"
        library = folder / f"{kind}-{key}.so"
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                for old in folder.glob(f"{kind}-*"):
                    old.unlink()
                text = folder / f"{kind}-{key}.cpp"
                text.write_text(self.source)
                made = folder / f"{kind}-{key}.tmp"
                subprocess.run([compiler, *self.flags, "-o", str(made), str(text)], check=True)
                made.rename(library)
        return library

    def run(
        self, body: str, function: Function, inputs: Mapping[str, Any], sizes: Mapping[str, int], threads: int = 1
    ) -> dict[str, Array]:
        """Results by name. Memory after each output is checked for writes."""
        memory: dict[str, Array] = {}
        for p in function.params:
            memory[p.attrs["name"]] = _stored(np.asarray(inputs[p.attrs["name"]]), p.dtype)
        for kernel in self.lowered[body]:
            for name, p in buffers(kernel):
                if name not in memory:
                    shape = tuple(size.evaluate(s, sizes) for s in p.shape)
                    memory[name] = _guarded(np.full(shape, 77, numpy_dtype(p.dtype)))
            pointers = (ctypes.c_void_p * len(buffers(kernel)))(*(memory[n].ctypes.data for n, _ in buffers(kernel)))
            dims = (ctypes.c_int64 * max(len(kernel.dims), 1))(*(sizes[d] for d in kernel.dims))
            first: Any = self.pools[threads] if self.dialect is CPU else ctypes.c_int64(
                size.evaluate(self.rendered[kernel.name].threads, sizes)
            )  # fmt: skip
            self.library.call(first, self.numbers[kernel.name], pointers, dims)
            memory |= {out: memory[source] for out, source in kernel.alias.items()}
        for array in memory.values():
            _check_guard(array)
        types = dict(zip(function.result_names, (r.dtype for r in function.results), strict=True))
        return {n: widen_bf16(memory[n]) if t == "bf16" else memory[n] for n, t in types.items()}


GUARD = 64
PATTERN = 0x5A


def _guarded(array: Array) -> Array:
    """A copy with a margin of known bytes behind it."""
    block = np.full(array.nbytes + GUARD, PATTERN, np.uint8)
    view = block[: array.nbytes].view(array.dtype).reshape(array.shape) if array.nbytes else array
    view[...] = array
    return view


def _check_guard(array: Array) -> None:
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert (base.view(np.uint8)[-GUARD:] == PATTERN).all(), "a kernel wrote behind its output"


def _stored(array: Array, name: str) -> Array:
    return _guarded(round_bf16(array) if name == "bf16" else array.astype(numpy_dtype(name)))
