"""Options of decoding: how tokens are chosen, when a sequence ends, and what is told afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from stemma.runtime.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How one token is chosen: argmax(filter(logits) / temperature + noise), or plain argmax when `temperature` is 0.

    The repetition penalty comes first, then the temperature, then the filters top_k (0: off), top_p (1: off), min_p (0: off).
    The noise is Gumbel noise *counted* by (seed, sequence, position, token) and never drawn, so a result does not depend on what
    else runs. InputError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf)
        _check("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_below=True)
        check_integer("top_k", self.top_k, 0, 2**31 - 1)
        check_integer("seed", self.seed, 0, 2**64 - 1)


@dataclass
class Statistics:
    """What one call of generate or stream did. Seconds are wall time; `native` is the part inside the kernels."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    decoded_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_native_seconds: float = 0.0
    finish: list[str] = field(default_factory=list)  # per prompt: "eos", "stop", "length", "context" or "closed"

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second, until the first new token of each prompt."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after each prompt's first, per second."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def between_steps_microseconds(self) -> float:
        """Time per decoded token that is not spent in the model's kernels: sampling, text and Python."""
        spent = self.decode_seconds - self.decode_native_seconds
        return 1e6 * spent / self.decoded_tokens if self.decoded_tokens else 0.0


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in low..high. InputError otherwise."""
    try:
        number = int(value.__index__())  # type: ignore[attr-defined]
    except AttributeError:
        raise InputError(f"{name}={value!r} is not an integer.") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise InputError(f"{name}={value!r} must be an integer from {low} to {high}.")
    return number


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple. InputError for anything but non-empty text."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(s, str) and s for s in strings):
        raise InputError(f"stop={stop!r} must be a non-empty string or a list of them.")
    return strings


def _check(name: str, value: object, low: float, high: float, open_below: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (low < value if open_below else low <= value):
        value_ok = False
    else:
        value_ok = value <= high and value != math.inf
    if not value_ok:
        bound = f"more than {low:g}" if open_below else f"at least {low:g}"
        raise InputError(f"{name}={value!r} must be a number, {bound}" + (f" and at most {high:g}." if high < math.inf else "."))
