"""Rendering: readable C++, and CUDA C++ and WGSL that their own compilers accept for every kernel of the op suite."""

from __future__ import annotations

import os
import re

import pytest

from stemma.backends.cpu.dialect import CPU
from stemma.backends.cuda import toolchain as nvcc
from stemma.backends.cuda.dialect import CUDA
from stemma.backends.webgpu import validate as tint
from stemma.backends.webgpu.dialect import WGSL
from stemma.codegen.lower import Kernel, lower
from stemma.codegen.render import render
from stemma.ir import CompileError, Function, Node, SizeLike, Tensor, dim, ops, size, stamp
from tests.opcases import CASES, UNGENERATED

N, M = dim("n", 1, 4096), dim("m", 1, 4096)
KERNELS = [k for c in CASES if c.op not in UNGENERATED for k in lower(c.body, f"k_{c.name}")]
IN_MANY_BUFFERS = 9


def require(reason: str) -> None:
    """Skip where a tool is missing, fail where every optional part is required."""
    if reason and os.environ.get("STEMMA_REQUIRE_ALL"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def param(name: str, *shape: SizeLike, dtype: str = "f32") -> Node:
    node: Node = ops.param(name=name, type=Tensor(dtype, shape))
    return node


def lowered(*params: Node, **results: Node) -> Kernel:
    (kernel,) = lower(Function("", params, results), "kernel")
    return kernel


SOFTMAX = """\
static void kernel(Team& team, const float* x, float* r, int64_t n, int64_t m) {
  {
    // max sub exp sum div  (model.py:3 in forward; by fuse)
    const int64_t count = n;
    const int64_t grain = 1 + 16384 / (1 + m * 26 + m + m);
    team.parallel((count + grain - 1) / grain, [&](int64_t chunk) {
      for (int64_t item = chunk * grain; item < st_least(count, (chunk + 1) * grain); ++item) {
        const int64_t i0 = item;
        const float largest = st_largest<float>(m, ST_TERM(k) {
          return x[i0 * m + k];
        });
        const float sum = st_sum<float>(m, ST_TERM(k2) {
          return st_exp(x[i0 * m + k2] - largest);
        });
        ST_INDEPENDENT
        for (int64_t i1 = 0; i1 < m; ++i1) {
          r[i0 * m + i1] = st_exp(x[i0 * m + i1] - largest) / sum;
        }
      }
    });
  }
}
"""


@pytest.mark.quick
def test_cpp_reads_like_a_kernel() -> None:
    x = param("x", N, M)
    with stamp(line="model.py:3 in forward", by="fuse"):
        kernel = lowered(x, r=ops.softmax(x, axis=1))
    assert render(kernel, CPU).source == SOFTMAX


@pytest.mark.quick
def test_rendering_is_reproducible() -> None:
    for kernel in KERNELS[:40]:
        assert render(kernel, WGSL if "f64" not in repr(kernel) else CPU) == render(
            kernel, WGSL if "f64" not in repr(kernel) else CPU
        )


@pytest.mark.quick
def test_names_that_languages_reserve() -> None:
    template, exp, n = param("template", N), param("exp", N), param("n", N)
    kernel = lowered(template, exp, n, fn=ops.tanh(ops.add(ops.add(template, exp), n)), item=ops.exp(exp))
    for dialect in (CPU, CUDA, WGSL):
        rendered = render(kernel, dialect)
        names = [b.name for b in rendered.buffers]
        assert len(set(names)) == len(names) and not {"template", "item", "fn" if dialect is WGSL else ""} & set(names)


@pytest.mark.quick
def test_long_rows_are_shared_and_short_ones_are_not() -> None:
    x, y = param("x", N, 100_000), param("y", N, 4096)
    assert "blocks" in render(lowered(x, r=ops.neg(x)), CPU).source
    assert "blocks" not in render(lowered(y, r=ops.neg(y)), CPU).source
    assert "blocks" not in render(lowered(x, r=ops.softmax(x, axis=1)), CPU).source


@pytest.mark.quick
def test_writes_that_may_meet_stay_in_order() -> None:
    cache, slots, rows = param("cache", 64, 8), param("slots", N, dtype="i32"), param("rows", N, 8)
    kernel = lowered(cache, slots, rows, out=ops.scatter(cache, slots, rows, axis=0))
    assert "const int64_t count = 1;" in render(kernel, CPU).source
    assert render(kernel, CUDA).threads == render(kernel, WGSL).threads == 8


@pytest.mark.quick
def test_work_items_of_devices() -> None:
    x = param("x", N, 3, M)
    assert render(lowered(x, r=ops.exp(x)), CUDA).threads == N * 3 * M
    assert render(lowered(x, r=ops.softmax(x, axis=2)), WGSL).threads == N * 3
    joined = lowered(x, r=ops.concat(x, ops.neg(x), ops.slice(x, axis=1, start=0, stop=1), axis=1))
    assert size.evaluate(render(joined, CUDA).threads, {"n": 2, "m": 5}) == 2 * 4 * 5  # two equal parts share a nest


@pytest.mark.quick
def test_what_a_language_lacks_is_an_error() -> None:
    x = param("x", N, dtype="f64")
    with pytest.raises(CompileError, match="WGSL has no element type f64"):
        render(lowered(x, r=ops.neg(x)), WGSL)
    big = param("big", N, dtype="i64")
    with pytest.raises(CompileError, match="does not fit 32 bits"):
        render(lowered(big, r=ops.add(big, 2**40)), WGSL)
    many = [param(f"x{i}", N) for i in range(IN_MANY_BUFFERS)]
    total = many[0]
    for one in many[1:]:
        total = ops.add(total, one)
    with pytest.raises(CompileError, match="binds 10 buffers; WGSL allows 8"):
        render(lowered(*many, r=total), WGSL)
    assert render(lowered(*many, r=total), CUDA).source


def test_nvcc_compiles_every_kernel() -> None:
    require(nvcc.unavailable())
    rendered = [render(k, CUDA) for k in KERNELS]
    text = nvcc.compile_ptx(CUDA.preamble + "".join(r.source for r in rendered))
    entries = set(re.findall(r"\.visible \.entry (\w+)\(", text))
    assert entries == {r.name for r in rendered}


def test_nvcc_rejects_what_is_wrong() -> None:
    require(nvcc.unavailable())
    with pytest.raises(CompileError, match="missing_function"):
        nvcc.compile_ptx('extern "C" __global__ void f(float* x) { x[0] = missing_function(x[0]); }')


def test_tint_accepts_every_kernel() -> None:
    require(tint.unavailable())
    shaders = {k.name: WGSL.preamble + render(k, WGSL).source for k in KERNELS}
    assert len(shaders) == len(KERNELS) > 100
    assert tint.validate(shaders) == {}


def test_tint_rejects_what_is_wrong() -> None:
    require(tint.unavailable())
    good = "@compute @workgroup_size(64) fn good(@builtin(local_invocation_index) i: u32) {}"
    wrong = {
        "good": good,
        "types": "@compute @workgroup_size(64) fn types() { let x: i32 = 1.5f; }",
        "large": "@compute @workgroup_size(1024) fn large() {}",
        "barrier": "@group(0) @binding(0) var<storage, read_write> x: array<u32>;\n"
        "@compute @workgroup_size(64) fn barrier() { if (x[0] == 1u) { workgroupBarrier(); } }",
    }
    assert set(tint.validate(wrong)) == {"types", "large", "barrier"}
