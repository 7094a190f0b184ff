"""The parts of a blob of programs that describe an artifact: strings, models and compiled functions, as int64 words."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stemma.ir import CompileError

MAGIC, VERSION = 0x3147504153544D53, 1
DTYPES = {"f32": 0, "i32": 1, "i64": 2, "bool": 3}
STATE = 4
MAX_RANK, MAX_CONSTANT = 4, 1 << 16
SIZE_CODES = {"rows": 0, "outputs": 1, "sequences": 2, "context": 3, "slots": 4}
BUFFER_CODES = {
    "tokens": 0,
    "positions": 1,
    "slots": 2,
    "sequence": 3,
    "table": 4,
    "selected": 5,
    "logits": 7,
    "hidden": 8,
    "weights": 9,
}
STATE_BUFFER = 6


@dataclass(frozen=True)
class Served:
    """A model that programs may step: its function is "step" for "model", else NAME_step. width: of its hidden state, or 0."""

    name: str
    vocab: int
    width: int
    eos: tuple[int, ...]
    context: int

    @property
    def function(self) -> str:
        """The name of its step."""
        return "step" if self.name == "model" else f"{self.name}_step"


class Writer:
    """The strings of a blob, and the blob."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def text(self, value: str) -> int:
        """The number of a string."""
        return self._numbers.setdefault(value, len(self._numbers))

    def blob(self, body: list[int]) -> bytes:
        """Header (its second word holds the version and, above it, the CRC-32 of what follows), strings and `body`."""
        strings = struct.pack("<q", len(self._numbers))
        for value in self._numbers:
            data = value.encode()
            strings += struct.pack("<q", len(data)) + data + bytes(-len(data) % 8)
        words = strings + np.array(body, np.int64).astype("<i8").tobytes()
        return struct.pack("<qQq", MAGIC, VERSION | zlib.crc32(words) << 32, 3 + len(words) // 8) + words


def bits(value: float) -> int:
    """The bits of a double as an integer."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


# ---- models and compiled functions ------------------------------------------------------------------------------------


def model_words(out: Writer, model: Served, table: Mapping[str, Any]) -> list[int]:
    """A model: its step's sizes and buffers in the order of the native call. CompileError when no machine can drive that step."""
    dims = {d["name"]: d for d in table["dims"]}
    if unknown := [n for n in dims if n not in SIZE_CODES]:
        raise CompileError(f"The step of the model {model.name!r} has the size {unknown[0]!r}, which no machine can set.")
    mix = next((t["shape"][1] for t in table["inputs"] if t["name"] == "tokens" and len(t["shape"]) == 2), 1)
    buffers = []
    for tensor in table["inputs"] + table["results"]:
        if tensor["name"] not in BUFFER_CODES:
            raise CompileError(f"The step of the model {model.name!r} has the buffer {tensor['name']!r}; no machine fills it.")
    for tensor in table["inputs"]:
        buffers += [BUFFER_CODES[tensor["name"]], 0, 0]
    for tensor in table["states"]:
        shape = tensor["shape"]
        if shape.count("slots") != 1 or not all(s == "slots" or isinstance(s, int) for s in shape):
            raise CompileError(f"The state {tensor['name']!r} of the model {model.name!r} is not [planes, slots, elements].")
        axis = shape.index("slots")
        planes, after = (int(np.prod(part, dtype=int)) for part in (shape[:axis], shape[axis + 1 :]))
        if "row_bytes" in tensor:  # rows of codes with their scales
            slot = after // shape[-1] * tensor["row_bytes"]
        else:
            slot = after * (2 if tensor["dtype"] in ("bf16", "f16") else np.dtype(_numpy(tensor["dtype"])).itemsize)
        buffers += [STATE_BUFFER, planes, slot]
    for tensor in table["results"]:
        buffers += [BUFFER_CODES[tensor["name"]], 0, 0]
    return [
        out.text(model.name), table["index"], model.vocab, model.width, mix, model.context, dims["rows"]["hi"],
        len(dims), *(SIZE_CODES[d["name"]] for d in table["dims"]), len(buffers) // 3, *buffers, len(model.eos), *model.eos,
    ]  # fmt: skip


def _numpy(name: str) -> str:
    return {"u8": "uint8", "i8": "int8", "bool": "bool", "i16": "int16"}.get(name, name.replace("i", "int").replace("f", "float"))


def is_callable(table: Mapping[str, Any]) -> bool:
    """Whether programs can `call` a compiled function: no states, and every size a number or a dimension of its own."""
    dims = {d["name"] for d in table["dims"]}
    tensors = table["inputs"] + table["results"]
    return not table["states"] and all(
        t["dtype"] in DTYPES and len(t["shape"]) <= MAX_RANK and all(isinstance(s, int) or s in dims for s in t["shape"])
        for t in tensors
    )


def function_words(out: Writer, name: str, table: Mapping[str, Any]) -> list[int]:
    """A compiled function that programs may call."""
    dims = [d["name"] for d in table["dims"]]

    def tensors(group: Sequence[Mapping[str, Any]]) -> list[int]:
        words = [len(group)]
        for t in group:
            words += [DTYPES[t["dtype"]], len(t["shape"])]
            for s in t["shape"]:
                words += [0, s] if isinstance(s, int) else [1, dims.index(s)]
        return words

    return [out.text(name), table["index"], len(dims), *tensors(table["inputs"]), *tensors(table["results"])]
