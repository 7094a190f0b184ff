"""Which tokens of two tokenizers are the same: equal bytes, or special tokens of one string."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from stemma.ir import Array, CheckpointError
from stemma.runtime.export import LETTERS

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's tokens of single bytes
Token = tuple[bool, bytes]  # whether it is a special token, and what it stands for


def read_tokens(path: Path) -> dict[int, Token]:
    """What every id of a tokenizer.json stands for. CheckpointError when the file cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model = data["model"]["vocab"]
        pairs = model.items() if isinstance(model, dict) else ((token, i) for i, (token, _) in enumerate(model))
        byte_level = "ByteLevel" in _kinds(data.get("decoder")) | _kinds(data.get("pre_tokenizer"))
        found = {int(i): (False, _bytes_of(str(token), byte_level)) for token, i in pairs}
        for added in data.get("added_tokens") or ():
            found[int(added["id"])] = (bool(added["special"]), str(added["content"]).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The vocabulary in {path} cannot be read: {type(error).__name__}: {error}.") from None
    return found


def _kinds(part: Any) -> set[str]:
    """The types of a tokenizer's component and of its parts."""
    if isinstance(part, dict):
        inner = set().union(*(_kinds(v) for v in part.values())) if part else set()
        return inner | ({str(part["type"])} if "type" in part else set())
    return set().union(*map(_kinds, part)) if isinstance(part, list) and part else set()


def _bytes_of(token: str, byte_level: bool) -> bytes:
    if byte_level:
        try:
            return bytes(LETTERS[c] for c in token)
        except KeyError:
            return token.encode()
    single = _BYTE.fullmatch(token)
    return bytes([int(single[1], 16)]) if single else token.replace("\u2581", " ").encode()


def translation(source: dict[int, Token], target: dict[int, Token], size: int) -> Array:
    """i32[size]: for each id of `source` the lowest id of `target` that stands for the same, -1 where there is none."""
    known: dict[Token, int] = {}
    for i in sorted(target):
        known.setdefault(target[i], i)
    table = np.full(size, -1, np.int32)
    for i, token in source.items():
        if i < size:
            table[i] = known.get(token, -1)
    return table
