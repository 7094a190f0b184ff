"""Caches of fewer bits in time: `python -m benchmarks.cache [MODEL.stemma ...] [--context 4096]`.

First the attention kernels alone, on the shape of Llama-3.2-1B (32 heads over 8 key-value heads of 64, 16 layers, each with
memory of its own so that nothing stays in the caches of the machine): one row after `context` positions, and eight rows that share
them. Then the whole decode step of each artifact given, over a cache of made-up numbers. Medians of interleaved rounds, with half
the distance of the quartiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_harness import NAMES, Library, aligned, source
from stemma.backends.cpu.render_templates import render
from stemma.ir import dtype

HEADS, KV_HEADS, WIDTH, LAYERS = 32, 8, 64, 16
TYPES = {  # name: keys, values
    "f32": ("f32", "f32"),
    "bf16": ("bf16", "bf16"),
    "f16": ("f16", "f16"),
    "int8": ("int8", "int8"),
    "int8 keys, int4 values": ("int8", "uint4_g32"),
    "int4": ("uint4_g32", "uint4_g32"),
    "int4, groups of 64": ("uint4_g64", "uint4_g64"),
}


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """(median, half the distance of the quartiles) in seconds of each, every round all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    quartiles = {name: np.percentile(t, (25, 50, 75)) for name, t in times.items()}
    return {name: (float(q[1]), float(q[2] - q[0]) / 2) for name, q in quartiles.items()}


class Kernels:
    """The cached attention of one pair of types over its own memory, filled by its own cache writes."""

    def __init__(self, keys: str, values: str, context: int, threads: int) -> None:
        text = [render("attention.hpp.j2", name="attend", variant="cached", heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH,
                       scale=0.125, window=None, soft_cap=None, keys=keys, values=values)]  # fmt: skip
        text += [render("cache_write.hpp.j2", name=f"write_{n}", kv_heads=KV_HEADS, head_dim=WIDTH, cache=n)
                 for n in dict.fromkeys((keys, values))]  # fmt: skip
        self.library, self.threads, self.slots = Library(source(text), NAMES[0]), threads, context + 64
        self.bytes = 0
        self.layers: list[tuple[Any, Any]] = []
        rng = np.random.default_rng(0)
        x = rng.standard_normal((context + 64, KV_HEADS * WIDTH), dtype=np.float32)
        slots = np.arange(self.slots, dtype=np.int32)
        for _ in range(LAYERS):
            made = []
            for name in (keys, values):
                count = KV_HEADS * int(dtype(name).stored_bytes(WIDTH))  # type: ignore[call-overload]
                memory = aligned(self.slots * count, np.uint8)
                self.library.call(f"write_{name}", threads, self.slots, self.slots, x, KV_HEADS * WIDTH, WIDTH, 0, slots, memory)
                made.append(memory)
                self.bytes += context * count
            self.layers.append((made[0], made[1]))
        self.q = rng.standard_normal((8, HEADS * WIDTH), dtype=np.float32)
        self.y = np.zeros_like(self.q)
        self.table = np.repeat(slots[None], 8, 0)
        self.positions, self.sequence = np.full(8, context - 1, np.int32), np.arange(8, dtype=np.int32)

    def run(self, rows: int) -> None:
        """All layers for the first `rows` rows, each a sequence of its own in the same slots."""
        for k, v in self.layers:
            self.library.call(
                "attend", self.threads, rows, self.slots, self.slots, self.q, HEADS * WIDTH, k, v, self.positions, self.sequence,
                self.table, self.y,
            )  # fmt: skip


def kernels(context: int, threads: int, rounds: int, names: list[str]) -> None:
    """Print the table of the kernels alone."""
    made = {name: Kernels(*TYPES[name], context, threads) for name in names}
    for kernel in made.values():
        kernel.run(8)
    one = interleaved({n: lambda k=k: k.run(1) for n, k in made.items()}, rounds)  # type: ignore[misc]
    eight = interleaved({n: lambda k=k: k.run(8) for n, k in made.items()}, max(3, rounds // 4))  # type: ignore[misc]
    print(f"\n| cache | MB at {context} | one row, ms | | of bf16 | GB/s | eight rows, ms | |\n|---|---|---|---|---|---|---|---|")
    base = one["bf16"][0] if "bf16" in one else 0.0
    for name, kernel in made.items():
        (a, spread), (b, other) = one[name], eight[name]
        share = f"{a / base:.2f}" if base else ""
        print(f"| {name} | {kernel.bytes / 1e6:.0f} | {a * 1e3:.2f} | ±{spread * 1e3:.2f} | {share} | {kernel.bytes / a / 1e9:.1f} "
              f"| {b * 1e3:.2f} | ±{other * 1e3:.2f} |")  # fmt: skip


def steps(paths: list[str], context: int, threads: int, rounds: int) -> None:
    """Print the table of whole decode steps."""
    import stemma
    from stemma.runtime.session import Session

    sessions = {}
    for path in paths:
        model = stemma.load(path, threads=threads)
        session = Session(model.step, 1, context + 1)
        for state in session._states:  # small numbers of every type: no time depends on which, but every page must be there
            state[:] = 0x3C
        session.fill(np.ones(1, np.int32), np.zeros(1, np.int64), np.array([context]))
        session.selected[0] = 0
        sessions[Path(path).stem] = (model, session)
    found = interleaved({n: lambda s=s: s.run(1, 1) for n, (_, s) in sessions.items()}, rounds)  # type: ignore[misc]
    print(f"\n| artifact | cache, bytes per token | one step after {context}, ms | |\n|---|---|---|---|")
    for name, (model, session) in sessions.items():
        each = sum(t.nbytes({"slots": 1}) for t in model.step.spec.states)
        print(f"| {name} | {each} | {found[name][0] * 1e3:.2f} | ±{found[name][1] * 1e3:.2f} |")
        session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=list(TYPES))
    given = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {NAMES[0]}, {given.threads} threads")
    if given.types:
        kernels(given.context, given.threads, given.rounds, given.types)
    if given.models:
        steps(given.models, given.context, given.threads, given.rounds)


if __name__ == "__main__":
    main()
