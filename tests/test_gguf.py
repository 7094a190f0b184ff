"""GGUF files: every kind against gguf-py to the bit, whole models against transformers, and damaged files."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

import stemma
from stemma.compiler import compile
from stemma.frontend.gguf import KINDS, GgufTensor, read_gguf
from stemma.frontend.gguf_blocks import _DECODERS, Blocks
from stemma.frontend.gguf_tokenizer import _CUTS
from stemma.frontend.hf import load_checkpoint, trace_checkpoint
from stemma.ir import CheckpointError, Format, StemmaError, UnsupportedError, dtype, interpret
from tests.models import END, START, VOCABULARY, make_checkpoint, make_model
from tests.quantized_files import PLACES, random_blocks, write_gguf
from tests.test_prequantized import distance, logits

WIDE = dict(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of the test models."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("tokenizer"), num_hidden_layers=1)


@pytest.mark.quick
@pytest.mark.parametrize("kind", PLACES)
def test_every_kind_is_exact(kind: str, tmp_path: Path) -> None:
    """The parts are those of the format, and stand for the bits that gguf-py dequantizes, in whole, by rows and reordered."""
    raw = random_blocks(np.random.default_rng(0), kind, 12, 1024)
    (tmp_path / "x").write_bytes(b"before" + raw.tobytes())
    known = next(k for k in KINDS.values() if k.name == kind)
    tensor = GgufTensor("x", known, (12, 1024), 6, raw.nbytes)
    wanted = gguf.quants.dequantize(raw, Kind[kind])
    read = Blocks(tensor, tmp_path / "x")
    format = dtype(read.dtype)
    assert isinstance(format, Format)
    whole = read.load()
    assert {n: (p.dtype.type, p.shape[1:]) for n, p in whole.parts.items()} == format.parts(1024)
    assert np.array_equal(whole.dequantize().view(np.uint32), wanted.view(np.uint32))
    order = np.array([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10])
    assert np.array_equal(Blocks(tensor, tmp_path / "x", order).rows()[3:8].dequantize(), wanted[order[3:8]])


def test_sizes_of_kinds_are_those_of_ggml() -> None:
    for number, kind in KINDS.items():
        assert (kind.name, (kind.block, kind.bytes)) == (Kind(number).name, gguf.GGML_QUANT_SIZES[Kind(number)])


def pick(**kinds: str) -> Callable[[str], str]:
    """Kinds by a part of the tensor's name; the others are F32."""
    return lambda name: next((kind for part, kind in kinds.items() if part in name), "F32")


MIXED = pick(
    token_embd="Q6_K", attn_q="Q4_K", attn_k="Q5_K", attn_v="Q3_K", attn_output="TQ2_0", gate="Q2_K", up="Q4_0", down="Q5_0"
)
MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[str], str]]] = {
    "llama bf16": ("llama", "llama", dict(tie_word_embeddings=False, num_hidden_layers=1), lambda name: "BF16"),
    "llama mixed": ("llama", "llama", WIDE, MIXED),
    "qwen2 Q8_0": ("qwen2", "qwen2", dict(num_hidden_layers=1), lambda name: "Q8_0"),
    "qwen3 Q4_0": ("qwen3", "qwen3", dict(num_hidden_layers=1), lambda name: "Q4_0"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_transformers(name: str, tmp_path: Path) -> None:
    """Rows of llama's queries and keys go back to where they were, quantized or not; a tied embedding is one weight."""
    family, architecture, config, kinds = MODELS[name]
    model = make_model(family, **config)
    write_gguf(tmp_path / "m.gguf", model, architecture, kinds)
    module, store = trace_checkpoint(tmp_path / "m.gguf")
    assert module.properties["eos"] == (END,) and module.properties["bos"] == START and module.properties["context"] == 128
    tied = model.config.tie_word_embeddings
    assert sum(t.shape[0] == VOCABULARY for t in module.weights().values()) == (1 if tied else 2)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    assert distance(interpret(module["forward"], {"input_ids": ids}, store)["logits"], logits(model, ids)) < 1e-5


def test_rope_scalings(tmp_path: Path) -> None:
    """Llama 3's scaling is a tensor of divisors; YaRN and linear scaling are metadata."""
    model = make_model("llama_rope_scaled", num_hidden_layers=1)
    plain = make_model("llama", num_hidden_layers=1)
    divisors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 2
    yarn = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
    cases: list[tuple[Any, dict[str, Any], Any]] = [
        (model, {}, divisors),
        (
            make_model("llama", num_hidden_layers=1, rope_parameters=yarn),
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 32},
            None,
        ),
    ]
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, 40))
    for wanted, metadata, tensor in cases:
        write_gguf(tmp_path / "m.gguf", wanted, "llama", metadata=metadata, divisors=tensor)
        module, store = trace_checkpoint(tmp_path / "m.gguf")
        assert distance(interpret(module["forward"], {"input_ids": ids}, store)["logits"], logits(wanted, ids)) < 1e-5
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", plain, "llama", metadata=linear)
    assert load_checkpoint(tmp_path / "m.gguf").config.rope_parameters == {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0,
    }  # fmt: skip


def test_a_file_runs_on_the_cpu(tmp_path: Path, tokenizer: Path) -> None:
    """Compiled as a user does, text and all; exact is labelled identical, and what a larger format holds is noted."""
    model = make_model("llama", **WIDE)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", MIXED, tokenizer=tokenizer)
    report = compile(tmp_path / "tiny.gguf", tmp_path / "m.stemma", variants=("native",))
    assert {r.label for r in report.records} == {"identical"} and [n for n in report.notes if "Q5_0" in n]
    run = stemma.load(tmp_path / "m.stemma")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    assert distance(run.forward(ids), logits(model, ids)) < 1e-5
    assert isinstance(run.generate("def f", max_new_tokens=4), str) and run.manifest.name == "tiny"


TEXT = "It's 12345 isn't  it?\n\n\tDEF don'T x=3**2; naïve 日本語 1a2b  \r\n  end "
ORIGINALS = {  # as the models' own tokenizer.json has them
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                 r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}  # fmt: skip


@pytest.mark.parametrize("rule", ORIGINALS)
def test_text_is_cut_as_the_original_does(rule: str) -> None:
    from stemma.frontend.gguf_tokenizer import _pre_tokenizer

    split = pre_tokenizers.Split(Regex(ORIGINALS[rule]), behavior="isolated")
    original = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert _pre_tokenizer(_CUTS[rule]).pre_tokenize_str(TEXT) == original.pre_tokenize_str(TEXT)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A small file with a tokenizer; tests copy it before they break it."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    model = make_model("llama", num_hidden_layers=1)
    write_gguf(path, model, "llama", lambda name: "Q8_0", tokenizer=tokenizer)
    return path


def test_tokenizer_of_the_metadata(good: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The same ids as the original, special tokens included; first tokens and chat templates as the metadata says."""
    checkpoint = load_checkpoint(good)
    made, original = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (checkpoint.home, tokenizer))
    for text in (TEXT, "<|start|>def self<|end|> else", "", "    return in"):
        assert made.encode(text).ids == original.encode(text).ids
        assert made.decode(made.encode(text).ids) == original.decode(original.encode(text).ids)
    begin = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    model = make_model("llama", num_hidden_layers=1)
    write_gguf(tmp_path / "b.gguf", model, "llama", tokenizer=tokenizer, metadata=begin)
    checkpoint = load_checkpoint(tmp_path / "b.gguf")
    assert Tokenizer.from_file(str(checkpoint.files[0])).encode("def").ids == [START, *original.encode("def").ids]
    assert "messages" in checkpoint.files[1].read_text() and '"<|start|>"' in checkpoint.files[1].read_text()


def test_another_tokenizer_can_be_given(tokenizer: Path, tmp_path: Path) -> None:
    """When the metadata's is of a kind that is not read: from a folder, from beside the file, or an error that says so."""
    model = make_model("llama", num_hidden_layers=1)
    write_gguf(tmp_path / "m.gguf", model, "llama", metadata={"tokenizer.ggml.model": "llama"})
    with pytest.raises(CheckpointError, match="'llama', which is not read.*--tokenizer FOLDER"):
        load_checkpoint(tmp_path / "m.gguf")
    assert load_checkpoint(tmp_path / "m.gguf", tokenizer).home == tokenizer
    with pytest.raises(CheckpointError, match="There is no tokenizer in"):
        load_checkpoint(tmp_path / "m.gguf", tmp_path)
    shutil.copy(tokenizer / "tokenizer.json", tmp_path)
    assert load_checkpoint(tmp_path / "m.gguf").home == tmp_path


def test_a_file_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama", num_hidden_layers=1), "llama")
    checkpoint = load_checkpoint(tmp_path / "m.gguf")
    assert not checkpoint.files and checkpoint.notes == (
        "The file has no tokenizer: the artifact will take and give token ids, not text.",
    )


def head(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + version.to_bytes(4, "little") + tensors.to_bytes(8, "little") + entries.to_bytes(8, "little")


KEY = (3).to_bytes(8, "little") + b"key"
HUGE = (1 << 62).to_bytes(8, "little")
NAME = (1).to_bytes(8, "little") + b"t"
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "magic": (b"GGML" + bytes(40), "is no GGUF file"),
    "only magic": (b"GGUF", "truncated inside its header"),
    "version 1": (head(1), "GGUF of version 1"),
    "version 4": (head(4), "GGUF of version 4"),
    "big-endian": (head(3 << 24), "is a big-endian GGUF file"),
    "entries": (head(entries=1 << 60), "1152921504606846976 metadata entries"),
    "tensors": (head(tensors=1 << 60), "1152921504606846976 tensors"),
    "long key": (head(entries=1) + HUGE + bytes(40), "bytes in a metadata key"),
    "long string": (head(entries=1) + KEY + bytes([8, 0, 0, 0]) + HUGE, "bytes in the value of 'key'"),
    "long array": (head(entries=1) + KEY + bytes([9, 0, 0, 0, 4, 0, 0, 0]) + HUGE, "items in 'key'"),
    "many strings": (head(entries=1) + KEY + bytes([9, 0, 0, 0, 8, 0, 0, 0]) + HUGE, "strings in 'key'"),
    "nested array": (head(entries=1) + KEY + bytes([9, 0, 0, 0, 9, 0, 0, 0]) + bytes(8), "array of the type 9"),
    "type": (head(entries=1) + KEY + bytes([77, 0, 0, 0]) + bytes(8), "is of the type 77"),
    "text": (head(entries=1) + KEY[:8] + b"\xff\xff\xff" + bytes(20), "is no UTF-8"),
    "twice": (head(entries=2) + 2 * (KEY + bytes([0, 0, 0, 0, 1])), "two metadata entries 'key'"),
    "axes": (head(tensors=1) + NAME + bytes([9, 0, 0, 0]) + bytes(40), "has 9 axes"),
    "kind": (head(tensors=1) + NAME + bytes([1, 0, 0, 0]) + bytes(8) + bytes([99, 0, 0, 0]) + bytes(8), "of the kind 99"),
    "size": (head(tensors=1) + NAME + bytes([1, 0, 0, 0]) + HUGE + bytes(4) + bytes(8), "the tensor 't' ends at byte"),
    "no elements": (head(tensors=1) + NAME + bytes([1, 0, 0, 0]) + bytes(8 + 4 + 8), "has the shape \\(0,\\)"),
    "alignment": (
        head(tensors=1) + NAME + bytes([1, 0, 0, 0, 1]) + bytes(7 + 4) + bytes([1]) + bytes(7 + 64), "not aligned to 32 bytes",
    ),
    "no metadata": (head(), "no metadata entry 'general.architecture'"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_clear_error(name: str, tmp_path: Path) -> None:
    data, words = BROKEN[name]
    (tmp_path / "x.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words) as error:
            load_checkpoint(tmp_path / "x.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and 40 < len(str(error.value)) < 600


CHANGED: dict[str, tuple[dict[str, Any], type[StemmaError], str]] = {
    "architecture": ({"general.architecture": "mamba"}, UnsupportedError, "architecture 'mamba'"),
    "layers": ({"llama.block_count": 1 << 31}, CheckpointError, "2147483648 layers"),
    "width": ({"llama.embedding_length": 1 << 30}, CheckpointError, "describes \\(288, 1073741824\\)"),
    "heads": ({"llama.attention.head_count": 0}, CheckpointError, "head_count = 0, no positive"),
    "text for a number": ({"llama.block_count": "1"}, CheckpointError, "which is no whole number"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, CheckpointError, "no positive number"),
    "end token": ({"tokenizer.ggml.eos_token_id": 9999}, CheckpointError, "none of its 288 tokens"),
    "experts": ({"llama.expert_count": 8}, UnsupportedError, "mixture of experts"),
    "parts": ({"split.count": 3}, CheckpointError, "one of several files"),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, UnsupportedError, "'longrope'"),
    "cutting": ({"tokenizer.ggml.pre": "no such"}, CheckpointError, "cuts text by the rule 'no such'"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_metadata_that_cannot_be_used(name: str, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, kind, words = CHANGED[name]
    file = read_gguf(good)
    file.metadata.update(changes)
    monkeypatch.setattr("stemma.frontend.gguf_model.read_gguf", lambda path: file)
    with pytest.raises(kind, match=words):
        load_checkpoint(good)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_kinds_that_no_format_holds_exactly(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama", num_hidden_layers=1), "llama", lambda name: kind)
    with pytest.raises(CheckpointError, match=f"of the kind {kind}, whose minimums in f16.*llama-quantize"):
        load_checkpoint(tmp_path / "m.gguf")


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The file cut, or with a few bytes changed, most of them in its header."""
    flips = st.lists(st.tuples(st.integers(0, min(len(data), 12000) - 1), st.integers(0, 255)), min_size=1, max_size=4)

    def changed(places: list[tuple[int, int]]) -> bytes:
        new = bytearray(data)
        for place, value in places:
            new[place] = value
        return bytes(new)

    return st.one_of(st.integers(0, len(data) - 1).map(lambda n: data[:n]), flips.map(changed))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_crash(good: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Either an error of ours, or a model whose tensors can be read or are refused."""
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data.draw(damaged(good.read_bytes())))
    for step in steps(path):
        try:
            step()
        except (CheckpointError, UnsupportedError) as error:
            assert "\n" not in str(error)
            break


def steps(path: Path) -> Iterator[Callable[[], object]]:
    found: list[Any] = []
    yield lambda: found.append(load_checkpoint(path))
    yield from (t.load for t in found[0].tensors.values())


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    raw = random_blocks(np.random.default_rng(0), "Q8_0", 2, 64, exponent=0x7C)
    (tmp_path / "x").write_bytes(raw.tobytes())
    with pytest.raises(CheckpointError, match="scales that are NaN or infinite"):
        Blocks(GgufTensor("x", KINDS[8], (2, 64), 0, raw.nbytes), tmp_path / "x").load()
    raw = random_blocks(np.random.default_rng(0), "TQ2_0", 1, 256)
    raw[0, 0] |= 3
    (tmp_path / "x").write_bytes(raw.tobytes())
    with pytest.raises(CheckpointError, match="codes that are not -1, 0 or 1"):
        Blocks(GgufTensor("x", KINDS[35], (1, 256), 0, raw.nbytes), tmp_path / "x").load()
    assert _DECODERS.keys() == PLACES.keys()
