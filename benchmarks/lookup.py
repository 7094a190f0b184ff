"""Table lookup beside multiplication, kernels alone: `python -m benchmarks.lookup [--model CHECKPOINT] [-o benchmarks/lookup.md]`.

Every round runs each kernel once, one after the other, so that drift of the machine hits all alike; medians of the rounds. Weights
"in cache" are one copy of 512 x 2048, "from memory" many copies of 8192 x 2048 in turn, beside a probe of the read bandwidth of the
same threads in the same rounds. A round counts if the process had its cores: at least 0.9 of threads times wall time as CPU time.
That rule does not look at the times of kernels; how many rounds it refused is printed. Activations are normal numbers, rounded by
groups of 128.

Linear in bits: the largest distance of the times for 1..4 bits from the best line through zero (time = c * bits), nothing
subtracted; beside it the distance from the best line of any height.

With a checkpoint: how often its activations make a chunk of 16 columns be looked up twice, and how often a table of 4 repeats.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_harness import VARIANTS, Library, activations, linear, random_weight, source, supported
from benchmarks.kernels import PROBE, huge

GROUP = 128
ACTIVATION = f"q8_g{GROUP}"
LOOKED = tuple(f"lut{b}_g{GROUP}" for b in (1, 2, 3, 4))
MULTIPLIED = tuple(f"int{b}_g{GROUP}" for b in (2, 3, 4))
COLUMNS = 2048
REPEAT = """
extern "C" void repeat_NAME(void* pool, int64_t calls, int64_t M, int64_t N, int64_t K, const void* x, const char* w, int64_t bytes,
                            int64_t copies, int64_t first, float* y) {
  for (int64_t i = first; i < first + calls; ++i) run_NAME(pool, M, N, K, x, w + i % copies * bytes, y);
}
"""  # calls from C: a call from Python takes as long as a small kernel's quarter
ROWS = (1, 2, 4, 8, 16, 32, 64)
PROMPT = "The table was laid for four, and the letters of the alphabet were counted twice before anyone spoke."


@dataclass
class Case:
    """A kernel on one weight: `run` calls it `calls` times, `seconds` has the time of a call in every round."""

    run: Callable[[int], None]
    bytes: int
    calls: int = 1
    seconds: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Seconds of a call, of `calls` calls."""
        begin = time.perf_counter()
        self.run(self.calls)
        return (time.perf_counter() - begin) / self.calls

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / 2 / self.median


class Busy(Exception):
    """Other work has the cores."""


class Bench:
    """The kernels of all formats in one library, and weights of `outputs` x COLUMNS that fill `bank` bytes."""

    def __init__(self, library: Library, outputs: int, bank: int, threads: int) -> None:
        self.library, self.outputs, self.threads = library, outputs, threads
        self.rng = np.random.default_rng(0)
        self.banks: dict[str, Any] = {}
        for name in (*LOOKED, *MULTIPLIED):
            packed, _ = random_weight(self.rng, outputs, COLUMNS, name)
            copies = huge(max(1, bank // packed.size) * packed.size).reshape(-1, packed.size)
            copies[:] = packed
            self.banks[name] = copies

    def case(self, name: str, rows: int) -> Case:
        """Format `name` times so many rows of x; every call takes the next copy of the weight."""
        x, _ = activations(self.rng.standard_normal((rows, COLUMNS), dtype=np.float32), ACTIVATION)
        y = np.zeros((rows, self.outputs), np.float32)
        copies, turn = self.banks[name], [0]
        function, pool = getattr(self.library.native, f"repeat_{name}"), self.library.pool(self.threads)
        sizes = [ctypes.c_int64(s) for s in (rows, self.outputs, COLUMNS)]
        numbers, weights, result = (ctypes.c_void_p(v.ctypes.data) for v in (x, copies, y))
        extent = [ctypes.c_int64(s) for s in (copies.shape[1], len(copies))]

        def run(calls: int, _kept: Any = (x, y)) -> None:
            function(pool, ctypes.c_int64(calls), *sizes, numbers, weights, *extent, ctypes.c_int64(turn[0]), result)
            turn[0] += calls

        return Case(run, copies.shape[1])

    def probe(self) -> Case:
        """Reads 8 MB at a time."""
        memory, size, turn, sink = huge(256 << 20), 8 << 20, [0], np.zeros(16 * 64, np.float32)
        memory[:] = 1

        def run(calls: int) -> None:
            for _ in range(calls):
                turn[0] = (turn[0] + size) % memory.size
                self.library.call("probe", self.threads, size, memory[turn[0] :], sink)

        return Case(run, size)


def measure(cases: list[Case], rounds: int, threads: int, least: float = 1e-3) -> int:
    """Rounds of all cases in turn, each for at least so many seconds, until `rounds` count; how many it took.

    Where fewer than five count after forty times as many, Busy.
    """
    for case in cases:
        case.run(2)
        begin = time.perf_counter()
        case.run(3)
        case.calls = max(1, round(least / (time.perf_counter() - begin) * 3))
        case.seconds = []
    tried = 0
    while len(cases[0].seconds) < rounds and tried < 40 * rounds:
        tried += 1
        wall, used = time.perf_counter(), time.process_time()
        times = [case.time() for case in cases]
        if time.process_time() - used >= 0.9 * threads * (time.perf_counter() - wall):
            for case, seconds in zip(cases, times, strict=True):
                case.seconds.append(seconds)
    if len(cases[0].seconds) < 5:
        raise Busy(f"in {len(cases[0].seconds)} of {tried} rounds the process had {threads} cores to itself")
    return tried


def from_lines(times: list[float]) -> tuple[float, float]:
    """The largest relative distance of times for 1, 2, 3, 4 bits from the best line through zero, and from the best line."""
    bits = np.arange(1, len(times) + 1)
    each = np.array(times) / bits
    through_zero = float((each.max() - each.min()) / (each.max() + each.min()))
    line = np.polyval(np.polyfit(bits, times, 1), bits)
    return through_zero, float(np.abs(np.array(times) / line - 1).max())


def single_row(bench: Bench, rounds: int, where: str) -> list[str]:
    """Lines of the table for one row of x."""
    cases = {name: bench.case(name, 1) for name in (*LOOKED, *MULTIPLIED)}
    probe = bench.probe()
    tried = measure([probe, *cases.values()], rounds, bench.threads)
    rate = probe.bytes / probe.median / 1e9
    lines = [
        f"## One row, weights {where}, {bench.threads} thread{'s' * (bench.threads > 1)}", "",
        f"{bench.outputs} x {COLUMNS}; reading memory: {rate:.1f} GB/s (±{probe.spread:.0%});"
        f" {len(probe.seconds)} of {tried} rounds count.", "",
        "| format | µs | ± | GB/s | of the probe | Gop/s |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, case in cases.items():
        speed, work = case.bytes / case.median / 1e9, 2 * bench.outputs * COLUMNS / case.median / 1e9
        lines.append(f"| {name} | {case.median * 1e6:.1f} | {case.spread:.0%} | {speed:.1f} | {speed / rate:.0%} | {work:.0f} |")
    zero, line = from_lines([cases[name].median for name in LOOKED])
    return [*lines, "", f"Lookup over 1 to 4 bits: within {zero:.0%} of a line through zero, within {line:.0%} of a line.", ""]


def many_rows(bench: Bench, rounds: int, where: str) -> list[str]:
    """Lines of the table over rows of x: microseconds."""
    names = (*LOOKED, *MULTIPLIED)
    lines = [
        f"## Rows, weights {where}, {bench.threads} thread{'s' * (bench.threads > 1)}", "",
        "Microseconds; lookup with the ratio to the multiply kernel of the same bits (of 1 bit: to the fastest of them).", "",
        "| rows | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|",
    ]  # fmt: skip
    for rows in ROWS:
        cases = {name: bench.case(name, rows) for name in names}
        measure(list(cases.values()), rounds, bench.threads)
        twins = dict(zip(LOOKED[1:], MULTIPLIED, strict=True)) | {LOOKED[0]: min(MULTIPLIED, key=lambda n: cases[n].median)}
        cells = [
            f"{c.median * 1e6:.1f}" + (f" ({c.median / cases[twins[n]].median:.2f})" if n in twins else "")
            for n, c in cases.items()
        ]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def repetition(checkpoint: str) -> list[str]:
    """Of the inputs of all linears of a Hugging Face model, over a prompt: chunks looked up twice, tables that repeat in a row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    seen: list[Any] = []

    def keep(module: Any, inputs: Any) -> None:
        seen.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).numpy())

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep)
    tokens = AutoTokenizer.from_pretrained(checkpoint)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        model(tokens)
    lines = [f"## Activations of {Path(checkpoint).name}", "", f"{tokens.shape[1]} tokens, {len(seen)} linears.", ""]
    lines += [
        "| rounded by groups of | chunks looked up twice | tables that repeat within a row | up to sign | all zero |",
        "|---" * 5 + "|",
    ]
    for group in (32, 64, 128):
        chunks = over = tables = again = signed = zero = 0
        for x in seen:
            if x.shape[1] % group:
                continue
            grouped = x.reshape(len(x), -1, group)
            scale = np.abs(grouped).max(axis=2, keepdims=True) / 127
            quads = (
                np.rint(np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale > 0)).astype(int).reshape(len(x), -1, 4)
            )
            high = (np.abs(quads).sum(axis=2) > 255).reshape(len(x), -1, 4).any(axis=2)
            chunks, over, tables = chunks + high.size, over + int(high.sum()), tables + quads[..., 0].size
            zero += int((quads == 0).all(axis=2).sum())
            for row in quads:
                again += len(row) - len(np.unique(row, axis=0))
                first = np.take_along_axis(row, (row != 0).argmax(axis=1)[:, None], 1)
                signed += len(row) - len(np.unique(row * np.where(first < 0, -1, 1), axis=0))
        shares = " | ".join(f"{share:.2%}" for share in (over / chunks, again / tables, signed / tables, zero / tables))
        lines.append(f"| {group} | {shares} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="")
    parser.add_argument("--variant", default=next(v for v in VARIANTS if supported(v)))
    parser.add_argument("-o", "--output", default="")
    a = parser.parse_args()
    names = (*LOOKED, *MULTIPLIED)
    kernels = [PROBE, *(linear(name, name, ACTIVATION) for name in names)]
    library = Library(source(kernels, "".join(REPEAT.replace("NAME", name) for name in names)), a.variant)
    lines = [
        f"# Table lookup beside multiplication, {datetime.date.today().isoformat()}", "",
        f"`python -m benchmarks.lookup`: {a.variant}, activations {ACTIVATION}, medians of {a.rounds} interleaved rounds,",
        f"load of the machine {os.getloadavg()[0]:.1f} when it began.", "",
    ]  # fmt: skip
    for where, outputs, bank, threads in (
        ("in cache", 512, 0, 1),
        ("from memory", 8192, 160 << 20, 1),
        ("from memory", 8192, 160 << 20, a.threads),
    ):
        bench = Bench(library, outputs, bank, threads)
        try:
            lines += single_row(bench, a.rounds, where)
            if not bank or threads > 1:
                lines += many_rows(bench, max(5, a.rounds // 4), where)
        except Busy as busy:
            lines += [f"## Weights {where}, {threads} threads", "", f"Not measured: {busy}.", ""]
        del bench
    lines += repetition(a.model) if a.model else []
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if a.output:
        Path(a.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
