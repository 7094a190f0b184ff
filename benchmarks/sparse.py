"""Sparse and codebook formats at one row of x: `python -m benchmarks.sparse [--n 8192] [--k 2048] [-o benchmarks/sparse.md]`.

GQSA's paper says 1.26 times the speed of its 2-bit kernel and 2.35 times that of 2:4 (arXiv 2412.17560); SqueezeLLM's kernel is to
stay within 1.3 times the time of plain int4. Here every kernel reads its weight from memory, all threads, and takes turns with the
others and with a probe of the read bandwidth, so that drift of the machine hits all alike: medians of the rounds. Beside it the
same kernel in one thread with a weight that stays in the cache: what a core computes when it never waits. A kernel whose computing
is faster than memory is at the wall, and ratios of such kernels are ratios of their bytes. Notes in the page from the first "## "
on are kept.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_harness import VARIANTS, Library, activations, linear, random_weight, source, supported
from benchmarks.kernels import PROBE, huge

PAIRS = (
    ("int4_g64", "q8_g64"), ("int4_g64", "f32"), ("int2_g64", "q8_g64"), ("int4_g64_2of4", "q8_g64"), ("int4_g64_s50", "q8_g64"),
    ("int4_g32_s50", "q8_g32"), ("int4_g16_s50", "q8_g32"), ("int4_g64_s20", "q8_g64"), ("nu4_o9", "q8_g64"), ("nu4_o9", "f32"),
    ("nu4_o0", "f32"), ("nu3_o9", "f32"),
)  # fmt: skip
CACHED = 512  # outputs of the weight that stays in the cache
BANK = 96 << 20  # bytes of the copies of a weight: more than the caches hold


class Case:
    """One kernel: a small weight and many copies of a large one."""

    def __init__(self, library: Library, weight: str, activation: str, n: int, k: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.name, self.weight = f"{weight} x {activation}", weight
        self.function = getattr(library.native, f"run_{weight}__{activation}")
        self.pools = {t: library.pool(t) for t in (1, threads)}
        self.n, self.k, self.threads = n, k, threads
        packed, _ = random_weight(rng, n, k, weight)
        self.bytes = packed.size
        self.bank = huge(-(-BANK // packed.size) * packed.size)
        self.bank.reshape(-1, packed.size)[:] = packed
        self.small, _ = random_weight(rng, CACHED, k, weight)
        self.x, _ = activations(rng.standard_normal((1, k), dtype=np.float32), activation)
        self.y = np.zeros((1, n), np.float32)
        self.turn = 0
        self.memory: list[float] = []
        self.cache: list[float] = []

    def _call(self, threads: int, n: int, address: int) -> float:
        begin = time.perf_counter()
        self.function(
            self.pools[threads], ctypes.c_int64(1), ctypes.c_int64(n), ctypes.c_int64(self.k), ctypes.c_void_p(self.x.ctypes.data),
            ctypes.c_void_p(address), ctypes.c_void_p(self.y.ctypes.data),
        )  # fmt: skip
        return time.perf_counter() - begin

    def round(self, calls: int = 8) -> None:
        """The quickest of some calls each: other work on the machine only ever adds."""
        times = []
        for _ in range(calls):
            self.turn = (self.turn + self.bytes) % self.bank.size
            times.append(self._call(self.threads, self.n, self.bank.ctypes.data + self.turn))
        self.memory.append(min(times))
        self.cache.append(min(self._call(1, CACHED, self.small.ctypes.data) for _ in range(calls)))


def measure(n: int, k: int, threads: int, rounds: int) -> tuple[list[Case], float]:
    """All kernels, and the read bandwidth in bytes per second."""
    variant = next(v for v in VARIANTS if supported(v))
    library = Library(source([PROBE, *(linear(f"{w}__{x}", w, x) for w, x in PAIRS)]), variant)
    cases = [Case(library, w, x, n, k, threads) for w, x in PAIRS]
    stream, sink = huge(BANK), np.zeros(16 * 64, np.float32)
    stream[:] = 1
    part = 8 << 20
    rates = []
    for turn in range(rounds):
        for case in cases:
            case.round()
        times = []
        for i in range(8):
            begin = time.perf_counter()
            library.call("probe", threads, part, stream[(turn * 8 + i) * part % stream.size :], sink)
            times.append(time.perf_counter() - begin)
        rates.append(part / min(times))
    return cases, float(np.median(rates))


def report(cases: list[Case], rate: float, n: int, k: int, threads: int) -> str:
    """The page."""

    def median(times: list[float]) -> float:
        return float(np.median(times))

    lines = [
        f"# Sparse and codebook formats, one row of x, {datetime.date.today()}",
        "",
        f"Weights of {n} x {k} from memory, {threads} threads, beside a read probe of {rate / 1e9:.1f} GB/s; and {CACHED} x {k} "
        f"from the cache, one thread. Medians of {len(cases[0].memory)} rounds in which all take turns.",
        "",
        "| weight x activations | bytes/weight | us | GB/s | share of probe | from the cache, one thread: GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        seconds, small = median(case.memory), case.small.size / median(case.cache)
        lines.append(
            f"| {case.name} | {case.bytes / (n * k):.3f} | {seconds * 1e6:.0f} | {case.bytes / seconds / 1e9:.1f} |"
            f" {case.bytes / seconds / rate:.0%} | {small / 1e9:.1f} |"
        )
    by_name = {c.name: c for c in cases}
    lines += ["", "| ratio of times | measured | by bytes | goal |", "|---|---|---|---|"]
    for slow, fast, goal in RATIOS:
        a, b = by_name[slow], by_name[fast]
        lines.append(f"| {slow} / {fast} | {median(a.memory) / median(b.memory):.2f} | {a.bytes / b.bytes:.2f} | {goal} |")
    return "\n".join(lines) + "\n"


RATIOS = (
    ("int2_g64 x q8_g64", "int4_g64_s50 x q8_g64", "1.26 (GQSA)"),
    ("int4_g64_2of4 x q8_g64", "int4_g64_s50 x q8_g64", "2.35 (GQSA)"),
    ("int4_g64 x q8_g64", "int4_g64_s50 x q8_g64", "-"),
    ("nu4_o9 x f32", "int4_g64 x f32", "at most 1.3 (SqueezeLLM)"),
    ("nu4_o9 x q8_g64", "int4_g64 x q8_g64", "at most 1.3"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("-o", "--output", type=Path)
    a: Any = parser.parse_args()
    page = report(*measure(a.n, a.k, a.threads, a.rounds), a.n, a.k, a.threads)
    print(page)
    if a.output:
        notes = a.output.read_text(encoding="utf-8").partition("\n## ")[1:] if a.output.exists() else ()
        a.output.write_text(page + "".join(notes), encoding="utf-8")


if __name__ == "__main__":
    main()
