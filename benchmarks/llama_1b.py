"""Speed of a Llama-3.2-1B-shaped model with random weights, beside llama.cpp on the same machine, in the same run.

    python benchmarks/make_checkpoint.py CHECKPOINT
    python benchmarks/llama_1b.py CHECKPOINT --work FOLDER [--llama-bench PATH --gguf FORMAT=FILE ...] -o benchmarks/llama_1b.md

Every round runs each system once, one after the other, so that drift of the machine hits all alike; a probe of the read bandwidth
brackets the rounds. Medians with minimum and maximum are printed as a dated Markdown table. Speed does not depend on weight values.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPT, NEW = 512, 64


@dataclass
class System:
    """One thing to measure: the command of a round, and what its rounds gave."""

    name: str
    command: list[str]
    bytes: int
    compile_seconds: float | None = None
    compile_peak: float | None = None
    load_seconds: float | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)


FORMATS = {
    "stemma bf16, f32 arithmetic (exact)": ["--preset", "exact"],
    "stemma bf16, bf16 products": ["--preset", "exact", "--pass", "round_activations{dtype=bf16}"],
    "stemma int8 (balanced)": ["--preset", "balanced"],
    "stemma int4 g64 (small)": ["--preset", "small"],
}


def run_measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident bytes of a command that must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024.0


def stemma_systems(checkpoint: Path, work: Path, threads: int, recompile: bool) -> list[System]:
    """Compile every format (all instruction-set variants) and time that."""
    found = []
    for number, (name, options) in enumerate(FORMATS.items()):
        artifact = work / f"1b-{number}.stemma"
        seconds = peak = None
        if recompile or not artifact.exists():
            seconds, peak = run_measured(
                [sys.executable, "-m", "stemma", "compile", str(checkpoint), "-o", str(artifact), *options]
            )
        command = [sys.executable, "-m", "stemma", "bench", str(artifact), "--rounds", "1", "--threads", str(threads), "--json",
                   "--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW)]  # fmt: skip
        code = f"import time, stemma; t = time.perf_counter(); stemma.load({str(artifact)!r}); print(time.perf_counter() - t)"
        load = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        found.append(System(name, command, artifact.stat().st_size, seconds, peak, load))
    return found


def peer_systems(bench: str | None, files: list[str], threads: int) -> list[System]:
    """llama.cpp's own benchmark on GGUF files given as name=path."""
    found = []
    for name, _, path in (f.partition("=") for f in files):
        command = [bench or "", "-m", path, "-t", str(threads), "-p", str(PROMPT), "-n", str(NEW), "-r", "1", "-o", "json"]
        found.append(System(f"llama.cpp {name}", command, Path(path).stat().st_size))
    return found


def measure(system: System) -> None:
    """One round."""
    done = subprocess.run(system.command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(system.command)} failed:\n{done.stderr[-2000:]}")
    data: Any = json.loads(done.stdout)
    if isinstance(data, list):  # llama-bench: one entry per test
        for entry in data:
            (system.prefill if entry["n_prompt"] else system.decode).append(float(entry["avg_ts"]))
        return
    system.prefill.append(data["prefill_tokens_per_second"])
    system.decode.append(data["decode_tokens_per_second"])
    system.between.append(data["between_steps_microseconds"])
    system.bandwidth.append(data["read_bandwidth"])


def spread(values: list[float], digits: int = 1) -> str:
    """median [min-max]"""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def report(systems: list[System], checkpoint: Path, threads: int, rounds: int) -> str:
    """The table in Markdown."""
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    bandwidth = [b for s in systems for b in s.bandwidth]
    ceiling = statistics.median(bandwidth)
    lines = [
        f"# Llama-3.2-1B shape, {datetime.date.today()}",
        "",
        f"{platform.machine()}, {threads} threads, {rounds} interleaved rounds, median [min-max]; prefill of {PROMPT}, "
        f"decode of {NEW} tokens at batch 1. Read bandwidth measured in the same run: "
        f"{spread([b / 1e9 for b in bandwidth])} GB/s. Share: bytes of the file times decode tokens/s over that median.",
        "",
        "| system | GB | decode tok/s | share | prefill tok/s | between steps us | compile s | peak / checkpoint | load s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in systems:
        share = statistics.median(s.decode) * s.bytes / ceiling
        compiled = f"{s.compile_seconds:.0f}" if s.compile_seconds else "-"
        peak = f"{s.compile_peak / size:.2f}" if s.compile_peak else "-"
        load = f"{s.load_seconds:.3f}" if s.load_seconds else "-"
        row = (
            s.name,
            f"{s.bytes / 1e9:.2f}",
            spread(s.decode),
            f"{share:.0%}",
            spread(s.prefill, 0),
            spread(s.between, 0),
            compiled,
            peak,
            load,
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the artifacts, about 8 GB")
    parser.add_argument("--llama-bench", help="path of llama.cpp's llama-bench")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recompile", action="store_true", help="compile again even if the artifact exists, and time it")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    systems = stemma_systems(arguments.checkpoint, arguments.work, arguments.threads, arguments.recompile)
    systems += peer_systems(arguments.llama_bench, arguments.gguf, arguments.threads)
    for number in range(arguments.rounds):
        for system in systems:
            measure(system)
            print(
                f"round {number + 1}: {system.name}: decode {system.decode[-1]:.1f}, prefill {system.prefill[-1]:.0f}",
                file=sys.stderr,
            )
    text = report(systems, arguments.checkpoint, arguments.threads, arguments.rounds)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
