"""Compiles rendered CPU kernels into one shared library per ISA variant and calls them through ctypes, for tests and benchmarks."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from stemma.backends.cpu.formats import pack_linear, packing_of, q8_row_bytes
from stemma.backends.cpu.formats.plain import bf16_bits, bf16_row, bf16_values
from stemma.backends.cpu.render_templates import render
from stemma.ir import quantize_array

FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-pthread", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "x86-64-v4": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"),
    "x86-64-v3": ("-march=x86-64-v3",),
    "portable": ("-march=x86-64",),
}
NEEDS = {
    "x86-64-v4": {"avx512bw", "avx512_vnni", "avx512_bf16", "avx512_vbmi2"},
    "x86-64-v3": {"avx2", "fma", "f16c"},
    "portable": set[str](),
}


def supported(variant: str) -> bool:
    """Whether this machine runs the variant."""
    if platform.machine() != "x86_64":
        return False
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return NEEDS[variant] <= set(flags.group(1).split() if flags else ())


def entry(kernel: str) -> str:
    """An exported C function `run_NAME(Pool*, arguments...)` for a rendered kernel, from the kernel's own signature."""
    match = re.search(r"static void (\w+)\(Team& team, (.*)\) \{\n", kernel)
    assert match, "no kernel signature found"
    name, parameters = match.group(1), match.group(2)
    names = [p.split("=")[0].strip().split()[-1].lstrip("*&") for p in parameters.split(",")]
    fields = "".join(f"{p.strip()}; " for p in parameters.split(","))
    call = "".join(f", a->{n}" for n in names)
    return (
        f'extern "C" void run_{name}(void* pool, {parameters}) {{\n'
        f"  struct Arguments {{ {fields} }} arguments = {{ {', '.join(names)} }};\n"
        "  pool_run((Pool*)pool, [](Team& team, void* p) {\n"
        f"    auto* a = (Arguments*)p;\n    {name}(team{call});\n  }}, &arguments);\n}}\n"
    )


POOLS = """
extern "C" void* pool_new(int threads) { return pool_open(threads); }
extern "C" void pool_free(void* p) { pool_close((Pool*)p); }
"""


def source(kernels: list[str], extra: str = "") -> str:
    """One translation unit: support, the kernels, their entries."""
    return "\n".join([render("support.hpp.j2"), *kernels, POOLS, *map(entry, kernels), extra])


class Library:
    """A compiled variant: `library.call(name, pool, *args)`; arrays are passed as pointers, ints as int64."""

    def __init__(self, text: str, variant: str, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir()) / "stemma-kernels"
        folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256("\0".join([text, variant, *FLAGS]).encode()).hexdigest()[:16]
        path = folder / f"{variant}-{key}.so"
        if not path.exists():
            cpp = folder / f"{variant}-{key}.{os.getpid()}.cpp"
            cpp.write_text(text)
            part = path.with_suffix(f".{os.getpid()}.part")
            subprocess.run(["g++", *FLAGS, *VARIANTS[variant], "-o", str(part), str(cpp)], check=True)
            part.rename(path)
            cpp.unlink()
        self.variant = variant
        self.native = ctypes.CDLL(str(path))
        self.native.pool_new.restype = ctypes.c_void_p
        self.pools: dict[int, ctypes.c_void_p] = {}

    def pool(self, threads: int) -> ctypes.c_void_p:
        """A pool of that many threads, made once and kept."""
        if threads not in self.pools:
            self.pools[threads] = ctypes.c_void_p(self.native.pool_new(threads))
        return self.pools[threads]

    def call(self, name: str, threads: int, *args: Any) -> Any:
        """Runs kernel `name` on a pool of `threads`."""
        converted: list[Any] = [self.pool(threads)]
        for a in args:
            if isinstance(a, np.ndarray):
                converted.append(ctypes.c_void_p(a.ctypes.data))
            elif a is None:
                converted.append(ctypes.c_void_p(None))
            else:
                converted.append(ctypes.c_int64(int(a)))
        return getattr(self.native, f"run_{name}")(*converted)


NAMES = [v for v in VARIANTS if supported(v)]


def build(text: str) -> dict[str, Library]:
    """One library per variant that this machine runs, compiled two at a time."""
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(NAMES, threads.map(lambda v: Library(text, v), NAMES), strict=True))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same bytes."""
    return bool(np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)))


def aligned(shape: tuple[int, ...] | int, dtype: Any, align: int = 64) -> Any:
    """A zeroed array whose data is aligned to `align` bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + size].view(dtype).reshape(shape)


def q8_rows(x: Any, group: int) -> tuple[Any, Any]:
    """Reference quantize_rows: (packed rows u8 [M, q8_row_bytes], the f64 values that they stand for [M, K])."""
    rows, k = x.shape
    groups = -(-k // group)
    padded = np.zeros((rows, groups * group), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(rows, groups, group)
    scales = (np.abs(blocks).max(axis=2) / np.float32(127)).astype(np.float32)
    safe = np.where(scales == 0, np.float32(1), scales)
    codes = np.rint(blocks / safe[:, :, None]).astype(np.int8)
    packed = aligned((rows, q8_row_bytes(k, group)), np.uint8)
    width = -(-k // 64) * 64
    packed[:, :k] = codes.reshape(rows, -1)[:, :k].view(np.uint8)
    packed[:, width : width + 4 * groups] = scales.view(np.uint8).reshape(rows, -1)
    packed[:, width + 4 * groups : width + 8 * groups] = codes.sum(axis=2, dtype=np.int32).view(np.uint8).reshape(rows, -1)
    return packed, (codes.astype(np.float64) * scales.astype(np.float64)[:, :, None]).reshape(rows, -1)[:, :k]


def bf16_rows(x: Any) -> tuple[Any, Any]:
    """Reference bf16 activations: (bits [M, bf16_row(K)], the f64 values that they stand for)."""
    packed = aligned((x.shape[0], bf16_row(x.shape[1])), np.uint16)
    packed[:, : x.shape[1]] = bf16_bits(x)
    return packed, bf16_values(packed[:, : x.shape[1]]).astype(np.float64)


def activations(x: Any, activation: str) -> tuple[Any, Any]:
    """x packed as a linear kernel with that `activation` wants it, and the values that it then stands for."""
    if activation == "f32":
        return np.ascontiguousarray(x), x.astype(np.float64)
    return bf16_rows(x) if activation == "bf16" else q8_rows(x, int(activation.removeprefix("q8_g")))


def cache_rows(x: Any, name: str) -> tuple[Any, Any]:
    """Reference cache_write: (stored rows u8 [.., bytes of a row], the f32 values that they stand for [.., D]) of f32 x [.., D]."""
    if name in ("f32", "f16"):
        stored = x.astype(np.float32 if name == "f32" else np.float16)
        return stored.view(np.uint8), stored.astype(np.float32)
    if name == "bf16":
        return bf16_bits(x).view(np.uint8), bf16_values(bf16_bits(x))
    rounded = quantize_array(x, name)
    codes, scales = rounded.codes, rounded.scales + np.float32(0)  # not -0
    if name == "int8":
        return np.concatenate([codes.view(np.uint8), scales.view(np.uint8)], axis=-1), rounded.dequantize()
    lanes = codes.reshape(*x.shape[:-1], -1, 8, 2).astype(np.uint32)  # number 2n + e of sixteen is nibble n of word e
    words = (lanes << np.arange(0, 32, 4, dtype=np.uint32)[:, None]).sum(-2, dtype=np.uint32).reshape(*x.shape[:-1], -1)
    sides = np.stack([scales, rounded.parts["zeros"]], -1).astype(np.float16).reshape(*x.shape[:-1], -1)
    return np.concatenate([words.view(np.uint8), sides.view(np.uint8)], axis=-1), rounded.dequantize()


def linear(name: str, weight: str, activation: str, **seams: Any) -> str:
    """The text of one linear kernel."""
    made = packing_of(weight)
    return render("linear.hpp.j2", name=name, weight=weight, activation=activation, core=made.core, **made.seams(), **seams)


def random_weight(rng: np.random.Generator, n: int, k: int, format: str) -> tuple[Any, Any]:
    """A random weight: (packed bytes, aligned; its f64 values [N, K])."""
    if format in ("f32", "bf16"):
        w = rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))
        w = w if format == "f32" else bf16_values(bf16_bits(w))
        packed, values = pack_linear(w, format), w.astype(np.float64)
    else:
        w = (rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))) * rng.uniform(0.5, 1.5, (n, 1)).astype(
            np.float32
        )
        stored = quantize_array(w, format)
        packed, values = pack_linear(stored, format), stored.dequantize().astype(np.float64)
    out = aligned(packed.shape, np.uint8)
    out[:] = packed
    return out, values
