"""The loop around the decode step: batches of requests, sampling, ends of sequences, statistics."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from stemma.backends.cpu.device import Sampler
from stemma.runtime.sampling import SamplingOptions, Statistics
from stemma.runtime.session import Session, Step
from stemma.runtime.tokenizer import StopStrings, TextStream


class Request:
    """One prompt on its way: its ids, how many tokens may follow, and what came so far.

    `ids` are not empty and leave room for `limit` >= 1 more in the context; `clipped` tells that the context set that limit.
    With `text`, tokens become pieces of text and stop strings end the request.
    """

    def __init__(
        self,
        ids: Sequence[int],
        limit: int,
        *,
        clipped: bool = False,
        sequence: int = 0,
        eos: Sequence[int] = (),
        text: TextStream | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.ids, self.limit, self.sequence = ids, limit, sequence
        self.new: list[int] = []
        self.pieces: list[str] = []
        self.finish = ""
        self._eos, self._text, self._stop = frozenset(eos), text, StopStrings(stop) if stop else None
        self._at_limit = "context" if clipped else "length"
        self._history = np.empty(len(ids) + limit, np.int32)
        self._history[: len(ids)] = ids
        self._length = len(ids)
        self._address = self._history.ctypes.data

    @property
    def capacity(self) -> int:
        """Positions it can take up in the caches: all its tokens but the last, which is never fed back."""
        return len(self.ids) + self.limit - 1

    def next(self, sampler: Sampler, logits: int) -> str:
        """Choose the next token from the logits at an address; returns the text it completes and perhaps sets `finish`."""
        token = sampler(logits, self._address, self._length)
        self.new.append(token)
        self._history[self._length] = token
        self._length += 1
        if token in self._eos:
            self.finish = "eos"
        elif len(self.new) == self.limit:
            self.finish = self._at_limit
        if self._text is None:
            return ""
        piece = "" if self.finish == "eos" else self._text.push(token)
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


def decode(
    step: Step, requests: Sequence[Request], options: SamplingOptions, statistics: Statistics, batch: int
) -> Iterator[tuple[Request, str]]:
    """Run requests to their ends, `batch` of them together; yields (request, piece of text) after every token.

    Every request gets the tokens that it would get alone. Closing the iterator early frees the caches and records "closed".
    """
    statistics.prompt_tokens += sum(len(request.ids) for request in requests)
    try:
        for start in range(0, len(requests), batch):
            yield from _decode_group(step, requests[start : start + batch], options, statistics)
    finally:
        statistics.new_tokens = sum(len(request.new) for request in requests)
        statistics.finish = [request.finish or "closed" for request in requests]
    if "context" in statistics.finish:
        warnings.warn(
            f"The answer to {statistics.finish.count('context')} of {len(requests)} prompts was cut: prompt and answer together"
            f" fill the model's context of {step.context} tokens.",
            stacklevel=3,
        )


def _decode_group(
    step: Step, requests: Sequence[Request], options: SamplingOptions, statistics: Statistics
) -> Iterator[tuple[Request, str]]:
    session = Session(step, [request.capacity for request in requests])
    fields = {name: getattr(options, name) for name in SamplingOptions.__dataclass_fields__}
    samplers = [step.device.sampler(step.vocab, sequence=request.sequence, **fields) for request in requests]
    base, row_bytes = session.logits.ctypes.data, session.logits.strides[0]
    start, native = time.perf_counter(), 0.0
    prefilling = True
    try:
        for place, row in session.prefill([request.ids for request in requests]):
            yield requests[row], requests[row].next(samplers[row], base + place * row_bytes)
        prefilling = False
        now, native = time.perf_counter(), session.native_seconds
        statistics.prefill_seconds, start = statistics.prefill_seconds + now - start, now
        rows = [row for row, request in enumerate(requests) if not request.finish]
        while rows:
            session.decode(rows, [requests[row].new[-1] for row in rows])
            statistics.decoded_tokens += len(rows)
            for place, row in enumerate(rows):
                request = requests[row]
                yield request, request.next(samplers[row], base + place * row_bytes)
            rows = [row for row in rows if not requests[row].finish]
    finally:
        elapsed = time.perf_counter() - start
        if prefilling:
            statistics.prefill_seconds += elapsed
        else:
            statistics.decode_seconds += elapsed
            statistics.decode_native_seconds += session.native_seconds - native
        session.close()
