"""Checkpoints as other programs write them: GPTQ and AWQ folders, and GGUF files, with the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.models import END, START, VOCABULARY, make_checkpoint, make_model

Array = NDArray[Any]


@dataclass(frozen=True)
class Written:
    """A linear as GPTQ or AWQ stores it, and the values [N, K] that it stands for."""

    tensors: dict[str, torch.Tensor]
    values: Array


def pack_words(codes: Array, bits: int) -> Array:
    """uint32 [count * bits / 32, ..] of codes [count, ..], as AutoGPTQ's QuantLinear.pack does it."""
    codes = codes.astype(np.uint64)
    words = np.zeros((len(codes) * bits // 32, *codes.shape[1:]), np.uint64)
    if bits != 3:
        for i, code in enumerate(codes):
            words[i // (32 // bits)] |= code << np.uint64(bits * (i % (32 // bits)))
        return words.astype(np.uint32)
    for i, row in zip(range(0, len(codes), 32), range(0, len(words), 3), strict=True):
        for j in range(10):
            words[row] |= codes[i + j] << np.uint64(3 * j)
            words[row + 1] |= codes[i + 11 + j] << np.uint64(3 * j + 1)
            words[row + 2] |= codes[i + 22 + j] << np.uint64(3 * j + 2)
        words[row] |= codes[i + 10] << np.uint64(30)
        words[row + 1] |= codes[i + 10] >> np.uint64(2) & np.uint64(1)
        words[row + 1] |= codes[i + 21] << np.uint64(31)
        words[row + 2] |= codes[i + 21] >> np.uint64(1) & np.uint64(3)
    return (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def gptq_linear(
    rng: np.random.Generator, outputs: int, columns: int, bits: int, group: int, *, symmetric: bool, spread: bool = False,
    stored_offset: int = 1, size: float = 0.02,
) -> Written:  # fmt: skip
    """Random codes [K, N]. spread: columns belong to groups in random order; stored_offset: what stored zero points lack."""
    groups = -(-columns // group)
    codes = rng.integers(0, 2**bits, (columns, outputs))
    middle = 2 ** (bits - 1)
    zeros = np.full((groups, outputs), middle) if symmetric else rng.integers(stored_offset, 2**bits, (groups, outputs))
    scales = (rng.random((groups, outputs)) * size / middle).astype(np.float16)
    index = np.arange(columns) // group
    if spread:
        index = rng.permutation(index)
    values = (codes - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
    stored = {
        "qweight": as_torch(pack_words(codes, bits)), "qzeros": as_torch(pack_words((zeros - stored_offset).T, bits).T),
        "scales": torch.from_numpy(scales), "g_idx": torch.from_numpy(index.astype(np.int32)),
    }  # fmt: skip
    return Written(stored, values.T)


def awq_linear(rng: np.random.Generator, outputs: int, columns: int, group: int, *, size: float = 0.02) -> Written:
    """Random codes [K, N] of 4 bits in AutoAWQ's order, as its WQLinear_GEMM.from_linear writes it."""

    def pack(values: Array) -> torch.Tensor:
        words = np.zeros((len(values), outputs // 8), np.uint32)
        for column in range(outputs // 8):
            for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, column] |= values[:, column * 8 + place].astype(np.uint32) << np.uint32(i * 4)
        return as_torch(words)

    codes = rng.integers(0, 16, (columns, outputs))
    zeros = rng.integers(0, 16, (columns // group, outputs))
    scales = (rng.random((columns // group, outputs)) * size / 8).astype(np.float16)
    index = np.arange(columns) // group
    values = (codes - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
    return Written({"qweight": pack(codes), "qzeros": pack(zeros), "scales": torch.from_numpy(scales)}, values.T)


def as_torch(words: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def quantized_folder(folder: Path, settings: dict[str, Any], linear: Callable[[int, int], Written], **config: Any) -> Any:
    """Write a tiny llama whose projections are made by `linear(outputs, columns)`; returns transformers' model of those values."""
    config = {"num_hidden_layers": 1, **config}
    make_checkpoint("llama", folder, **config)
    model, tensors = make_model("llama", **config), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                written = linear(*module.weight.shape)
                module.weight.copy_(torch.from_numpy(written.values))
                del tensors[f"{name}.weight"]
                tensors |= {f"{name}.{part}": value.contiguous() for part, value in written.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    return model


PLACES = {  # bytes that hold the exponents of f16 scales in a block
    "Q4_0": (1,), "Q5_0": (1,), "Q8_0": (1,), "IQ4_NL": (1,), "Q2_K": (81, 83), "Q3_K": (109,), "Q4_K": (1, 3), "Q5_K": (1, 3),
    "Q6_K": (209,), "TQ1_0": (53,), "TQ2_0": (65,),
}  # fmt: skip


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int, exponent: int | None = None) -> Array:
    """uint8 [rows, bytes] of any codes and finite scales. exponent: the high byte of every scale, for values of a known size."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place in PLACES[kind]:
        raw[..., place] = raw[..., place] & 0xBF if exponent is None else exponent
    if kind == "TQ2_0":
        raw[..., :64] &= 0x55  # codes 0 and 1
    return raw.reshape(rows, -1)


def write_gguf(
    path: Path, model: Any, architecture: str, kinds: Callable[[str], str] = lambda name: "F32", *, tokenizer: Path | None = None,
    metadata: dict[str, Any] | None = None, divisors: Array | None = None,
) -> None:  # fmt: skip
    """Write a model of transformers as convert_hf_to_gguf.py does; its weights become those that the file stands for.

    kinds: of the matrices, by their GGUF name. Kinds that gguf-py cannot quantize to get random codes.
    """
    config, rng = model.config, np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(END)
    writer.add_bos_token_id(START)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    with torch.no_grad():
        for source, parameter in model.named_parameters():
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            assert name is not None
            values = parameter.numpy()
            count = heads.get(name.split(".")[-2]) if architecture == "llama" else None
            if count:
                values = values.reshape(count, 2, len(values) // count // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
            kind = kinds(name) if values.ndim == 2 else "F32"
            try:
                raw = gguf.quants.quantize(values, Kind[kind])
            except NotImplementedError:
                raw = random_blocks(rng, kind, len(values), int(values.shape[1]), 0x02)
            writer.add_tensor(name, raw, raw_dtype=Kind[kind])
            stood = gguf.quants.dequantize(raw, Kind[kind])
            if count:
                stood = stood.reshape(count, len(stood) // count // 2, 2, *stood.shape[1:]).swapaxes(1, 2).reshape(stood.shape)
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(stood)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_TYPES = gguf.GGUFValueType
VALUE_TYPES = {int: _TYPES.UINT32, float: _TYPES.FLOAT32, str: _TYPES.STRING, bool: _TYPES.BOOL}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rule: str = "gpt-2") -> None:
    """The byte-level BPE tokenizer of a folder."""
    data = json.loads((folder / "tokenizer.json").read_text())
    ids = {**data["model"]["vocab"], **{a["content"]: a["id"] for a in data["added_tokens"]}}
    special = {a["content"] for a in data["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    unused = [f"[PAD{i}]" for i in range(len(tokens), VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*(3 if t in special else 1 for t in tokens), *(5 for _ in unused)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
