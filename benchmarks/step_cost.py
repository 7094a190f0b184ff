"""What a decode step of n rows costs beside its two floors: `python -m benchmarks.step_cost MODEL.stemma ... [--context 256]`.

Speculative decoding verifies n drafted tokens in one step, so it pays as long as step(n) stays close to step(1). For each n: the
median of interleaved rounds (and half the distance of the quartiles), its ratio to step(1), how much faster decoding is when all n
tokens are accepted and drafting is free (`all followed`: no drafter can bring more), and two floors of this machine: all weights
read once at the probed bandwidth (a model that fits in the caches can beat it), and the n rows' operations at the probed peaks of
the units that do them. `chain`: n tokens in a row. `tree`: n siblings after one prefix, each with a row of the table.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import stemma
from stemma.runtime.function import empty
from stemma.runtime.roofline import Ceilings, measure_ceilings
from stemma.runtime.sizes import compile_size

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Step:
    """The step of one artifact, with `context` positions filled and room for the rows of a call."""

    def __init__(self, path: str, context: int, threads: int | None) -> None:
        self.path, self.context = path, context
        self.model = stemma.load(path, threads=threads)
        spec = self.spec = self.model.manifest.functions["step"]
        self.raw = self.model.manifest.raw["functions"]["step"]["launches"]
        self.most = min([max(ROWS), *(spec.dimension(d).hi for d in ("rows", "sequences") if spec.dimension(d))])  # type: ignore[union-attr]
        slots = -(-(context + 2 * self.most) // 64) * 64
        self.sizes = {"sequences": self.most, "context": slots, "slots": slots}
        values = self.sizes | {"rows": self.most, "outputs": self.most}
        self.arrays: dict[str, Any] = {t.name: empty(t.dims(values), t.dtype) for t in (*spec.inputs, *spec.states, *spec.results)}
        self.launch = self.model.device.launch(spec.index, len(spec.dims), len(self.arrays))
        for position, array in enumerate(self.arrays.values()):
            array[:] = 0
            self.launch.bind(position, array)
        self.arrays["table"][:] = np.arange(slots)
        for start in range(
            0, context, self.most
        ):  # real keys and values: zeros would be cheap to multiply on no machine, but be fair
            count = min(self.most, context - start)
            self._fill(start + np.arange(count), start + np.arange(count), np.zeros(count, np.int32))
            self.launch.resize(self._dims(count, 1))
            self.launch()

    def _fill(self, positions: Any, slots: Any, sequence: Any) -> None:
        a, n = self.arrays, len(positions)
        a["tokens"][:n] = (7 * np.asarray(slots) + 3) % self.model.manifest.vocab
        a["positions"][:n], a["slots"][:n], a["sequence"][:n], a["selected"][:n] = positions, slots, sequence, np.arange(n)

    def _dims(self, rows: int, outputs: int) -> list[int]:
        return [(self.sizes | {"rows": rows, "outputs": outputs})[d.name] for d in self.spec.dims]

    def prepare(self, rows: int, tree: bool) -> None:
        """Make the next calls those of `rows` rows after the context, as a chain or as siblings."""
        index = np.arange(rows, dtype=np.int32)
        if tree:
            self.arrays["table"][:rows, self.context] = self.context + index
            self._fill(self.context + 0 * index, self.context + index, index)
        else:
            self.arrays["table"][:, self.context] = self.context
            self._fill(self.context + index, self.context + index, 0 * index)
        self.launch.resize(self._dims(rows, rows))

    def seconds(self, repeats: int) -> list[float]:
        """The wall time of each of `repeats` calls, after two that warm up."""
        times = []
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            self.launch()
            times.append(time.perf_counter() - begin)
        return times[2:]

    def floors(self, rows: int, ceilings: Ceilings) -> tuple[float, float]:
        """(seconds to read the weights once, seconds of all operations of `rows` rows at the peaks)."""
        names = frozenset(d.name for d in self.spec.dims)
        peaks = {"q8": ceilings.int8, "bf16 activations": ceilings.bf16}
        values = dict.fromkeys(names, 0)
        size = sum(compile_size(launch["bytes"], names)(values) for launch in self.raw)
        values |= {"rows": rows, "outputs": rows, "sequences": 1, "context": self.context + 1}
        work = 0.0
        for launch in self.raw:
            peak = next((p for what, p in peaks.items() if what in launch["what"] and p), ceilings.f32)
            work += compile_size(launch["flops"], names)(values) / peak
        return size / ceilings.bandwidth, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=10)
    a = parser.parse_args()
    steps = [Step(path, a.context, a.threads) for path in a.models]
    ceilings = measure_ceilings(steps[0].model.device)
    rows = [n for n in map(int, a.rows.split(",")) if n <= min(s.most for s in steps)]
    times: dict[tuple[int, int, bool], list[float]] = {}
    for _ in range(a.rounds):
        for n in rows:
            for i, step in enumerate(steps):
                for tree in (False, True):
                    step.prepare(n, tree)
                    times.setdefault((i, n, tree), []).extend(step.seconds(a.repeats))
    device = steps[0].model.device
    print(
        f"{device.variant}, {device.threads} threads, context {a.context}; read {ceilings.bandwidth / 1e9:.1f} GB/s, f32"
        f" {ceilings.f32 / 1e9:.0f}, bf16 {ceilings.bf16 / 1e9:.0f}, int8 {ceilings.int8 / 1e9:.0f} Gop/s. Microseconds."
    )
    for i, step in enumerate(steps):
        print(
            f"\n{step.path}\n\n| n | chain | | / step(1) | all followed | per further row | tree | weights | operations"
            " | chain / larger floor |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        one = float(np.median(times[i, rows[0], False]))
        for n in rows:
            low, chain, high = np.percentile(times[i, n, False], (25, 50, 75))
            siblings = float(np.median(times[i, n, True]))
            weights, work = step.floors(n, ceilings)
            further = (chain - one) / (n - rows[0]) if n > rows[0] else 0.0
            print(
                f"| {n} | {1e6 * chain:.0f} | ±{1e6 * (high - low) / 2:.0f} | {chain / one:.2f} | {n * one / chain:.2f}"
                f" | {1e6 * further:.1f}"
                f" | {1e6 * siblings:.0f} | {1e6 * weights:.0f} | {1e6 * work:.0f} | {chain / max(weights, work):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
