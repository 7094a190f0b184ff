"""A GGUF file's byte-level BPE tokenizer as the files that Hugging Face's libraries read: tokenizer.json and its settings.

How text is cut before merging is named by `tokenizer.ggml.pre`; the expressions for each name are those of llama.cpp's
llm_tokenizer_bpe (src/llama-vocab.cpp), applied one after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stemma.frontend.gguf import Gguf
from stemma.frontend.tokenizer_files import check_tokenizer, tokenizer_files
from stemma.ir import CheckpointError

_CONTROL, _USER = 3, 4  # types of tokens: never in a text by itself; added by whoever trained the model
_SHORT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = (f"{_SHORT}|{_WORDS % digits}" for digits in ("{1,3}", ""))
_CUTS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "modern-bert", "exaone4", "gigachat"), (_GPT2,)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (_QWEN2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)),
}
_WHOLE_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "glm4")  # a piece that is a token is not merged
_BEGIN = ("llama3", "llama-v3", "llama-bpe", "falcon3")  # texts begin with the first token unless the file says otherwise


def has_tokenizer(file: Gguf) -> bool:
    """Whether the metadata holds a tokenizer of any kind."""
    return file.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")


def write_tokenizer(file: Gguf, folder: Path, vocabulary: int) -> tuple[Path, ...]:
    """The files, made in `folder`; those beside the GGUF file when its metadata holds no tokenizer of this kind.

    CheckpointError when neither gives one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders

    model, cut = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or cut not in _CUTS:
        beside = file.path.parent / "tokenizer.json"
        if beside.is_file():
            found = tokenizer_files(beside.parent)
            check_tokenizer(found)
            return found
        what = f"of the kind {model!r}" if model != "gpt2" else f"that cuts text by the rule {cut!r}"
        raise CheckpointError(
            f"{file.path} has a tokenizer {what}, which is not read. Give the folder of the original one with --tokenizer "
            f"FOLDER, or copy its tokenizer.json to {file.path.parent}."
        )
    tokens, merges, types = (_list(file, key, kind) for key, kind in (("tokens", str), ("merges", str), ("token_type", int)))
    if len(tokens) != vocabulary or len(types) not in (0, len(tokens)):
        raise CheckpointError(
            f"{file.path} has an embedding of {vocabulary} tokens, but {len(tokens)} in its vocabulary and {len(types)} types of "
            "them. It is damaged."
        )
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise CheckpointError(f"{file.path} has tokens of the same text, which is not read. {_WAY_OUT}")
    kinds = dict(zip(tokens, types, strict=False))
    try:
        tokenizer = Tokenizer(_model(ids, merges, cut in _WHOLE_FIRST))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"The merges in {file.path} do not fit its tokens ({error}). {_WAY_OUT}") from None
    tokenizer.pre_tokenizer = _pre_tokenizer(_CUTS[cut])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in kinds.items() if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in kinds.items() if k == _USER])
    names = {name: _special(file, name, tokens) for name in ("bos", "eos")}
    if around := _around(file, names, ids, cut):
        tokenizer.post_processor = around
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{f"{n}_token": t for n, t in names.items() if t is not None}}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "tokenizer.json", folder / "tokenizer_config.json"


_WAY_OUT = "Give the folder of the original tokenizer with --tokenizer FOLDER."


def _list(file: Gguf, key: str, kind: type) -> list[Any]:
    found = file.metadata.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise CheckpointError(f"The metadata entry tokenizer.ggml.{key} in {file.path} is no list of {kind.__name__}. {_WAY_OUT}")
    return found


def _model(ids: dict[str, int], merges: list[str], whole_first: bool) -> Any:
    from tokenizers import models

    at = [merge.find(" ", 1) for merge in merges]
    if min(at, default=1) < 1:
        raise ValueError(f"{merges[at.index(-1)]!r} is no pair")
    pairs = [(merge[:i], merge[i + 1 :]) for merge, i in zip(merges, at, strict=True)]
    return models.BPE(vocab=ids, merges=pairs, ignore_merges=whole_first)


def _pre_tokenizer(cuts: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in cuts]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _special(file: Gguf, name: str, tokens: list[str]) -> str | None:
    """The text of a special token, None when the file has none; its id is known to be one."""
    found = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return None if found is None else tokens[found]


def _around(file: Gguf, names: dict[str, str | None], ids: dict[str, int], cut: str) -> Any:
    """What adds the first or last token to a text, None when neither is wanted."""
    from tokenizers import processors

    wanted = {name: file.metadata.get(f"tokenizer.ggml.add_{name}_token", name == "bos" and cut in _BEGIN) for name in names}
    first, last = (token if wanted[name] else None for name, token in names.items())
    if first is None and last is None:
        return None
    single = [*([first] if first is not None else []), "$A", *([last] if last is not None else [])]
    return processors.TemplateProcessing(single=single, special_tokens=[(t, ids[t]) for t in {*single} - {"$A"}])
