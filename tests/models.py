"""Small random checkpoints of real architectures, for every test that needs a model.

`make_checkpoint("llama", folder)` writes config.json, safetensors and (for language models) a byte-level tokenizer of
288 entries. Two layers, width 64, four heads, deterministic weights: the same call always writes the same numbers.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 288
END = 256  # "<|end|>"
START = 257  # "<|start|>"

_BASE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=START, eos_token_id=END,
    pad_token_id=END, tie_word_embeddings=False,
)  # fmt: skip
_LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", dict(tie_word_embeddings=True)),
    "llama_rope_scaled": ("LlamaConfig", "LlamaForCausalLM", dict(rope_parameters=_LLAMA3_ROPE)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", dict(tie_word_embeddings=True, head_dim=None)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=8)),
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM",
        dict(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=0.5,
             final_logit_softcapping=1.5),
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(head_dim=None)),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        dict(n_embd=64, n_layer=2, n_head=4, n_inner=128, n_positions=128, vocab_size=VOCABULARY, bos_token_id=START,
             eos_token_id=END),
    ),
    "bert": ("BertConfig", "BertModel", {}),
    "vit": ("ViTConfig", "ViTForImageClassification", dict(image_size=32, patch_size=8, num_channels=3, num_labels=10)),
}  # fmt: skip

ARCHITECTURES = tuple(_CONFIGS)
CAUSAL = tuple(n for n, (_, cls, _) in _CONFIGS.items() if cls.endswith(("ForCausalLM", "LMHeadModel")))
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def make_model(architecture: str, *, seed: int = 0, **config: Any) -> Any:
    """The f32 `transformers` model in evaluation mode, with random weights; `config` overrides single settings."""
    config_class, model_class, settings = _CONFIGS[architecture]
    base = {} if architecture in ("gpt2", "vit") else _BASE
    if architecture == "vit":
        base = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    values = {k: v for k, v in {**base, **settings, **config}.items() if v is not None}
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(0, 1, generator=generator)
            if parameter.dim() < 2:  # norms and biases: around what they start from (1, or 0)
                parameter.add_(noise * 0.05)
            else:
                parameter.copy_(noise * 0.08)
    model.config._name_or_path = ""
    return model.eval()


def make_checkpoint(
    architecture: str, folder: Path, dtype: str = "f32", *, seed: int = 0, shard_bytes: int | None = None,
    tokenizer: bool = True, **config: Any,
) -> Path:  # fmt: skip
    """Write a checkpoint folder of `architecture` (see ARCHITECTURES) stored as `dtype` ("f32", "bf16", "f16").

    `shard_bytes` splits the weights into files of about that size; `config` overrides settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(architecture, seed=seed, **config).to(_DTYPES[dtype])
    model.config.dtype = str(_DTYPES[dtype]).removeprefix("torch.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=shard_bytes or 10**12)
    if tokenizer and architecture in CAUSAL:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes plus <|end|>, <|start|> and a few merges: tokenizer.json and its config."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {"<|end|>": END, "<|start|>": START}
    pairs = "d e,de f,Ġ Ġ,ĠĠ ĠĠ,i n,r e,s e,se l,l f,o n,t h,e r,a t,o r,e n,i s,a n,e s"
    merges = [(left, right) for left, right in (pair.split() for pair in pairs.split(","))]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)  # all letters and both ends are in, so ids run on
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|start|>",
                "model_max_length": 128, "clean_up_tokenization_spaces": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
