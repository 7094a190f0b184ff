"""The text that losses are measured on, and that passes calibrate on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stemma.ir import Array, StemmaError

if TYPE_CHECKING:
    from stemma.frontend.hf import Checkpoint

MODULES = ("heapq", "textwrap", "csv", "shlex", "statistics")  # held out when the bundled models were trained
DOCUMENT_TOKENS = 128  # text to measure on is cut into documents of this length
SAMPLE_TOKENS = 512  # and text to calibrate on into documents of this one
MEASURED, CALIBRATED = 256, 8192  # tokens to measure losses on, and to calibrate on, unless told otherwise


@dataclass(frozen=True)
class Calibration:
    """Tokens of a text; of the source of a few modules of Python's library when it is None.

    tokens: how many passes calibrate on, when one does; else how many losses are measured on. None: CALIBRATED, MEASURED.
    """

    text: str | None = None
    tokens: int | None = None

    def documents(self, checkpoint: Checkpoint, vocab: int, notes: list[str]) -> tuple[Array, ...]:
        """Token ids to measure losses on, cut into documents; StemmaError when the text is too short."""
        return _cut(self._measurable(self._ids(checkpoint, vocab, self.tokens or MEASURED, notes)), DOCUMENT_TOKENS)

    def split(self, checkpoint: Checkpoint, vocab: int, notes: list[str]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Documents to measure losses on, and others to calibrate on: what was fitted to is not what is measured.

        Of a short text a quarter is measured on. StemmaError when that is too little.
        """
        wanted = self.tokens or CALIBRATED
        ids = self._ids(checkpoint, vocab, MEASURED + wanted, notes)
        measured = MEASURED
        if len(ids) < MEASURED + wanted:
            measured = min(MEASURED, len(ids) // 4)
            notes.append(
                f"The calibration text has {len(ids)} tokens: {len(ids) - measured} to calibrate on instead of {wanted}, and "
                f"{measured} to measure losses on."
            )
        return _cut(self._measurable(ids[:measured]), DOCUMENT_TOKENS), _cut(ids[measured:], SAMPLE_TOKENS)

    def _ids(self, checkpoint: Checkpoint, vocab: int, count: int, notes: list[str]) -> Array:
        tokenizer = next((f for f in checkpoint.files if f.name == "tokenizer.json"), None)
        if tokenizer is None:
            notes.append("There is no tokenizer, so seeded random tokens stand in for the calibration text.")
            return np.random.default_rng(0).integers(0, vocab, count)
        from tokenizers import Tokenizer

        text = library_text(MODULES) if self.text is None else self.text
        ids = np.array(Tokenizer.from_file(str(tokenizer)).encode(text).ids[:count], np.int64)
        if len(ids) and ids.max() >= vocab:
            raise StemmaError(f"{tokenizer} gives the token {ids.max()}, but the model has {vocab} tokens: it is another model's.")
        return ids

    def _measurable(self, ids: Array) -> Array:
        if len(ids) < 2:
            raise StemmaError(f"The calibration text has too few tokens: {len(ids)} to measure a loss on, at least two are needed.")
        return ids


def _cut(ids: Array, length: int) -> tuple[Array, ...]:
    parts = (ids[i : i + length] for i in range(0, len(ids), length))
    return tuple(part for part in parts if len(part) > 1)


def read_text(path: str | Path, what: str = "calibration text") -> str:
    """A text file; StemmaError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StemmaError(f"The {what} {path} cannot be read: {error}.") from None


def library_text(modules: Sequence[str]) -> str:
    """The source of modules of Python's standard library."""
    import importlib
    import inspect

    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)
