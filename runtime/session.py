"""The decode step called directly, for the logits of whole texts and for profiling. Decoding itself is the machine's work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.device import Device, allocate
from stemma.runtime.errors import ArtifactError
from stemma.runtime.function import empty
from stemma.runtime.manifest import FunctionSpec, Manifest

_INPUTS = ("tokens", "positions", "slots", "sequence", "table", "selected", "weights")
_RESULTS = ("logits", "hidden")
_DIMS = ("rows", "outputs", "sequences", "context", "slots")
_ROUND = 64  # capacities are multiples of this, so that sizes repeat and buffers are reused
_UNBOUNDED = 2**31 - 1


class Step:
    """The compiled decode step of a causal language model, and the cache memory that sessions take turns to use."""

    def __init__(self, device: Device, manifest: Manifest) -> None:
        self.device, self.spec, self.vocab, self.context = device, manifest.functions["step"], manifest.vocab, manifest.context
        self._check(self.spec)
        self.rows = min(manifest.rows, self._limit("rows"), self._limit("outputs"))
        self.sequences = min(self.rows, self._limit("sequences"))
        self.slots = self._limit("slots")
        tokens = next((t for t in self.spec.inputs if t.name == "tokens"), None)
        self.mix = tokens.shape[1]({}) if tokens and len(tokens.shape) == 2 else 1
        self._spare: list[NDArray[np.uint8]] = []

    def _limit(self, name: str) -> int:
        dim = self.spec.dimension(name)
        return dim.hi if dim else _UNBOUNDED

    def _check(self, spec: FunctionSpec) -> None:
        unknown = [t.name for t in spec.inputs if t.name not in _INPUTS] + [d.name for d in spec.dims if d.name not in _DIMS]
        unknown += [t.name for t in spec.results if t.name not in _RESULTS]
        wrong = not spec.results or any(t.dtype != ("f32" if t.name == "weights" else "i32") for t in spec.inputs)
        if unknown or wrong or any(t.dtype != "f32" for t in spec.results):
            raise ArtifactError(
                f"The step of {self.device.source} is not one that this version of Stemma can drive"
                f" ({', '.join(unknown) or 'its inputs must be i32 and its results f32'}). Compile the model again."
            )

    def take_states(self, values: dict[str, int]) -> list[NDArray[np.uint8]]:
        """Memory for every state at these sizes: what the last session left, where it is large enough."""
        sizes = [t.nbytes(values) for t in self.spec.states]
        with self.device.lock:
            spare, self._spare = self._spare, []
        fits = len(spare) == len(sizes) and all(s.size >= n for s, n in zip(spare, sizes, strict=True))
        return spare if fits else [allocate(n) for n in sizes]

    def return_states(self, states: list[NDArray[np.uint8]]) -> None:
        """Give memory back for the next session; only one set is kept."""
        with self.device.lock:
            self._spare = states


class Session:
    """Some sequences of the step, `tokens` positions each, in the caches: for the logits of whole texts, and for profiling.

    `run` computes logits for rows anywhere in any of the sequences; position p of sequence s has the slot s * tokens + p. The bits
    of a row do not depend on the rows that run with it, so how calls are grouped is only a question of speed. Close it when done.
    """

    def __init__(self, step: Step, sequences: int, tokens: int, rows: int | None = None) -> None:
        self.step = step
        width = min(_round(tokens), step.context)
        slots = _round(sequences * tokens)
        self._values = {"rows": 0, "outputs": 0, "sequences": sequences, "context": width, "slots": slots}
        self.table = np.zeros((sequences, width), np.int32)
        self.table[:, :tokens] = np.arange(sequences * tokens).reshape(sequences, tokens)
        rows = min(rows or step.rows, step.rows, sequences * tokens)
        self.positions, self.slots, self.sequence, self.selected = np.zeros((4, rows), np.int32)
        self.tokens = np.zeros((rows, step.mix), np.int32)  # a row is a mixture of tokens: here of one, with the weight 1
        weights = np.zeros((rows, step.mix), np.float32)
        weights[:, 0] = 1
        self.logits = empty((rows, step.vocab), "f32")
        self._states = step.take_states(self._values)
        inputs = (self.tokens, self.positions, self.slots, self.sequence, self.table, self.selected, weights)
        arrays: dict[str, NDArray[Any]] = dict(zip(_INPUTS, inputs, strict=True))
        others = [empty((rows, *(size(self._values) for size in t.shape[1:])), t.dtype) for t in step.spec.results[1:]]
        buffers = [*(arrays[t.name] for t in step.spec.inputs), *self._states, self.logits, *others]
        self._launch = step.device.launch(step.spec.index, len(step.spec.dims), len(buffers))
        for position, buffer in enumerate(buffers):
            self._launch.bind(position, buffer)
        self._result = len(buffers) - len(step.spec.results)
        self._sizes = (-1, -1)

    def run(self, rows: int, outputs: int) -> None:
        """Run the step on the first `rows` entries of tokens, positions, slots and sequence, and `outputs` of selected."""
        self._resize(rows, outputs)
        self._launch()

    def profile(self, rows: int, outputs: int) -> NDArray[np.float64]:
        """Like `run`, with a clock around each kernel: nanoseconds of each, in the order of the manifest's launches."""
        self._resize(rows, outputs)
        return self._launch.profile()

    def _resize(self, rows: int, outputs: int) -> None:
        if self._sizes != (rows, outputs):
            self._sizes = (-1, -1)
            self._values["rows"], self._values["outputs"] = rows, outputs
            self._launch.resize([self._values[d.name] for d in self.step.spec.dims])
            self._sizes = (rows, outputs)

    def fill(self, tokens: NDArray[np.int32], sequence: NDArray[Any], positions: NDArray[Any]) -> None:
        """Set the next call's rows: a token, its sequence and its position each."""
        count = tokens.size
        self.tokens[:count, 0], self.sequence[:count], self.positions[:count] = tokens, sequence, positions
        self.slots[:count] = self.table[sequence, positions]

    def forward(self, ids: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Logits of every token: ids i32[sequences, tokens] from position 0 into out f32[sequences * tokens, vocab]."""
        total = ids.size
        flat = ids.reshape(-1)
        for start in range(0, total, self.positions.size):
            count = min(self.positions.size, total - start)
            index = np.arange(start, start + count)
            self.fill(flat[start : start + count], index // ids.shape[1], index % ids.shape[1])
            self.selected[:count] = np.arange(count)
            self._launch.bind(self._result, out, start * out.strides[0])
            self.run(count, count)

    def close(self) -> None:
        """Give the cache memory back. The session cannot be used afterwards."""
        states, self._states = self._states, []
        if states:
            self.step.return_states(states)


def _round(count: int) -> int:
    return -(-count // _ROUND) * _ROUND
