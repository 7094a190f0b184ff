"""Text as it comes, piece by piece: whole characters, stop strings across pieces, spaces that depend on what came before."""

from __future__ import annotations

from functools import lru_cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from stemma.runtime.tokenizer import StopStrings, TextStream, Tokenizer
from tests import fake


@given(st.text(max_size=30), st.lists(st.integers(1, 5), max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_the_same_however_the_text_comes(text: str, sizes: list[int], stops: list[str]) -> None:
    text = "".join("ab"[ord(c) % 2] for c in text)
    filter, shown, rest = StopStrings(stops), "", text
    for size in sizes:
        shown, rest = shown + filter.push(rest[:size]), rest[size:]
        if filter.found:
            break
    if not filter.found:
        shown += filter.push(rest)
    shown += filter.flush()
    # The earliest stop string to be complete decides; of those complete in one piece, the one that begins first.
    if filter.found:
        assert any(text.startswith(shown + stop) for stop in stops)
    else:
        assert shown == text and not any(stop in text for stop in stops)


@given(st.text(max_size=20), st.text(max_size=20))
def test_pieces_of_text_are_whole_characters(prompt: str, text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode(text, special=False)
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, fake.VOCAB - 1), max_size=20))
def test_pieces_of_any_tokens_add_up(ids: list[int]) -> None:
    """Also when the bytes are no valid text."""
    stream = TextStream(_tokenizer(), [])
    assert "".join([*map(stream.push, ids), stream.flush()]) == _tokenizer().decode(ids)


@lru_cache
def _tokenizer() -> Tokenizer:
    data = fake.tokenizer().to_str().encode()
    return Tokenizer(lambda _: data, lambda name: name == "tokenizer.json", "test")


@pytest.mark.quick
def test_a_space_before_a_word_is_kept_by_decoders_that_look_back() -> None:
    """Metaspace decoders (Llama 2) drop the space of the first token; the prompt must be seen."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁cat": 1, "s": 2, "<unk>": 3}, unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(lambda _: made.to_str().encode(), lambda name: name == "tokenizer.json", "test")
    stream = TextStream(tokenizer, [0])
    assert [stream.push(t) for t in (1, 2, 0)] == [" cat", "s", " a"]
    assert [TextStream(tokenizer, []).push(1)] == ["cat"]
