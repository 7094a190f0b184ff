"""What a constraint costs per decoding step: `python -m benchmarks.constraint [--sequences 1000000] [--length 8] [--vocab 4096]`.

A beam of 8 walks through random token sequences of a closed set. Timed for each position: `candidates` and `advance` on the native
machine (the difference between loops with and without them), a trie of Python dictionaries that gathers the same scores (`gather`),
and the same trie as a mask over the vocabulary for each row, as `prefix_allowed_tokens_fn` of transformers has it (`mask`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stemma.backends.cpu.backend import CpuBackend
from stemma.backends.cpu.device import Device, allocate
from stemma.backends.cpu.toolchain import CpuToolchain
from stemma.codegen.program import Listed, lower_programs
from stemma.ir import Function, Node, Tensor, ops
from stemma.runtime.constraint import csr_trie
from stemma.runtime.machine import Machine

BEAM, TURNS = 8, 20000
NOTHING = {"name": "nothing", "dims": [], "notes": [], "sizes": [], "total": "0", "body": [], "launches": 1, "low": [], "high": []}


def device() -> Device:
    """A kernel library without kernels, and its machine."""
    source = CpuBackend().host(title="constraint", kernels=[], functions=[NOTHING])
    with tempfile.TemporaryDirectory() as folder:
        built = CpuToolchain().build(source, ("native",), Path(folder, "library.so"))
        return Device(built.path.read_bytes(), allocate(4096), threads=1)


def program(name: str, constrained: bool, width: int, vocab: int, states: int, edges: int) -> Function:
    """A loop of TURNS turns, each the step of a beam from the same states; the states after the last one."""

    def param(name: str, *shape: int, dtype: str = "i32") -> Node:
        node: Node = ops.param(name=name, type=Tensor(dtype, shape))
        return node

    outside = [
        param("logits", BEAM, vocab, dtype="f32"), param("states", BEAM), param("indptr", states + 1), param("tokens", edges),
        param("targets", edges),
    ]  # fmt: skip
    inside = [param(n.attrs["name"], *n.type.shape, dtype=n.type.dtype) for n in outside]  # type: ignore[union-attr]
    turn, after = param("turn"), param("after", BEAM)
    logits, now, indptr, tokens, targets = inside
    new = after
    if constrained:
        found = ops.candidates(logits, now, indptr, tokens, targets, width=width)
        first = ops.slice(ops.get(found, index=1), axis=1, start=0, stop=1)
        new = ops.advance(now, ops.reshape(first, shape=(BEAM,)), indptr, tokens, targets)
    one = ops.constant(value=1, dtype="i32")
    again = ops.lt(turn, ops.constant(value=TURNS, dtype="i32"))
    results = {"again": again, "turn": ops.add(turn, one), "after": new} | {n.attrs["name"]: n for n in inside}
    loop = ops.loop(one, outside[1], *outside, body=Function("", [turn, after, *inside], results))
    return Function(name, outside, {"after": ops.get(loop, index=1)})


def run(machine: Machine, name: str, inputs: dict[str, Any]) -> tuple[float, Any]:
    """Seconds of a program, and its result."""
    instance = machine.start(name, inputs)
    start = time.perf_counter()
    while instance.poll()[0] == 0:
        machine.advance()
    took = time.perf_counter() - start
    result = instance.result("after")
    instance.release()
    return took, result


def dictionary(sequences: Any) -> dict[int, Any]:
    """The trie of nested dictionaries."""
    root: dict[int, Any] = {}
    for row in sequences.tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root


def gather(nodes: list[dict[int, Any]], logits: Any, first: list[int]) -> Any:
    """Allowed scores of each row, and the nodes after its chosen token."""
    scores = [[row[token] for token in node] for node, row in zip(nodes, logits, strict=True)]
    return scores, [node[token] for node, token in zip(nodes, first, strict=True)]


def mask(root: dict[int, Any], prefixes: list[list[int]], logits: Any) -> Any:
    """Scores of the whole vocabulary, -inf where the trie does not go on; each prefix is looked up from the root."""
    masks = np.full_like(logits, -np.inf)
    for i, prefix in enumerate(prefixes):
        node = root
        for token in prefix:
            node = node[token]
        masks[i, list(node)] = 0
    return logits + masks


def timed(function: Callable[[], Any], rounds: int) -> float:
    """Microseconds, the best of five."""
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(rounds):
            function()
        best = min(best, (time.perf_counter() - start) / rounds)
    return float(best * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    sequences = rng.integers(0, options.vocab, (options.sequences, options.length)).astype(np.int32)
    start = time.perf_counter()
    indptr, tokens, targets = csr_trie(sequences)
    csr_seconds = time.perf_counter() - start
    start = time.perf_counter()
    root = dictionary(sequences)
    print(f"{options.sequences:,} sequences of {options.length} tokens of {options.vocab}: {len(indptr) - 1:,} states, "
          f"{(indptr.nbytes + tokens.nbytes + targets.nbytes) / 1e6:.0f} MB, built in {csr_seconds:.2f} s "
          f"(dictionaries: {time.perf_counter() - start:.2f} s)")  # fmt: skip

    rows = sequences[rng.integers(0, options.sequences, BEAM)]
    logits = rng.standard_normal((BEAM, options.vocab)).astype(np.float32)
    states = np.zeros(BEAM, np.int32)
    nodes = [root] * BEAM
    widths, at = [], []
    for position in range(options.length):
        widths.append(int((indptr[states + 1] - indptr[states]).max()))
        at.append((states, nodes, [r[:position].tolist() for r in rows]))
        chosen = rows[:, position]
        edges = [
            int(np.searchsorted(tokens[indptr[s] : indptr[s + 1]], t)) + indptr[s] for s, t in zip(states, chosen, strict=True)
        ]
        states = targets[edges]
        nodes = [n[int(t)] for n, t in zip(nodes, chosen, strict=True)]
    counts = len(indptr) - 1, len(tokens)
    functions = [program("plain", False, 1, options.vocab, *counts)]
    functions += [program(f"p{i}", True, w, options.vocab, *counts) for i, w in enumerate(widths)]
    machine = Machine(device(), lower_programs([Listed(f) for f in functions], [], {}))
    print("position   widest   candidates + advance   gather (times)        mask (times)         microseconds per step of 8")
    total = np.zeros(3)
    for position, (states, nodes, prefixes) in enumerate(at):
        inputs = {"logits": logits, "states": states, "indptr": indptr, "tokens": tokens, "targets": targets}
        native = min((run(machine, f"p{position}", inputs)[0] - run(machine, "plain", inputs)[0]) / TURNS * 1e6 for _ in range(3))
        first = [min(n) for n in nodes]
        rounds = 20 if widths[position] > 100 else 500
        python = timed(lambda: gather(nodes, logits, first), rounds), timed(lambda: mask(root, prefixes, logits), rounds)
        total += native, *python
        print(f"{position:8}   {widths[position]:6}   {native:20.2f}   "
              + "   ".join(f"{t:8.1f} ({t / native:6.0f} x)" for t in python))  # fmt: skip
    total /= options.length
    print(f"{'mean':>8}            {total[0]:20.2f}   " + "   ".join(f"{t:8.1f} ({t / total[0]:6.0f} x)" for t in total[1:]))


if __name__ == "__main__":
    main()
