"""From a GGUF file to a checkpoint: the configuration from its metadata, and its tensors under the names of transformers.

llama.cpp stores the rows of a llama's query and key weights with the halves of each head interleaved; that is undone by moving
whole rows, so quantized ones stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from stemma.frontend.checkpoint import Checkpoint, StoredTensor
from stemma.frontend.gguf import Gguf, GgufTensor, read_gguf
from stemma.frontend.gguf_blocks import stored
from stemma.frontend.gguf_tokenizer import has_tokenizer, write_tokenizer
from stemma.ir import Array, CheckpointError, UnsupportedError

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NAME = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]+)\.(weight|bias)")
_ROPE = "rope_freqs.weight"


def load_gguf(path: Path, tokenizer: tuple[Path, ...] | None = None) -> Checkpoint:
    """The model of a file. tokenizer: files to use instead of the one in the metadata.

    CheckpointError when the file is damaged or disagrees with itself, UnsupportedError for architectures, kinds and tokenizers
    that are not read.
    """
    file = read_gguf(path)
    facts = _Facts(file)
    if facts.file.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path} is one of several files of a model. Join them with llama.cpp's llama-gguf-split --merge.")
    architecture = facts.text("general.architecture")
    if architecture not in _CLASSES:
        raise UnsupportedError(
            f"{path} holds a model of the architecture {architecture!r}; read are {', '.join(_CLASSES)}. Use the original Hugging "
            "Face checkpoint: Stemma quantizes it with a pass."
        )
    facts.prefix = architecture
    config = _config(facts)
    tensors: dict[str, StoredTensor] = {
        _renamed(t, file): stored(t, path, _row_order(t, facts)) for t in file.tensors.values() if t.name != _ROPE
    }
    scratch = None
    eos, bos = (facts.tokens(config.vocab_size, *names) for names in (("eos", "eot"), ("bos",)))
    notes = _notes(tensors)
    if tokenizer is None and has_tokenizer(file):
        scratch = TemporaryDirectory(prefix="stemma-gguf-")
        tokenizer = write_tokenizer(file, Path(scratch.name), config.vocab_size)
    if tokenizer is None:
        notes.append("The file has no tokenizer: the artifact will take and give token ids, not text.")
    elif not eos:
        raise CheckpointError(f"{path} names no end token (tokenizer.ggml.eos_token_id), so generated text would never end.")
    return Checkpoint(
        path, config, _CLASSES[architecture], "causal_lm", tensors, tokenizer or (), eos, bos[0] if bos else None, tuple(notes),
        f"the metadata of {path}", _rope_divisors(facts), scratch,
    )  # fmt: skip


class _Facts:
    """Metadata by key, with the architecture's prefix when the key begins with a point; CheckpointError for other types."""

    def __init__(self, file: Gguf) -> None:
        self.file, self.prefix = file, ""

    def text(self, key: str) -> str:
        return str(self._typed(key, str, "string"))

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; of a list with one for each layer, the one that all of them are."""
        value = self._typed(key, (int, list), "whole number", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedError(f"{self.file.path} has a different {self.full(key)} in every layer, which is not supported.")
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.file.path} says {self.full(key)} = {value!r}, no positive whole number. It is damaged.")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = float(self._typed(key, (int, float), "number", default))
        if not (np.isfinite(value) and value > 0):
            raise CheckpointError(f"{self.file.path} says {self.full(key)} = {value!r}, no positive number. It is damaged.")
        return value

    def tokens(self, vocabulary: int, *names: str) -> tuple[int, ...]:
        """The ids of special tokens that the file has, each once."""
        found = {f"tokenizer.ggml.{n}_token_id": self.file.metadata.get(f"tokenizer.ggml.{n}_token_id") for n in names}
        for key, value in found.items():
            if value is not None and not (isinstance(value, int) and 0 <= value < vocabulary):
                raise CheckpointError(f"{self.file.path} says {key} = {value!r}, which is none of its {vocabulary} tokens.")
        return tuple(dict.fromkeys(value for value in found.values() if value is not None))

    def full(self, key: str) -> str:
        return f"{self.prefix}{key}" if key.startswith(".") else key

    def tensor(self, name: str) -> GgufTensor:
        if name not in self.file.tensors:
            raise CheckpointError(f"{self.file.path} has no tensor {name!r}. It is no complete {self.prefix} model.")
        return self.file.tensors[name]

    def has(self, key: str) -> bool:
        return self.full(key) in self.file.metadata

    def _typed(self, key: str, kind: Any, what: str, default: Any = None) -> Any:
        value = self.file.metadata.get(self.full(key), default)
        if value is None:
            raise CheckpointError(f"{self.file.path} has no metadata entry {self.full(key)!r}. It is no complete model.")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{self.file.path} says {self.full(key)} = {value!r}, which is no {what}. It is damaged.")
        return value


def _config(facts: _Facts) -> Any:
    """transformers' configuration. Sizes are checked against the tensors, so that damaged ones ask for no memory."""
    import transformers

    file, names = facts.file, facts.file.tensors
    if facts.has(".expert_count") and facts.whole(".expert_count"):
        raise UnsupportedError(
            f"{file.path} holds a mixture of experts, which is not read from GGUF files. Use the original checkpoint."
        )
    layers, width, heads = facts.whole(".block_count"), facts.whole(".embedding_length"), facts.whole(".attention.head_count")
    kv_heads = facts.whole(".attention.head_count_kv", heads)
    head = facts.whole(".attention.key_length", max(1, width // heads))
    inner, rotary = facts.whole(".feed_forward_length"), facts.whole(".rope.dimension_count", head)
    embedding = facts.tensor("token_embd.weight")
    if rotary != head or facts.whole(".attention.value_length", head) != head:
        raise UnsupportedError(f"{file.path} rotates a part of each head, or has values of another size than keys: not supported.")
    shapes = {
        "token_embd": (embedding.shape[0], width), "blk.0.attn_q": (heads * head, width), "blk.0.attn_k": (kv_heads * head, width),
        "blk.0.attn_v": (kv_heads * head, width), "blk.0.attn_output": (width, heads * head), "blk.0.ffn_up": (inner, width),
    }  # fmt: skip
    found = {int(m[1]) for m in map(_NAME.fullmatch, names) if m and m[1]}
    for name, shape in shapes.items():
        if facts.tensor(f"{name}.weight").shape != shape:
            raise CheckpointError(
                f"The metadata of {file.path} describes {shape} for {name}.weight, which has the shape "
                f"{facts.tensor(f'{name}.weight').shape}. The file is damaged."
            )
    if len(found) != layers or max(found) != layers - 1:
        raise CheckpointError(
            f"The metadata of {file.path} says {layers} layers, but it has tensors of {len(found)}. It is damaged."
        )
    settings: dict[str, Any] = dict(
        vocab_size=embedding.shape[0], hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=facts.whole(".context_length"), rope_parameters=_rope(facts),
        rms_norm_eps=facts.real(".attention.layer_norm_rms_epsilon"), tie_word_embeddings="output.weight" not in names,
    )  # fmt: skip
    if facts.prefix == "llama":
        settings |= {"attention_bias": "blk.0.attn_output.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}
    if facts.prefix != "qwen2":
        settings["head_dim"] = head
    try:
        return getattr(transformers, _CLASSES[facts.prefix]).config_class(**settings)
    except Exception as error:  # transformers validates with many kinds of errors
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The metadata of {file.path} describes no {_CLASSES[facts.prefix]}: {reason}.") from None


def _rope(facts: _Facts) -> dict[str, Any]:
    """transformers' settings of the rotary embedding."""
    rope: dict[str, Any] = {"rope_theta": facts.real(".rope.freq_base", 10000.0), "rope_type": "default"}
    kind = facts.text(".rope.scaling.type") if facts.has(".rope.scaling.type") else "none"
    if kind == "none" and not facts.has(".rope.scale_linear"):
        return rope
    if kind in ("none", "linear"):
        factor = facts.real(".rope.scaling.factor") if facts.has(".rope.scaling.factor") else facts.real(".rope.scale_linear", 1.0)
        return rope | ({"rope_type": "linear", "factor": factor} if factor != 1 else {})
    if kind == "yarn":
        length = facts.whole(".rope.scaling.original_context_length")
        return rope | {
            "rope_type": "yarn", "factor": facts.real(".rope.scaling.factor"), "original_max_position_embeddings": length,
        }  # fmt: skip
    raise UnsupportedError(f"{facts.file.path} scales its rotary embedding by {kind!r}; none, linear and yarn are read.")


def _rope_divisors(facts: _Facts) -> Array | None:
    """f32 [head / 2]: what llama.cpp divides the rotary frequencies by (Llama 3.1 and later), None when there is nothing."""
    tensor = facts.file.tensors.get(_ROPE)
    if tensor is None:
        return None
    values = np.asarray(stored(tensor, facts.file.path).load(), np.float32)
    head = facts.whole(".embedding_length") // facts.whole(".attention.head_count")
    if values.shape != (facts.whole(".attention.key_length", head) // 2,) or not (values > 0).all():
        raise CheckpointError(
            f"The tensor {_ROPE!r} in {facts.file.path} has the shape {values.shape}, or values that are not positive."
        )
    return values


def _renamed(tensor: GgufTensor, file: Gguf) -> str:
    """The name in transformers; UnsupportedError for tensors that these architectures do not have."""
    match = _NAME.fullmatch(tensor.name)
    names = _LAYER if match and match[1] else _TOP
    if not match or match[2] not in names:
        raise UnsupportedError(
            f"The tensor {tensor.name!r} in {file.path} has no place in such a model: the file is of a variant that is not read. "
            "Use the original Hugging Face checkpoint."
        )
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{names[match[2]]}.{match[3]}"


def _row_order(tensor: GgufTensor, facts: _Facts) -> Array | None:
    """Which row of the file each row of the model is: those of a head are (half 0, half 1) here, and interleaved in the file."""
    match = _NAME.fullmatch(tensor.name)
    heads = {"attn_q": ".attention.head_count", "attn_k": ".attention.head_count_kv"}.get(match[2] if match and match[1] else "")
    if facts.prefix != "llama" or heads is None:
        return None
    count, rows = facts.whole(heads, facts.whole(".attention.head_count")), tensor.shape[0]
    if rows % (2 * count):
        raise CheckpointError(f"The tensor {tensor.name!r} in {facts.file.path} has {rows} rows, which are no {count} heads.")
    return np.asarray(np.arange(rows).reshape(count, -1, 2).swapaxes(1, 2).reshape(-1))


def _notes(tensors: dict[str, StoredTensor]) -> list[str]:
    """What an artifact takes more bytes for than the file does."""
    wider: dict[str, str] = {}
    for tensor in tensors.values():
        kind = getattr(getattr(tensor, "tensor", None), "kind", None)
        if kind is not None and kind.name in ("Q5_0", "IQ4_NL", "Q3_K"):
            wider[kind.name] = tensor.dtype
    return [f"Weights of the kind {kind} are held exactly, in the larger format {name}." for kind, name in wider.items()]
