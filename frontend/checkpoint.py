"""What every kind of checkpoint is read into: a model's configuration and a description of each stored tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from stemma.ir import Array, Tensor

LONGEST = 1 << 30  # positions that the runtime counts


class StoredTensor(Protocol):
    """One tensor of a file, described and not read. `name` is the one in the file, `dtype` the IR's or a foreign one."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def type(self) -> Tensor: ...

    def load(self) -> Any:
        """The values: floats (bf16 widened to float32), integers, or `Quantized`; CheckpointError when they cannot be used."""

    def rows(self) -> Any:
        """Something with a `shape` of which `rows[start:stop]` reads that range of the first axis, elements as they are stored."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder or a GGUF file says about its model; the tensors are described, not read."""

    folder: Path  # or the GGUF file
    config: Any  # transformers' PretrainedConfig
    architecture: str  # the class name, "LlamaForCausalLM"
    kind: str  # "causal_lm" or "model"
    tensors: Mapping[str, StoredTensor]  # by the name that transformers stores it under
    files: tuple[Path, ...]  # tokenizer, generation and template files that belong into an artifact
    eos: tuple[int, ...]
    bos: int | None
    notes: tuple[str, ...]  # what is missing but not needed for compiling, and what the file gets wrong
    described_by: str  # where the configuration comes from, for messages
    rope_divisors: Array | None = None  # what each rotary frequency is divided by, on top of the configuration
    scratch: TemporaryDirectory[str] | None = None  # holds those of `files` that were made from metadata

    @property
    def name(self) -> str:
        """The name of the folder, or of the file without its suffix."""
        path = self.folder.resolve()
        return path.stem if path.is_file() else path.name

    @property
    def beside(self) -> Path:
        """The folder in which further files of the model may be."""
        return self.folder.parent if self.folder.is_file() else self.folder

    @property
    def home(self) -> Path:
        """The folder of the tokenizer, or `beside` when there is none."""
        return next((f.parent for f in self.files if f.name == "tokenizer.json"), self.beside)

    @property
    def context(self) -> int | None:
        """The largest number of positions; None when it is no language model and has no limit of its own."""
        value = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if self.kind == "causal_lm":
            return LONGEST if value is None else min(int(value), LONGEST)
        return int(value) if value and value > 0 else None

    @property
    def bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(e.bytes for e in self.tensors.values())
