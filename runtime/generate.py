"""Requests and the loop that drives them: instances of a program on one machine, text, ends of sequences, statistics."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from stemma.runtime.machine import FAILED, FINISHED, RUNNING, WAITING, Array, Instance, Machine, Machines, figures, raise_failure
from stemma.runtime.manifest import ProgramSpec
from stemma.runtime.sampling import Statistics
from stemma.runtime.tokenizer import StopStrings, TextStream

REFILL = 4  # steps after which ended requests are replaced by waiting ones


class Request:
    """One prompt on its way: what its program is given, how many tokens may follow, and what came so far.

    `limit` None: the program itself ends. `clipped` tells that the context set the limit. With `text`, tokens become pieces of text
    and stop strings end the request.
    """

    def __init__(
        self,
        ids: Sequence[int],
        inputs: Mapping[str, Array],
        limit: int | None,
        *,
        clipped: bool = False,
        eos: Sequence[int] = (),
        text: TextStream | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.ids, self.inputs, self.limit = ids, inputs, limit
        self.new: list[int] = []
        self.pieces: list[str] = []
        self.results: dict[str, Array] = {}
        self.finish = ""
        self._eos, self._text, self._stop = frozenset(eos), text, StopStrings(stop) if stop else None
        self._at_limit = "context" if clipped else "length"

    def take(self, tokens: Sequence[int]) -> Iterator[str]:
        """Take the next tokens, up to a stop string; yields the text that each completes and perhaps sets `finish`."""
        if self._text is None:  # many at once: a small model decodes a token in less time than a generator takes a turn
            self._append(tokens)
            return
        for token in tokens:
            if self.finish == "stop":
                break
            self._append((token,))
            yield self._piece("" if self.finish == "eos" else self._text.push(token))

    def _append(self, tokens: Sequence[int]) -> None:
        self.new += tokens
        if not self._eos.isdisjoint(tokens):
            self.finish = "eos"
        elif len(self.new) == self.limit:
            self.finish = self._at_limit

    def end(self) -> str:
        """The program has ended by itself; returns text that was held back."""
        if self.finish:
            return ""
        self.finish = "end"
        return self._piece("")

    def _piece(self, piece: str) -> str:
        if self._text is None:
            return ""
        if self.finish:
            piece += self._text.flush()
        if self._stop is not None:
            piece = self._stop.push(piece)
            if self._stop.found:
                self.finish = "stop"
            elif self.finish:
                piece += self._stop.flush()
        if piece:
            self.pieces.append(piece)
        return piece


@dataclass(frozen=True)
class Job:
    """A program to run: its blob, the key under which machines for it are kept, Python functions that it may call.

    eager: tokens are fetched as they come, not by slices of time. whole: the named results are wanted.
    """

    program: ProgramSpec
    blob: bytes
    models: tuple[str, ...]
    key: Hashable = ""
    host: Mapping[str, Callable[..., ArrayLike]] = field(default_factory=dict)
    eager: bool = False
    whole: bool = False


def decode(
    machines: Machines, job: Job, requests: Sequence[Request], statistics: Statistics, batch: int, context: int
) -> Iterator[tuple[Request, str]]:
    """Run requests to their ends, at most `batch` of them together; yields (request, piece of text) after every token of a
    request for text.

    Every request gets the tokens that it would get alone. Closing the iterator early frees the machine and records "closed".
    """
    statistics.prompt_tokens += sum(len(request.ids) for request in requests)
    machine = machines.take(job.key, job.blob)
    run = _Run(machine, job, requests, statistics, batch)
    intact = True
    try:
        yield from run.loop()
    except KeyboardInterrupt:  # it may have come between any two steps, so what the machine holds is not known
        intact = False
        raise
    finally:
        run.close()
        if intact:
            machines.give(job.key, machine)
    if "context" in statistics.finish:
        warnings.warn(
            f"The answer to {statistics.finish.count('context')} of {len(requests)} prompts was cut: prompt and answer together"
            f" fill the model's context of {context} tokens.",
            stacklevel=3,
        )


class _Run:
    """Requests on a machine."""

    def __init__(self, machine: Machine, job: Job, requests: Sequence[Request], statistics: Statistics, batch: int) -> None:
        self.machine, self.job, self.requests, self.statistics, self.batch = machine, job, requests, statistics, batch
        self.waiting = deque(requests)
        self.active: dict[Request, Instance] = {}
        self.fresh = set(requests)  # without a token so far
        self.before = self.first = machine.totals.copy()
        self.started = time.perf_counter()
        self.decoding = self.started  # when the last prompt's first token was there

    def loop(self) -> Iterator[tuple[Request, str]]:
        """Pieces of text until every request is done."""
        while self.waiting or self.active:
            while self.waiting and len(self.active) < self.batch:
                request = self.waiting.popleft()
                self.active[request] = self.machine.start(self.job.program.name, request.inputs)
            eager = self.job.eager or not self.fresh.isdisjoint(self.active)
            # About one token of each; several where others wait for a place; else whatever a slice of time gives.
            host = self.machine.advance(len(self.active) * (1 if eager else REFILL if self.waiting else 0))
            prefilling = bool(self.fresh)
            for request, instance in list(self.active.items()):
                yield from self._poll(request, instance, host)
            if prefilling and not self.fresh:
                self.first, self.decoding = self.machine.totals.copy(), time.perf_counter()

    def _poll(self, request: Request, instance: Instance, host: bool) -> Iterator[tuple[Request, str]]:
        status, tokens = instance.poll()
        if tokens or status != RUNNING:
            self.fresh.discard(request)
        for piece in request.take(tokens):
            yield request, piece
        if host and status == WAITING:
            instance.answer(self.job.host, self.job.program.host)
        if status == FAILED:
            raise_failure(instance, self.job.program)
        if status == FINISHED:
            yield request, request.end()
            values = {name: instance.result(name) for name in self.job.program.results} if self.job.whole else {}
            request.results = {name: value for name, value in values.items() if value is not None}
        if status == FINISHED or request.finish == "stop":
            self.active.pop(request).release()

    def close(self) -> None:
        """Cancel what runs and fill in the statistics. Makes no native call, so that it may happen anywhere."""
        while self.active:
            self.active.popitem()[1].release()
        now, machine, s = time.perf_counter(), self.machine, self.statistics
        prefilled = not self.fresh
        s.prefill_seconds += (self.decoding if prefilled else now) - self.started
        s.decode_seconds += now - self.decoding if prefilled else 0.0
        s.new_tokens = sum(len(request.new) for request in self.requests)
        s.finish = [request.finish or "closed" for request in self.requests]
        if prefilled:
            decoded = figures(machine.totals, self.first, self.job.models)
            s.decoded_tokens = int(decoded["emitted"])
            s.decode_native_seconds = sum(m["seconds"] for m in decoded["models"].values())
        found = figures(machine.totals, self.before, self.job.models)
        s.trees, s.nodes, s.followed = (int(found[name]) for name in ("trees", "nodes", "followed"))
        s.drafting_seconds, s.machine_seconds, s.models = found["drafting_seconds"], found["seconds"], found["models"]
