"""Exporting an artifact for C programs: a folder with header, library, weights, programs, vocabulary and an example.

Nothing is compiled: the plain C API (backends/cpu/machine/stemma.h) is part of every artifact's library.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemma.backends.cpu import device
from stemma.runtime.artifact import Artifact
from stemma.runtime.errors import ArtifactError, InputError

PROGRAMS, VOCABULARY = "programs.bin", "vocabulary.bin"
_SOURCES = Path(device.__file__).resolve().with_name("machine")
_CHUNK = 64 << 20


@dataclass(frozen=True)
class Exported:
    """The files that were written, in order; note: why there is no vocabulary.bin, or ""."""

    folder: Path
    files: tuple[str, ...]
    note: str


def export_c(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Exported:
    """Write everything that a C program needs into `folder`, which is made.

    stemma.h, libNAME.so, weights.bin, programs.bin, main.c; and vocabulary.bin when the tokenizer turns tokens into text byte by
    byte. ArtifactError for a file that is no language model with programs, InputError when the folder cannot be written.
    """
    target = Path(folder)
    with Artifact(path) as artifact:
        library = artifact.manifest.targets.get("cpu", {}).get("library")
        if not isinstance(library, str) or PROGRAMS not in artifact or not artifact.manifest.programs:
            raise ArtifactError(f"{artifact.path} has no decoding programs for this kind of machine, so C has nothing to run.")
        name = re.sub(r"[^A-Za-z0-9_]", "_", Path(path).stem) or "model"
        words, note = _vocabulary(artifact)
        example = (_SOURCES / "example.c").read_text(encoding="utf-8").replace("NAME", name)
        members: list[tuple[str, bytes]] = [
            ("stemma.h", (_SOURCES / "stemma.h").read_text(encoding="utf-8").replace("NAME", name).encode()),
            ("main.c", example.encode()), (f"lib{name}.so", artifact.read(library)), (PROGRAMS, artifact.read(PROGRAMS)),
        ]  # fmt: skip
        if words is not None:
            members.append((VOCABULARY, pack_vocabulary(words)))
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file, data in members:
                _write(target / file, [data])
            starts = range(0, artifact.weights.size, _CHUNK)
            _write(target / "weights.bin", (artifact.weights[start : start + _CHUNK].data for start in starts))
        except OSError as error:
            raise InputError(f"The folder {target} cannot be written: {error.strerror}. Give another one.") from None
    return Exported(target, (*(file for file, _ in members), "weights.bin"), note)


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """A file that is either whole or absent, also after Ctrl-C."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as out:
            for chunk in chunks:
                out.write(chunk)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def pack_vocabulary(words: list[bytes]) -> bytes:
    """vocabulary.bin: int64 number of tokens, their number + 1 offsets into the bytes that follow."""
    offsets = [0]
    for word in words:
        offsets.append(offsets[-1] + len(word))
    return struct.pack(f"<{len(offsets) + 1}q", len(words), *offsets) + b"".join(words)


def _vocabulary(artifact: Artifact) -> tuple[list[bytes] | None, str]:
    if "tokenizer.json" not in artifact:
        return None, "The artifact has no tokenizer, so tokens are printed as numbers."
    words = token_bytes(json.loads(artifact.read("tokenizer.json")), artifact.manifest.vocab)
    if words is None:
        return None, "The tokenizer does not turn tokens into text byte by byte, so there is no vocabulary.bin: C prints numbers."
    return words, ""


def token_bytes(tokenizer: Mapping[str, Any], count: int) -> list[bytes] | None:
    """The bytes of each of `count` tokens (none for special ones); None when text is not their concatenation.

    Known are the decoders of byte-level BPE (GPT-2) and of SentencePiece with byte fallback (Llama), apart from the space that the
    latter drops at the beginning of a text.
    """
    model, decoder = tokenizer.get("model", {}), tokenizer.get("decoder") or {}
    steps = decoder.get("decoders", [decoder]) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    pieces: list[str | None] = [None] * count
    vocab = model.get("vocab", {})
    numbered = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
    for piece, number in numbered:
        if number < count:
            pieces[number] = piece
    if kinds == ["ByteLevel"]:
        convert = [None if p is None else _letters(p) for p in pieces]
    elif kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "ByteFallback" in kinds:
        replaced = [(s["pattern"].get("String"), s["content"]) for s in steps if s["type"] == "Replace"]
        if any(old is None for old, _ in replaced):
            return None
        convert = [None if p is None else _fallback(p, replaced) for p in pieces]
    else:
        return None
    for token in tokenizer.get("added_tokens", []):
        if token["id"] < count:
            convert[token["id"]] = b"" if token.get("special") else token["content"].encode()
    return [word or b"" for word in convert]


def _letters(piece: str) -> bytes:
    known = all(c in LETTERS for c in piece)
    return bytes(LETTERS[c] for c in piece) if known else piece.encode()


def _fallback(piece: str, replaced: list[tuple[str, str]]) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    for old, new in replaced:
        piece = piece.replace(old, new)
    return piece.encode()


def byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes: printable ones stand for themselves, others for 256 and on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


LETTERS = byte_letters()
