"""Speed of the linear kernels alone: `python -m benchmarks.kernels [--k 2048] [--n 8192] [--threads 2] [--rows 1,8,512]`.

Each measurement is bracketed by a read-bandwidth probe of the same threads; matrix-vector work cycles through enough copies
of the weight to defeat the caches. Reported: microseconds, GB/s of packed weights and its share of the probe, Gop/s, and
the Gop/s that the CPU time used would give on idle cores (the honest figure for large M while other work shares the machine).
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import time
from typing import Any

import numpy as np

from benchmarks.kernel_harness import VARIANTS, Library, activations, linear, random_weight, source, supported

PAIRS = (
    ("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("int8", "f32"), ("int8", "q8_g64"), ("int4_g32", "f32"),
    ("int4_g64", "f32"), ("int4_g32", "q8_g32"), ("int4_g64", "q8_g64"), ("int4_g128", "q8_g128"),
    ("int2_g64", "f32"), ("int2_g64", "q8_g64"), ("int2_g128", "q8_g128"), ("int3_g64", "f32"), ("int3_g64", "q8_g64"),
    ("uint2_g64", "f32"), ("uint2_g64", "q8_g64"), ("uint3_g64", "q8_g64"), ("uint4_g64", "q8_g64"), ("int8_g64", "q8_g64"),
    ("ternary_g64", "q8_g64"), ("q2_k", "q8_g32"), ("q4_k", "q8_g32"), ("q6_k", "q8_g32"),
    ("int4_g64_s50", "q8_g64"), ("int4_g32_s50", "q8_g32"), ("int4_g16_s50", "q8_g32"), ("int4_g64_s50", "f32"),
    ("int4_g64_2of4", "q8_g64"), ("int4_g64_2of4", "f32"), ("nu4_o9", "f32"), ("nu4_o9", "q8_g64"), ("nu3_o9", "f32"),
    *((f"lut{bits}_g{group}", f"q8_g{group}") for bits in (1, 2, 3, 4) for group in (64, 128)),
)  # fmt: skip
PROBE = r"""
namespace {
[[maybe_unused]] static void probe(Team& team, int64_t bytes, const char* data, float* out) {
  const int64_t chunk = 1 << 18;
  team.parallel(bytes / chunk, [&](int64_t i) {
    const char* p = data + i * chunk;
    v16i a = splat16i(0), b = a, c = a, d = a;
    for (int64_t j = 0; j < chunk; j += 256) {
      a = a + load16i(p + j); b = b + load16i(p + j + 64); c = c + load16i(p + j + 128); d = d + load16i(p + j + 192);
      ST_UNROLL for (int u = 0; u < 4; ++u) prefetch(p + j + 64 * u + 2048);
    }
    store16(out + team.thread * 16, to_float(a + b + c + d));
  });
}
}
"""


def huge(size: int) -> Any:
    """`size` bytes on transparent huge pages."""
    region = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(region, np.uint8)
    start = -raw.ctypes.data % (2 << 20)
    return raw[start : start + size]


def best(run: Any, least: float = 0.25) -> tuple[float, float]:
    """(least wall seconds, mean CPU seconds of all threads) of repeated calls: other work on the machine only ever adds."""
    run()
    walls: list[float] = []
    used = time.process_time()
    while sum(walls) < least or len(walls) < 3:
        begin = time.perf_counter()
        run()
        walls.append(time.perf_counter() - begin)
    return min(walls), (time.process_time() - used) / len(walls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,2,4,8,16,64,512")
    parser.add_argument("--only", default="")
    parser.add_argument("--variant", default=next(v for v in VARIANTS if supported(v)))
    a = parser.parse_args()
    pairs = [p for p in PAIRS if a.only in "+".join(p)]
    kernels = [linear(f"{w}__{x}", w, x) for w, x in pairs]
    library = Library(source([PROBE, *kernels]), a.variant)
    rng = np.random.default_rng(0)
    stream = huge(256 << 20)
    stream[:] = 1
    sink = np.zeros(16 * 64, np.float32)

    def bandwidth(size: int) -> float:
        """GB/s of reading as many bytes as one weight has, from memory that no cache holds."""
        size = max(size >> 18, 1) << 18
        turn = [0]

        def read() -> None:
            turn[0] = (turn[0] + size) % (stream.size - size)
            library.call("probe", a.threads, size, stream[turn[0] & -64 :], sink)

        return size / best(read, 0.1)[0] / 1e9

    print(f"{a.variant}, {a.threads} threads, K={a.k}, N={a.n}")
    for weight, activation in pairs:
        packed, _ = random_weight(rng, a.n, a.k, weight)
        copies = max(1, (200 << 20) // packed.size)
        bank = huge(copies * packed.size)
        bank.reshape(copies, -1)[:] = packed
        del packed
        for rows in map(int, a.rows.split(",")):
            x, _ = activations(rng.standard_normal((rows, a.k), dtype=np.float32), activation)
            y = np.zeros((rows, a.n), np.float32)
            function = getattr(library.native, f"run_{weight}__{activation}")
            pool, xp, yp = library.pool(a.threads), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data)
            size = bank.size // copies
            turn = [0]

            def step() -> None:
                turn[0] = (turn[0] + 1) % copies
                where = ctypes.c_void_p(bank.ctypes.data + turn[0] * size)
                function(pool, ctypes.c_int64(rows), ctypes.c_int64(a.n), ctypes.c_int64(a.k), xp, where, yp)

            before = bandwidth(size)
            seconds, cpu = best(step)
            wall = max(before, bandwidth(size))
            rate = size / seconds / 1e9
            work = 2 * rows * a.n * a.k / 1e9
            print(
                f"{weight:>9} x {activation:<7} M={rows:<4} {seconds * 1e6:10.1f} us"
                f" {rate:6.1f} GB/s = {rate / wall:4.0%} of {wall:4.1f}"
                f"  {work / seconds:7.1f} Gop/s, by CPU time {work / cpu * a.threads:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
