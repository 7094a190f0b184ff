"""Cache state of sequences being decoded: slots of the K/V caches, the table from positions to slots, and the step's arrays.

The idea is that of paged attention (vLLM, 2023) with pages of one slot: a sequence is a row of `table`, so two sequences that
share a prefix share slots, and forking one is copying a part of a row. All memory is allocated when the session is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.device import Device, allocate
from stemma.runtime.errors import ArtifactError, InputError
from stemma.runtime.function import empty
from stemma.runtime.manifest import FunctionSpec, Manifest

_INPUTS = ("tokens", "positions", "slots", "sequence", "table", "selected")
_DIMS = ("rows", "outputs", "sequences", "context", "slots")
_ROUND = 64  # capacities are multiples of this, so that sizes repeat and buffers are reused
_UNBOUNDED = 2**31 - 1


class Slots:
    """Slots of the caches, counted by use, handed out lowest first so that a sequence's slots are neighbours."""

    def __init__(self, count: int) -> None:
        self._uses = np.zeros(count, np.int32)
        self._free = np.arange(count - 1, -1, -1, dtype=np.int32)
        self._available = count

    @property
    def available(self) -> int:
        """Slots that nothing uses."""
        return self._available

    def take(self, count: int) -> NDArray[np.int32]:
        """That many unused slots, now used once. InputError when there are fewer."""
        if count > self._available:
            raise InputError(f"The session has {self._available} free cache slots, {count} are needed. Make it larger.")
        self._available -= count
        taken = self._free[self._available : self._available + count][::-1].copy()
        self._uses[taken] = 1
        return taken

    def share(self, slots: NDArray[np.int32]) -> None:
        """Count one more use of each of these slots."""
        self._uses[slots] += 1

    def release(self, slots: NDArray[np.int32]) -> None:
        """Count one use less of each of these slots; those without a use are free again."""
        self._uses[slots] -= 1
        freed = slots[self._uses[slots] == 0]
        self._free[self._available : self._available + freed.size] = freed[::-1]
        self._available += freed.size


class Step:
    """The compiled decode step of a causal language model, and the cache memory that sessions take turns to use."""

    def __init__(self, device: Device, manifest: Manifest) -> None:
        self.device, self.spec, self.vocab, self.context = device, manifest.functions["step"], manifest.vocab, manifest.context
        self._check(self.spec)
        self.rows = min(manifest.rows, self._limit("rows"), self._limit("outputs"))
        self.sequences = min(self.rows, self._limit("sequences"))
        self.slots = self._limit("slots")
        outputs = self.spec.dimension("outputs")
        self.needs_output = outputs is None or outputs.lo > 0
        self._spare: list[NDArray[np.uint8]] = []

    def _limit(self, name: str) -> int:
        dim = self.spec.dimension(name)
        return dim.hi if dim else _UNBOUNDED

    def _check(self, spec: FunctionSpec) -> None:
        unknown = [t.name for t in spec.inputs if t.name not in _INPUTS] + [d.name for d in spec.dims if d.name not in _DIMS]
        logits = spec.results[0] if len(spec.results) == 1 else None
        if unknown or logits is None or logits.dtype != "f32" or any(t.dtype != "i32" for t in spec.inputs):
            raise ArtifactError(
                f"The step of {self.device.source} is not one that this version of Stemma can drive"
                f" ({', '.join(unknown) or 'its inputs must be i32 and its result f32 logits'}). Compile the model again."
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
    """Sequences in the caches, row i of the table holding up to `capacities[i]` positions.

    `run` computes logits for rows anywhere in any of the sequences; `prefill` and `decode` are the two uses of it. The bits of a
    row do not depend on the rows that run with it, so how calls are grouped (at most `rows` rows in one) is only a question of
    speed. Close it when done.
    """

    def __init__(self, step: Step, capacities: Sequence[int], rows: int | None = None) -> None:
        if not 0 < len(capacities) <= step.sequences:
            raise InputError(f"A session holds 1 to {step.sequences} sequences, not {len(capacities)}.")
        if max(capacities) > step.context:
            raise InputError(f"A sequence of {max(capacities)} positions exceeds the model's context of {step.context}.")
        self.step, self.lengths = step, [0] * len(capacities)
        width = min(_round(max(capacities)), step.context)
        slots = _round(sum(capacities))
        if slots > step.slots:
            raise InputError(f"The session needs {slots} cache slots; the model was compiled for at most {step.slots}.")
        self.slots = Slots(slots)
        self._values = {"rows": 0, "outputs": 0, "sequences": len(capacities), "context": width, "slots": slots}
        self.table = np.zeros((len(capacities), width), np.int32)
        for row, capacity in enumerate(capacities):
            self.table[row, :capacity] = self.slots.take(capacity)
        rows = min(rows or step.rows, step.rows, sum(capacities))
        self.tokens, self.positions, self.rows_slots, self.sequence, self.selected = np.zeros((5, rows), np.int32)
        self.logits = empty((min(rows, len(capacities)), step.vocab), "f32")
        self.native_seconds = 0.0
        self._states = step.take_states(self._values)
        self._prepare()

    def _prepare(self) -> None:
        spec = self.step.spec
        arrays = dict(zip(_INPUTS, (self.tokens, self.positions, self.rows_slots, self.sequence, self.table, self.selected)))
        buffers: list[NDArray[Any]] = [*(arrays[t.name] for t in spec.inputs), *self._states, self.logits]
        self._launch = self.step.device.launch(spec.index, len(spec.dims), len(buffers))
        for position, buffer in enumerate(buffers):
            self._launch.bind(position, buffer)
        self._result = len(buffers) - 1
        self._sizes = (-1, -1)

    def run(self, rows: int, outputs: int) -> None:
        """Run the step on the first `rows` entries of tokens, positions, rows_slots and sequence, and `outputs` of selected."""
        self._resize(rows, outputs)
        start = time.perf_counter()
        self._launch()
        self.native_seconds += time.perf_counter() - start

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

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Run one prompt per row of the table, in calls of at most `step.rows` rows.

        Yields (i, row) once the prompt of a row of the table is in: its logits are logits[i], until the iterator goes on.
        """
        lengths = [len(ids) for ids in prompts]
        tokens = np.concatenate([np.asarray(ids, np.int32) for ids in prompts])
        sequence = np.repeat(np.arange(len(prompts), dtype=np.int32), lengths)
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        ends = {int(end) - 1: row for row, end in enumerate(np.cumsum(lengths))}
        for start in range(0, tokens.size, self.tokens.size):
            count = min(self.tokens.size, tokens.size - start)
            part = slice(start, start + count)
            done = [i for i in range(start, start + count) if i in ends]
            self._fill(tokens[part], sequence[part], positions[part])
            # A step that must compute some logits computes those of the last row, for nobody.
            wanted = [i - start for i in done] or [count - 1] * self.step.needs_output
            self.selected[: len(wanted)] = wanted
            self.run(count, len(wanted))
            for place, i in enumerate(done):
                self.lengths[ends[i]] = lengths[ends[i]]
                yield place, ends[i]

    def _fill(self, tokens: NDArray[np.int32], sequence: NDArray[Any], positions: NDArray[Any]) -> None:
        count = tokens.size
        self.tokens[:count], self.sequence[:count], self.positions[:count] = tokens, sequence, positions
        self.rows_slots[:count] = self.table[sequence, positions]

    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Append one token to each of these rows of the table; logits[i] then follow rows[i]."""
        for i, row in enumerate(rows):
            position = self.lengths[row]
            self.tokens[i], self.positions[i], self.rows_slots[i] = tokens[i], position, self.table[row, position]
            self.sequence[i], self.selected[i] = row, i
            self.lengths[row] = position + 1
        self.run(len(rows), len(rows))

    def forward(self, ids: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Logits of every token: ids i32[sequences, tokens] from position 0 into out f32[sequences * tokens, vocab]."""
        total = ids.size
        flat = ids.reshape(-1)
        for start in range(0, total, self.tokens.size):
            count = min(self.tokens.size, total - start)
            index = np.arange(start, start + count)
            self._fill(flat[start : start + count], index // ids.shape[1], index % ids.shape[1])
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
