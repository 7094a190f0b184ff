"""Options of decoding programs and their ranges, and what is told afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.runtime.errors import InputError
from stemma.runtime.function import convert
from stemma.runtime.manifest import ParameterSpec

# Bounds of options that every program understands in the same way: (lowest, highest, whether the lowest is allowed).
FLOATS = {
    "temperature": (0.0, math.inf, True), "top_p": (0.0, 1.0, False), "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, math.inf, False),
}  # fmt: skip
INTEGERS = {"max_new_tokens": (1, 2**31 - 1), "top_k": (0, 2**31 - 1), "seed": (0, 2**64 - 1), "sequence": (0, 2**64 - 1)}
NUMPY: dict[str, type[np.generic]] = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "bool": np.bool_}


def option(parameter: ParameterSpec, value: Any) -> NDArray[Any]:
    """The value of an option as the array that a program takes. InputError when it is outside its range, or not of its type."""
    name, dtype = parameter.name, parameter.dtype
    if parameter.shape:
        array = convert(value, dtype, name)
        wrong = array.ndim != len(parameter.shape) or any(
            isinstance(s, int) and s != n for s, n in zip(parameter.shape, array.shape, strict=False)
        )
        if wrong:
            raise InputError(f"{name} has the sizes {list(array.shape)}; the program takes {parameter.text}.")
        return array
    if dtype == "bool":
        if not isinstance(value, (bool, np.bool_)):
            raise InputError(f"{name}={value!r} must be True or False.")
    elif dtype == "f32":
        low, high, closed = FLOATS.get(name, (-math.inf, math.inf, False))
        _check(name, value, low, high, not closed)
    else:
        bits = 31 if dtype == "i32" else 63
        value = check_integer(name, value, *INTEGERS.get(name, (-(2**bits), 2**bits - 1)))
        value = value - 2**64 if value >= 2**63 else value  # counted by its 64 bits
    return np.asarray(value, NUMPY[dtype])


@dataclass
class Statistics:
    """What one call of generate or stream did. Seconds are wall time; `native` is the part inside the models' kernels.

    trees, nodes, followed: token trees that were drafted, their nodes that models ran, and nodes that became tokens.
    drafting_seconds: spent on drafting and on the programs' own work. models: calls, rows, outputs and seconds of each.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    decoded_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_native_seconds: float = 0.0
    finish: list[str] = field(default_factory=list)  # per prompt: "eos", "stop", "length", "context", "end" or "closed"
    trees: int = 0
    nodes: int = 0
    followed: int = 0
    drafting_seconds: float = 0.0
    machine_seconds: float = 0.0
    models: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def followed_per_tree(self) -> float:
        """Tokens gained by one call of the model that was speculated for: the accepted length, root included."""
        return self.followed / self.trees if self.trees else 0.0

    @property
    def drafting_share(self) -> float:
        """Drafting time over the time in the machine."""
        return self.drafting_seconds / self.machine_seconds if self.machine_seconds else 0.0

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
    except (AttributeError, TypeError):
        raise InputError(f"{name}={value!r} is not an integer.") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise InputError(f"{name}={value!r} must be an integer from {low} to {high}.")
    return number


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple. InputError for anything but non-empty text."""
    if stop is None:
        return ()
    strings = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(s, str) and s for s in strings):
        raise InputError(f"stop={stop!r} must be a non-empty string or a list of them.")
    return strings


def _check(name: str, value: object, low: float, high: float, open_below: bool = False) -> None:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    largest = min(high, float(np.finfo(np.float64).max))
    if not number or not (low < value if open_below else low <= value) or not value <= largest:  # type: ignore[operator]
        bounds = [f"more than {low:g}" if open_below else f"at least {low:g}"] if low > -math.inf else []
        bounds += [f"at most {high:g}"] if high < math.inf else []
        raise InputError(f"{name}={value!r} must be a number" + (f", {' and '.join(bounds)}." if bounds else "."))
