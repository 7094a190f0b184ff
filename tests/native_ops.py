"""Single operations on the native machine (fake models, the library's own samplers and row functions) beside the reference."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from stemma.backends.cpu.device import _SIGNATURES
from stemma.backends.cpu.render_templates import render
from stemma.backends.cpu.toolchain import Job, cache_folder, compile_all, find_compiler, machine_source
from stemma.ir import Function, Node, State, Tensor, ops
from stemma.ir.types import Tuple
from tests.machine import Fake

SHIMS = r"""
#define API extern "C" __attribute__((visibility("hidden")))
static void* work_for(int64_t vocab) {
  static void* work = nullptr;
  free(work);
  return work = malloc(sampling_work_bytes(vocab));
}
API int32_t stemma_sample(void*, const float* x, int64_t n, const void* p, const int32_t* h, int64_t length) {
  return sample(x, n, (const StemmaSampling*)p, h, length, work_for(n));
}
API int32_t stemma_probabilities(void*, const float* x, int64_t n, const void* p, const int32_t* h, int64_t length, float* out) {
  return !probabilities(x, n, (const StemmaSampling*)p, h, length, work_for(n), out);
}
API void stemma_noise(void*, const void* p, float* out, int64_t n) { sampling::fill_noise((const StemmaSampling*)p, out, n); }
API void stemma_top_k(void*, const float* x, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices) {
  for (int64_t i = 0; i < rows; ++i) top_k_row(x + i * n, n, k, values + i * k, indices + i * k);
}
API void stemma_rows(void*, int32_t kind, const float* x, int64_t rows, int64_t n, float* y) {
  for (int64_t i = 0; i < rows; ++i) kind == 2 ? softmax_row(x + i * n, n, y + i * n) : map_row(kind, x + i * n, n, y + i * n);
}
"""
NAMES = {np.dtype(np.float32): "f32", np.dtype(np.int32): "i32", np.dtype(np.int64): "i64", np.dtype(np.bool_): "bool"}


def shims() -> str:
    """The library's samplers and row functions behind the names by which the machine calls them."""
    return render("support.hpp.j2") + render("sampling.hpp.j2") + render("top_k.hpp.j2") + SHIMS


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The machine, the fake kernels and, in place of their stand-ins, the library's samplers and row functions."""
    compiler, folder = find_compiler(), cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    fake = Path(__file__).with_name("fake_machine.cpp").read_text()
    flags = (*compiler.flags(None), "-O2")
    jobs = [Job(compiler, text, flags, "operations on fakes") for text in (machine_source(), fake, shims())]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "machine.so")
        command = [*compiler.command, "-shared", "-pthread", *map(str, compile_all(jobs, folder)), "-o", str(output)]
        subprocess.run(command, check=True)
        made = ctypes.CDLL(str(output))
    for name, (result, arguments) in _SIGNATURES.items():
        if name.startswith("stemma_machine_"):
            getattr(made, name).restype, getattr(made, name).argtypes = result, arguments
    return made


class Ops(Fake):
    """A fake whose tokens are chosen by the library's sampler."""

    def __init__(self, *programs: Function, **options: Any) -> None:
        with patch("tests.machine.library", library):
            super().__init__(*programs, **options)


def results_of(*nodes: Node) -> dict[str, Node]:
    """The tensors among the results of nodes, by name."""
    found = {}
    for i, node in enumerate(nodes):
        if not isinstance(node.type, Tuple):
            if not isinstance(node.type, State):
                found[f"r{i}"] = node
            continue
        for j, type in enumerate(node.type.items):
            if not isinstance(type, State):
                found[f"r{i}_{j}"] = ops.get(node, index=j)
    return found


def param(name: str, value: Any) -> Node:
    """A parameter that takes an array like this one."""
    node: Node = ops.param(name=name, type=Tensor(NAMES[value.dtype], value.shape))
    return node


def run_op(name: str, *arrays: Any, **attrs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(native, reference) results of one operation on arrays, by name."""
    values = {f"x{i}": np.asarray(a) for i, a in enumerate(arrays)}
    params = [param(n, v) for n, v in values.items()]
    return run_function(Function("f", params, results_of(ops.OPS[name](*params, **attrs))), **values)


def run_function(function: Function, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(native, reference) results of a function."""
    fake = Ops(function)
    try:
        return fake.run(function.name, **values)[1], fake.expect(function, **values)[1]
    finally:
        fake.close()


def native_error(name: str, *arrays: Any, **attrs: Any) -> str:
    """What an operation says when it fails; "" when it does not."""
    values = {f"x{i}": np.asarray(a) for i, a in enumerate(arrays)}
    params = [param(n, v) for n, v in values.items()]
    fake = Ops(Function("f", params, results_of(ops.OPS[name](*params, **attrs))))
    try:
        fake.run("f", **values)
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        fake.close()


# ---- states -----------------------------------------------------------------------------------------------------------

VOCAB = 9


def started(history: Node) -> Node:
    """A sequence of the fake model that begins with a row of tokens."""
    node: Node = ops.start(history, model="model", vocab=VOCAB, width=2)
    return node


def followed(history: Node, tree: Node, path: Node, length: int) -> Node:
    """The sequence after a tree was expanded and `length` tokens of a path, i32[length], were followed."""
    text = ops.get(ops.expand(started(history), tree, fresh=1), index=0)
    for i in range(length):
        text = ops.get(ops.follow(text, ops.slice(path, axis=0, start=i, stop=i + 1)), index=0)
    return text


def drawn(root: int, nodes: list[tuple[int, int, float]], size: int, source: int = 0) -> Node:
    """A tree of (parent, token, score) under a root."""
    tree = ops.tree(ops.array(values=(root,)), ops.constant(value=size, dtype="i32"), size=size)
    if nodes:
        parents, tokens, scores = zip(*nodes, strict=True)
        columns = ops.array(values=parents), ops.array(values=tokens), ops.array(values=scores, dtype="f32")
        tree = ops.get(ops.tree_extend(tree, *columns, source=source), index=0)
    return tree
