"""Which tokens of two tokenizers are the same, whatever form their files have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stemma.ir import CheckpointError
from stemma.vocabulary import read_tokens, translation

pytestmark = pytest.mark.quick


def written(path: Path, vocab: Any, decoder: str, added: list[dict[str, Any]] | None = None) -> Path:
    path.write_text(json.dumps({"model": {"vocab": vocab}, "decoder": {"type": decoder}, "added_tokens": added or []}))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """One vocabulary in three forms: bytes as letters, SentencePiece's with byte tokens, and a list with scores."""
    end = {"id": 5, "content": "</s>", "special": True}
    letters = written(tmp_path / "a.json", {"Ġdef": 0, "é": 1, "Ċ": 2, "Ã©": 3, "x": 4, "</s>": 5}, "ByteLevel", [end])
    pieces = written(tmp_path / "b.json", {"<0x0A>": 0, "x": 1, "\u2581def": 2, "é": 3, "y": 4, "</s>": 5}, "Sequence", [end])
    scored = written(tmp_path / "c.json", [["x", -1.0], ["\u2581def", -2.5], ["</s>", 0.0]], "Metaspace", [end | {"id": 2}])
    return letters, pieces, scored


def test_bytes_are_what_counts(files: tuple[Path, Path, Path]) -> None:
    letters, pieces, scored = map(read_tokens, files)
    assert [letters[i] for i in range(6)] == [
        (False, b" def"), (False, b"\xe9"), (False, b"\n"), (False, "é".encode()), (False, b"x"), (True, b"</s>"),
    ]  # fmt: skip
    assert translation(pieces, letters, 6).tolist() == [2, 4, 0, 3, -1, 5]
    assert translation(letters, pieces, 6).tolist() == [2, -1, 0, 3, 1, 5]
    assert translation(scored, pieces, 3).tolist() == [1, 2, 5]


def test_sizes_and_repeats(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Padding up to a model's vocabulary is no token; ids beyond it are cut; of equal tokens the lowest id counts."""
    letters, pieces, _ = map(read_tokens, files)
    assert translation(letters, pieces, 8).tolist() == [2, -1, 0, 3, 1, 5, -1, -1]
    assert translation(letters, pieces, 2).tolist() == [2, -1]
    twice = read_tokens(written(tmp_path / "t.json", {"x": 7, "<0x78>": 3}, "Metaspace"))
    assert translation(letters, twice, 6).tolist() == [-1, -1, -1, -1, 3, -1]


def test_a_special_token_is_no_text(tmp_path: Path) -> None:
    special = [{"id": 0, "content": "end", "special": True}]
    a = read_tokens(written(tmp_path / "a.json", {"end": 0}, "Metaspace", special))
    b = read_tokens(written(tmp_path / "b.json", {"end": 0}, "Metaspace"))
    assert translation(a, b, 1).tolist() == [-1] and translation(a, a, 1).tolist() == [0]


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"vocabulary in .*tokenizer\.json cannot be read"):
        read_tokens(tmp_path / "tokenizer.json")
