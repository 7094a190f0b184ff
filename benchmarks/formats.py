"""Every weight format on a Llama-3.2-1B-shaped model with random weights, beside other runtimes on this machine, in the same run.

    python -m benchmarks.make_checkpoint CHECKPOINT
    python -m benchmarks.formats CHECKPOINT --work FOLDER [PEER ...] -o benchmarks/formats.md

PEER: `--llama-bench llama.cpp=PATH --gguf llama.cpp:Q4_0=FILE`, where a fork with the same options has another name and
`=FILE,-rtr 1` gives options of its own; `--openvino LABEL=PYTHON,FOLDER[,PROPERTY=VALUE ...]` or `--onnxruntime` likewise, the
interpreter that has the runtime and an exported model (benchmarks/peers.py).

All artifacts are loaded at once; every round runs each system once, one after the other, each after a probe of the read bandwidth.
Roofline: bytes of the weights that a token reads, over the probe beside that measurement. Speed does not depend on values.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

import stemma
from benchmarks.llama_1b import spread
from stemma.compiler import compile
from stemma.ir import Function, Module, Node, Quantized, Tensor, dtype, ops, quantize_array, walk
from stemma.passes.base import Pass, PassContext
from stemma.passes.contextual_sparsity import ContextualSparsity
from stemma.passes.quantize import RoundActivations
from stemma.runtime.roofline import measure_ceilings

PROMPT, NEW = 512, 64
FORMATS = (
    "int8", "int4_g64", "int4_g128", "int3_g64", "int2_g64", "uint2_g64", "lut1_g128", "lut2_g128", "lut4_g128", "nu4_o9",
    "int4_g64_s50", "int4_g64_2of4", "q4_k", "int4_g64, f32 activations", "int4_g64, 30% of neurons", "int8, 30% of neurons",
)  # fmt: skip
ROWS = 64
RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True)
class Filled(Pass):
    """Weights that repeat ROWS random rows in a format, and rounded activations: the values of a speed test are made up, so that a
    model is made in seconds. For the same reason the label is not lossy: nothing could be measured."""

    format: str = "int8"
    rounded: bool = True
    neurons: float = 1.0
    name: ClassVar[str] = "filled"

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with other weights."""
        if self.neurons < 1:
            module = ContextualSparsity(self.neurons).run(module, context)
        changed = module.map(lambda f: f.rewrite(lambda node, inputs: self._replace(node, inputs, context)))
        return RoundActivations().run(changed, context) if self.rounded else changed

    def _replace(self, node: Node, inputs: tuple[Node, ...], context: PassContext) -> Node:
        at = {"linear": 1, "embedding": 0, "linear_at": 1, "linear_from": 1}.get(node.op.name)
        if at is None or dtype(inputs[at].dtype).kind != "float":
            return node.rebuild(*inputs)
        rows, columns = map(int, inputs[at].shape)
        source = next(n.attrs["name"] for n in walk(Function("", (), {"w": inputs[at]})) if n.op.name == "weight")
        name, type = f"{rows}x{columns}.{source}", Tensor(self.format, (rows, columns))
        if name not in context.weights:
            context.weights.add(name, type, partial(repeated, self.format, rows, columns))
        return node.rebuild(*inputs[:at], ops.weight(name=name, type=type), *inputs[at + 1 :])


def repeated(format: str, rows: int, columns: int) -> Quantized:
    """ROWS random rows in the format, again and again."""
    few = quantize_array(np.random.default_rng(0).standard_normal((ROWS, columns), dtype=np.float32) / np.sqrt(columns), format)
    return few[np.arange(rows) % ROWS]


@dataclass
class System:
    """One thing to measure, and what its rounds gave: tokens per second, and the share of the roofline in each."""

    name: str
    bytes: int
    model: stemma.Model | None = None
    command: tuple[str, ...] = ()
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)


def compiled(checkpoint: Path, work: Path, name: str) -> Path:
    """The artifact of a format, made when it is missing."""
    artifact = work / f"{name.replace(' ', '_').replace(',', '').replace('%', '')}.stemma"
    if not artifact.exists():
        filled = Filled(name.split(",")[0], "f32" not in name, 0.3 if "neurons" in name else 1.0)
        compile(checkpoint, artifact, passes=(filled,), variants=("native",), calibration_tokens=2)
    return artifact


def peers(given: argparse.Namespace) -> list[System]:
    """The other runtimes that were asked for, as commands that print JSON as llama-bench does."""
    programs = dict(b.split("=", 1) for b in given.llama_bench)
    systems = []
    for text in given.gguf:
        name, _, rest = text.partition("=")
        file, _, options = rest.partition(",")
        command = (programs[name.partition(":")[0]], "-m", file, *options.split(), "-r", "1", "-o", "json")
        sizes = ("-t", str(given.threads), "-p", str(PROMPT), "-n", str(NEW))
        label = name.replace(":", " ") + (f", {options}" if options else "")
        systems.append(System(label, Path(file).stat().st_size, command=command + sizes))
    for runtime, name in RUNTIMES.items():
        for text in getattr(given, runtime):
            label, _, rest = text.partition("=")
            python, folder, properties = [*rest.split(",", 2), ""][:3]
            command = (python, str(Path(__file__).with_name("peers.py")), runtime, folder, *properties.split())
            sizes = ("--threads", str(given.threads), "--prompt", str(PROMPT), "--new", str(NEW))
            size = max(f.stat().st_size for f in Path(folder).iterdir())
            systems.append(System(f"{name} {label}", size, command=command + sizes))
    return systems


def measure(system: System, bandwidth: float) -> None:
    """One round."""
    if system.model is None:
        done = subprocess.run(system.command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(system.command)} failed:\n{done.stderr[-2000:]}")
        for entry in json.loads(done.stdout):
            (system.prefill if entry["n_prompt"] else system.decode).append(float(entry["avg_ts"]))
    else:
        model = system.model
        prompt = [i % model.vocab for i in range(1, PROMPT + 1)]
        if not system.decode:  # the peers' programs warm up too
            model.generate_ids(prompt, max_new_tokens=2, ignore_eos=True)
        model.generate_ids(prompt, max_new_tokens=1, ignore_eos=True)
        system.prefill.append(model.last_statistics.prefill_tokens_per_second)
        model.generate_ids(prompt[:1], max_new_tokens=NEW, ignore_eos=True)
        system.decode.append(model.last_statistics.decode_tokens_per_second)
    system.share.append(system.decode[-1] * system.bytes / bandwidth)


def report(systems: list[System], bandwidth: list[float], elements: int, threads: int) -> str:
    """The table in Markdown."""
    lines = [
        f"# Weight formats on the Llama-3.2-1B shape, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.formats`: {threads} threads, {len(systems[0].decode)} interleaved rounds, median [min-max]; "
        f"prefill of {PROMPT}, decode of {NEW} tokens at batch 1; int8 activations unless said. Read bandwidth in the "
        f"same run: {spread([b / 1e9 for b in bandwidth])} GB/s. Share: bytes of the weights times decode tokens/s over the probe.",
        "",
        "| format | bits per weight | GB | decode tok/s | share of its roofline | prefill tok/s |",
        "|---|---|---|---|---|---|",
    ]
    for s in systems:
        share = f"{statistics.median(s.share):.0%}"
        lines.append(
            f"| {s.name} | {8 * s.bytes / elements:.2f} | {s.bytes / 1e9:.3f} | {spread(s.decode)} | {share} | "
            f"{spread(s.prefill, 0)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the artifacts, about 14 GB")
    parser.add_argument("--only", default="", help="formats to measure, separated by semicolons; default all")
    parser.add_argument("--compile", action="store_true", help="only make the artifacts")
    parser.add_argument("--llama-bench", action="append", default=[], metavar="NAME=PATH", help="a llama-bench, and whose")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME:LABEL=FILE[,OPTIONS]")
    for runtime in RUNTIMES:
        parser.add_argument(f"--{runtime}", action="append", default=[], metavar="LABEL=PYTHON,FOLDER[,PROPERTIES]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    names = [n for n in FORMATS if not a.only or n in a.only.split(";")]
    artifacts = {n: compiled(a.checkpoint, a.work, n) for n in names}
    if a.compile:
        return
    loaded = {n: stemma.load(path, threads=a.threads) for n, path in artifacts.items()}
    systems = [System(n, m.manifest.weights_bytes, m) for n, m in loaded.items()]
    systems += peers(a)
    first = next(iter(loaded.values()))
    shapes = [t["shape"] for t in first.manifest.raw["weights"]["tensors"]]
    elements = sum(int(s[0]) * int(s[1]) for s in shapes if len(s) == 2)
    bandwidth: list[float] = []
    for number in range(a.rounds):
        for system in systems:
            bandwidth.append(measure_ceilings(first.device).bandwidth)
            measure(system, bandwidth[-1])
            print(
                f"{number + 1} {system.name}: {system.decode[-1]:.1f} {system.prefill[-1]:.0f} {system.share[-1]:.0%}",
                file=sys.stderr,
            )
    text = report(systems, bandwidth, elements, a.threads)
    print(text)
    if a.output:
        a.output.write_text(text)


if __name__ == "__main__":
    main()
