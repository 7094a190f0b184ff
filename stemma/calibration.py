"""The text that losses are measured on."""

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
DOCUMENT_TOKENS = 128  # calibration text is cut into documents of this length


@dataclass(frozen=True)
class Calibration:
    """`tokens` tokens of a text; of the source of a few modules of Python's library when it is None."""

    text: str | None = None
    tokens: int = 256

    def documents(self, checkpoint: Checkpoint, vocab: int, notes: list[str]) -> tuple[Array, ...]:
        """Token ids, cut into documents of DOCUMENT_TOKENS; StemmaError when the text is too short."""
        tokenizer = next((f for f in checkpoint.files if f.name == "tokenizer.json"), None)
        if tokenizer is None:
            notes.append("There is no tokenizer, so losses were measured on seeded random tokens.")
            ids = np.random.default_rng(0).integers(0, vocab, self.tokens)
        else:
            from tokenizers import Tokenizer

            text = library_text(MODULES) if self.text is None else self.text
            ids = np.array(Tokenizer.from_file(str(tokenizer)).encode(text).ids[: self.tokens], np.int64)
            if len(ids) < 2:
                raise StemmaError(f"The calibration text has {len(ids)} tokens; at least two are needed to measure a loss.")
        parts = (ids[i : i + DOCUMENT_TOKENS] for i in range(0, len(ids), DOCUMENT_TOKENS))
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
