"""What several programs share: texts that are sampled side by side, and their way into the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stemma.ir import trace as p

CHUNK = 32


def at_least_one(**counts: int) -> None:
    """TraceError unless these fixed options are positive integers."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise p.TraceError(f"{name}={value!r} must be an integer of at least 1.")


def emit_from(text: p.Sequences, start: p.Value | int) -> None:
    """Emits the tokens of the one sequence from position `start` on."""

    def body(at: p.Value) -> tuple[p.Value, p.Value]:
        p.emit(text.history(at, CHUNK)[0])
        return at + CHUNK < text.length()[0], at + CHUNK

    p.loop(body, start)


@dataclass(frozen=True)
class Texts:
    """`n` continuations of a prompt, one per sequence. Their arrays are values of the region that is being traced.

    last i32[n]: the newest token, which is not yet in its sequence. done bool[n]: ended by an end token or by the limit.
    size i32[n]: new tokens, an end token included.
    """

    sequences: p.Sequences
    start: p.Value
    last: p.Value
    done: p.Value
    size: p.Value

    @classmethod
    def of(cls, model: p.Model, prompt: p.Value, n: int) -> Texts:
        """n texts that have only the prompt; its last token is the newest."""
        sequences = model.start(prompt[:-1]).fork([0] * n)
        return cls(sequences, p.as_value(prompt.shape[0]), prompt[-1:].broadcast_to(n), p.full(n, False), p.full(n, 0))

    @property
    def state(self) -> tuple[p.Value, p.Value, p.Value]:
        """What a loop carries."""
        return self.last, self.done, self.size

    def at(self, last: p.Value, done: p.Value, size: p.Value) -> Texts:
        """The same texts with that state."""
        return Texts(self.sequences, self.start, last, done, size)

    def keep(self, indices: p.Value) -> Texts:
        """Text i goes on as what was text indices[i]."""
        self.sequences.keep(indices)
        return self.at(*(x[indices] for x in self.state))

    def tokens(self, longest: int) -> p.Value:
        """The new tokens, i32[n, longest], filled with -1; what is beyond `longest` is left out."""
        places = p.arange(longest)[None, :] == (self.size - 1)[:, None]
        return p.where(places, self.last[:, None], self.sequences.history(self.start, longest))

    def emit(self, index: p.Value) -> None:
        """Emits the new tokens of one text."""
        emit_from(self.sequences.fork(index[None]), self.start)
        p.emit(p.where(self.size[index] > 0, self.last[index], -1))


@dataclass(frozen=True)
class Sampling:
    """How the next tokens of texts are chosen, and when a text ends. Text i has the noise of stream sequence * n + i."""

    model: p.Model
    limit: p.Value | int
    ignore_eos: p.Value | bool
    temperature: p.Value | float
    top_k: p.Value | int
    top_p: p.Value | float
    seed: p.Value | int
    sequence: p.Value | int

    def extend(self, texts: Texts, open: p.Value, first: int = 0) -> tuple[Texts, p.Value]:
        """One more token for the texts that are `open` bool[n], none of which is before the `first`.

        Gives the texts, and the logits f32[n, vocab] from which the tokens were chosen.
        """
        sequences, n = texts.sequences, texts.sequences.count
        logits = sequences.step(p.where(open, texts.last, -1))
        chosen = p.select(
            logits[first:], sequences.fork(list(range(first, n))) if first else sequences, temperature=self.temperature,
            top_k=self.top_k, top_p=self.top_p, seed=self.seed, sequence=self.sequence * n + first,
        )  # fmt: skip
        chosen = p.concat(texts.last[:first], chosen) if first else chosen
        last, size = p.where(open, chosen, texts.last), texts.size + open.int()
        ended = ~p.as_value(self.ignore_eos) & self.model.is_end(last)
        return texts.at(last, texts.done | open & (ended | (size >= self.limit)), size), logits

    def run(self, texts: Texts, enough: Callable[[Texts], p.Value]) -> Texts:
        """Extends the unfinished texts until `enough` of them are done."""

        def body(*state: p.Value) -> tuple[p.Value, ...]:
            now, _ = self.extend(texts.at(*state), ~state[1])
            return ~(enough(now) | now.done.all()), *now.state

        return texts.at(*p.loop(body, *texts.state))

    def step(self, texts: Texts, newlines: p.Value, span: p.Value | int, first: int = 0) -> Texts:
        """Extends the unfinished texts, from the `first` on, to the end of a step: one of `newlines`, or `span` tokens."""

        def body(open: p.Value, taken: p.Value, *state: p.Value) -> tuple[Any, ...]:
            now, _ = self.extend(texts.at(*state), open, first)
            line = (now.last[:, None] == newlines[None, :]).any(1)
            taken = taken + open.int()
            open = open & ~now.done & ~line & (taken < span)
            return open.any(), open, taken, *now.state

        count = texts.sequences.count
        open = ~texts.done & (p.arange(count) >= first) if first else ~texts.done
        _, _, *state = p.loop(body, open, p.full(count, 0), *texts.state)
        return texts.at(*state)


def votes(answers: p.Value, allowed: p.Value) -> p.Value:
    """How many allowed answers (integers) each allowed one equals, i32[n]; 0 for the others."""
    same = (answers[:, None] == answers[None, :]) & allowed[None, :]
    return p.where(allowed, same.int().sum(1), 0)
