"""Write a randomly initialised checkpoint with the shapes of Llama-3.2-1B, in the Hugging Face layout.

Usage: make_checkpoint.py FOLDER [--seed N]

Weights are bf16, normal with std 0.02 (norms are 1), and go to disk a block of rows at a time, so memory stays
far below the 2.5 GB of the file. The tokenizer is byte-level with no learned merges: 256 byte tokens, filler up
to 128000 that no text encodes to, and the 256 special tokens of Llama 3. It is written whole, nothing is fetched.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 2048, 16, 32, 8, 64, 8192
VOCAB, SPECIAL = 128256, 256
STD = 0.02
BLOCK = 1 << 22  # values drawn at once
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def config() -> dict[str, object]:
    """The fields of the published config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": VOCAB - SPECIAL,
        "eos_token_id": VOCAB - SPECIAL + 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": STD,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in file order."""
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return tensors | {"model.norm.weight": (HIDDEN,)}


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bit patterns of finite values rounded to bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def blocks(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[NDArray[np.uint16]]:
    """A tensor's values in row-major order, a block at a time."""
    if len(shape) == 1:
        yield bf16(np.ones(shape, np.float32))
        return
    size = math.prod(shape)
    for start in range(0, size, BLOCK):
        yield bf16(rng.standard_normal(min(BLOCK, size - start), np.float32) * np.float32(STD))


def write_weights(path: Path, seed: int) -> None:
    """Write one safetensors file: the header's length, the header, then the tensors back to back."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes().items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes().values():
            for block in blocks(shape, rng):
                file.write(block.tobytes())


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with Llama 3's splitting rule and special token ids."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    # One merge that no UTF-8 text reaches (byte FF twice), because some readers refuse an empty list of merges.
    tokens.append("\u00ff\u00ff")
    tokens += [f"<|filler_{i}|>" for i in range(len(tokens), VOCAB - SPECIAL)]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[("\u00ff", "\u00ff")]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    names = [BOS, EOS] + [f"<|reserved_special_token_{i}|>" for i in range(SPECIAL - 2)]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, VOCAB - SPECIAL)]
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint shaped like Llama-3.2-1B.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": VOCAB - SPECIAL, "eos_token_id": VOCAB - SPECIAL + 1}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    documents = {"config": config(), "generation_config": ids, "tokenizer_config": names | {"model_max_length": 131072}}
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    tokenizer().save(str(folder / "tokenizer.json"))
    write_weights(folder / "model.safetensors", args.seed)


if __name__ == "__main__":
    main()
