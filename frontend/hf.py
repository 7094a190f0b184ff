"""From a Hugging Face checkpoint folder, or a GGUF file, to a module of the IR, without loading a weight.

The model class is built with parameters that have a shape but no memory, its plain forward (no cache) is exported, and each
parameter is mapped by name to a tensor of the files, which is read when somebody asks for it. Tensors that were quantized by others
stay as they are (`prequantized.py`, `gguf*.py`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stemma.frontend.checkpoint import Checkpoint, StoredTensor
from stemma.frontend.prequantized import is_padding, order_inputs, unpack_tensors
from stemma.frontend.safetensors import read_folder
from stemma.frontend.tokenizer_files import NAMES as TOKENIZER_FILES
from stemma.frontend.tokenizer_files import check_tokenizer, read_object, tokenizer_files
from stemma.frontend.torch_export import Stored, trace
from stemma.ir import Array, CheckpointError, Module, Size, TypeMismatch, UnsupportedError, WeightStore, dim, dtype, size

__all__ = ["Checkpoint", "load_checkpoint", "trace_checkpoint"]

_FILES = (*TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json")
# Tensors that old checkpoints carry although the classes compute them.
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|num_batches_tracked)$")
MANY_LAYERS = 1000  # a model of more has at least as many tensors
_EXAMPLE = {"batch": 3, "tokens": 7}


def load_checkpoint(source: str | Path, tokenizer: str | Path | None = None) -> Checkpoint:
    """Read the configuration and the headers of the weights of a folder or a GGUF file.

    tokenizer: a folder whose tokenizer is used instead. CheckpointError when the checkpoint is incomplete or damaged.
    """
    source = Path(source)
    given = None if tokenizer is None else tokenizer_files(Path(tokenizer))
    if given is not None:
        check_tokenizer(given)
    if source.is_file():
        from stemma.frontend.gguf import is_gguf
        from stemma.frontend.gguf_model import load_gguf

        if is_gguf(source):
            return load_gguf(source, given)
    if not source.is_dir():
        problem = "is a file, and no GGUF file" if source.exists() else "does not exist"
        raise CheckpointError(
            f"{source} {problem}. Give the folder that holds config.json and the safetensors files, or a GGUF file."
        )
    return _load_folder(source, given)


def _load_folder(folder: Path, tokenizer: tuple[Path, ...] | None) -> Checkpoint:
    raw = _read_json(folder / "config.json", required=True)
    settings = raw.pop("quantization_config", None)
    config, architecture = _config(folder, raw)
    tensors: Mapping[str, StoredTensor] = read_folder(folder)
    notes: list[str] = []
    if settings is not None:
        tensors, notes = unpack_tensors(read_folder(folder), dict(settings), folder)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    _check_sizes(folder / "config.json", config, causal, len(tensors))
    generation = _read_json(folder / "generation_config.json", required=False)
    text = config.get_text_config()
    eos, bos = (
        _tokens(name, (generation, text), folder, int(text.vocab_size), notes) if causal else ()
        for name in ("eos_token_id", "bos_token_id")
    )
    files = tuple(folder / f for f in _FILES if (folder / f).exists())
    if tokenizer is not None:
        files = (*tokenizer, *(f for f in files if f.name not in TOKENIZER_FILES))
    else:
        check_tokenizer(files)
    has_tokenizer = any(f.name == "tokenizer.json" for f in files)
    if causal and not has_tokenizer:
        notes.append("The folder has no tokenizer.json: the artifact will take and give token ids, not text.")
    if causal and not eos and has_tokenizer:
        raise CheckpointError(
            f"{folder} has a tokenizer but names no end token of its vocabulary, so generated text would never end. Set "
            "eos_token_id in its generation_config.json or config.json."
        )
    return Checkpoint(
        folder, config, architecture, "causal_lm" if causal else "model", tensors, files, eos,
        bos[0] if bos else None, tuple(notes), str(folder / "config.json"),
    )  # fmt: skip


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if path.exists():
        return read_object(path)
    if required:
        raise CheckpointError(f"{path.parent} has no {path.name}. Give the folder of a Hugging Face checkpoint.")
    return {}


def _tokens(name: str, settings: Sequence[Any], folder: Path, vocabulary: int, notes: list[str]) -> tuple[int, ...]:
    """The ids of a special token: those that the first of `settings` that has it names. CheckpointError for what is no id."""
    value = next((v for s in settings if (v := s.get(name) if isinstance(s, dict) else getattr(s, name, None)) is not None), None)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"{folder} says {name} = {value!r}, which is no token id. Correct it in its JSON files.")
    if wrong := [i for i in ids if not 0 <= i < vocabulary]:
        notes.append(f"{folder} says {name} = {value!r}; {wrong[0]} is none of the {vocabulary} tokens and was left out.")
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocabulary))


def _check_sizes(path: Path, config: Any, causal: bool, tensors: int) -> None:
    """CheckpointError for sizes with which building the model would not end, or nothing could run."""
    text = config.get_text_config()
    layers, positions = getattr(text, "num_hidden_layers", None), getattr(text, "max_position_embeddings", None)
    if isinstance(layers, int) and layers > max(MANY_LAYERS, tensors):
        raise CheckpointError(f"{path} describes {layers} layers, but the files hold {tensors} tensors. Correct it.")
    if causal and isinstance(positions, int) and positions < 2:
        raise CheckpointError(f"{path} says max_position_embeddings = {positions}; at least 2 are needed. Correct it.")


def _config(folder: Path, raw: Mapping[str, Any]) -> tuple[Any, str]:
    import transformers

    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(f"{folder / 'config.json'} has no 'architectures' entry, a list that names the model class. Add it.")
    architecture = str(architectures[0])
    known = getattr(transformers, architecture, None)
    if known is None or not hasattr(known, "config_class"):
        raise CheckpointError(
            f"{folder / 'config.json'} names the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} does not have. Install a newer transformers, or check the name; code that a "
            "checkpoint brings along is never run."
        )
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(str(folder))
        config.__dict__.pop("quantization_config", None)  # the weights are read without the library that made them
        return config, architecture
    except Exception as error:  # transformers validates with many kinds of errors
        raise CheckpointError(f"{folder / 'config.json'} describes no model that transformers knows: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What another library says, as whole sentences within about 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > 300:
        text = text[:300].rpartition(". ")[0] or f"{text[:300]} ..."
    return text if text.endswith(".") else f"{text}."


def trace_checkpoint(
    folder: str | Path | Checkpoint, *, inputs: Sequence[str] | None = None, context: int | None = None
) -> tuple[Module, WeightStore]:
    """The plain forward of a checkpoint as a function of the IR, and its weights, mapped lazily.

    inputs: arguments of forward to take as parameters; the default is the main one, "input_ids" or "pixel_values". Others such
        as "attention_mask" must be integers [batch, tokens].
    context: an upper limit for `tokens`, below the model's own.
    Token inputs are i64 [batch, tokens], pixels f32 [batch, channels, height, width]. Properties of the module: kind, name,
    architecture, vocab, context, eos, bos, inputs, results. Raises CheckpointError or UnsupportedError.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else load_checkpoint(folder)
    with _quiet():
        model = _hollow_model(checkpoint)
        mapped = _map_weights(model, checkpoint)
        stored = {name: Stored(tensor.type, tensor.load, tensor.rows) for name, tensor in mapped.items()}
        limit = min(filter(None, (context, checkpoint.context)), default=size.UNBOUNDED)
        _fix_rope(model, limit)
        if checkpoint.rope_divisors is not None:
            _divide_rope(model, checkpoint.rope_divisors)
        example, dims = _example(checkpoint, tuple(inputs or (model.main_input_name,)), limit)
        with _one_sequence_per_row("position_ids" in example):
            module, store = trace(model, (), example, dims=dims, stored=stored)
    module = order_inputs(module, store, mapped)
    forward = module["forward"]
    properties = {
        "kind": checkpoint.kind, "name": checkpoint.name, "architecture": checkpoint.architecture,
        "vocab": getattr(checkpoint.config.get_text_config(), "vocab_size", None),
        "context": None if limit == size.UNBOUNDED else limit, "eos": checkpoint.eos,
        "bos": checkpoint.bos, "inputs": tuple(p.attrs["name"] for p in forward.params), "results": forward.result_names,
    }  # fmt: skip
    return Module([forward], properties), store


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of transformers, which concern training."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _one_sequence_per_row(positions_given: bool) -> Iterator[None]:
    """Answer transformers' test for several sequences packed in one row, which a trace cannot make, as a plain call does: none.

    With position ids as an input the test stays in the graph.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    if positions_given or original is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, original)


def _hollow_model(checkpoint: Checkpoint) -> Any:
    """The model with real buffers, and parameters that have shapes and strides but no memory."""
    import transformers
    from transformers.initialization import no_init_weights

    register = torch.nn.Module.register_parameter

    def register_empty(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(self, name, param if param is None else torch.nn.Parameter(param.to("meta"), requires_grad=False))

    cls = getattr(transformers, checkpoint.architecture)
    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    torch.nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        with no_init_weights():
            model = cls._from_config(checkpoint.config, attn_implementation=attention, dtype=torch.float32)
    except Exception as error:  # whatever the constructor of the class raises
        raise CheckpointError(
            f"{checkpoint.described_by} describes no valid {checkpoint.architecture}: {_reason(error)}"
        ) from error
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
    model.tie_weights()
    hollow: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # by the one they replace, so that tied ones stay tied
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if param not in hollow:
                    hollow[param] = _hollow(param)
                module._parameters[name] = hollow[param]
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError):
            model.set_experts_implementation("batched_mm")
    return model.eval()


def _hollow(param: torch.nn.Parameter) -> torch.nn.Parameter:
    """A CPU parameter like `param` whose memory is given back: torch.export reads shapes, never values."""
    kind = torch.float32 if param.is_floating_point() else param.dtype
    empty = torch.nn.Parameter(torch.empty(param.shape, dtype=kind), requires_grad=False)
    empty.untyped_storage().resize_(0)
    return empty


def _fix_rope(model: Any, limit: int) -> None:
    """Rope scalings that choose their frequencies by the sequence's length keep their first choice, which holds up to `limit`."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for key, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind not in ("dynamic", "longrope"):
                continue
            settings = module.config.rope_parameters if key is None else module.config.rope_parameters[key]
            last = settings.get("original_max_position_embeddings") if kind == "longrope" else module.max_seq_len_cached
            if last is None or limit > last:
                raise UnsupportedError(
                    f"The rope scaling {kind!r} of this model changes its frequencies once a sequence passes {last} positions, "
                    f"which is not supported now. Give a context of at most {last}, or use another scaling in config.json."
                )
            if isinstance(kinds, dict):
                kinds[key] = "default"
            else:
                module.rope_type = "default"


def _divide_rope(model: Any, divisors: Array) -> None:
    """Rotary frequencies as llama.cpp scales them: each divided by its own factor."""
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.inv_freq = module.inv_freq / torch.from_numpy(divisors)


def _map_weights(model: Any, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The stored tensor of every parameter and persistent buffer, by its (first) name in the model."""
    expected: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    by_name, unknown = _renamed(model, checkpoint, expected)
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    extra = [n for n in unknown if not _IGNORED.search(n) and not any(p.search(n) for p in ignored)]
    extra = [n for n in extra if not is_padding(n, checkpoint.tensors)]
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    stored: dict[str, StoredTensor] = {}
    missing = []
    for names in groups.values():
        entry = next((by_name[n] for n in names if n in by_name), None)
        tensor = expected[names[0]]
        if entry is None:
            if isinstance(tensor, torch.nn.Parameter) or (tensor.is_floating_point() and not _optional(model, names[0])):
                missing.append(names[0])
        elif tensor.is_floating_point():
            _check(entry, names[0], tensor, model.get_submodule(names[0].rpartition(".")[0]), checkpoint)
            stored[names[0]] = entry
    if missing or extra:
        parts = [f"{len(n)} tensors {what} ({', '.join(sorted(n)[:4])}{', ...' if len(n) > 4 else ''})"
                 for n, what in ((missing, "are missing from the files"), (extra, "of the files have no place")) if n]  # fmt: skip
        raise CheckpointError(
            f"The weights in {checkpoint.folder} do not fit {checkpoint.described_by}, a {checkpoint.architecture}: "
            f"{' and '.join(parts)}. They are from different models, or a file is missing."
        )
    return stored


def _optional(model: Any, name: str) -> bool:
    return any(re.search(p, name) for p in model._keys_to_ignore_on_load_missing or ())


def _renamed(model: Any, checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Stored tensors by their name in the model, after the renamings that transformers itself does; and those without one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_name: dict[str, StoredTensor] = {}
    unknown = []
    for key, entry in checkpoint.tensors.items():
        plain, _ = rename_source_key(key, renamings, [], model.base_model_prefix, expected)
        name = key if key in expected else plain
        if name in expected:
            by_name[name] = entry
            continue
        _, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if converted is not None:
            raise UnsupportedError(
                f"The weight {key!r} in {checkpoint.folder} must be rearranged for {checkpoint.architecture} (transformers "
                "merges or splits such tensors on loading), which is not supported now. Load the checkpoint with transformers "
                "and save it with save_pretrained(folder, save_original_format=False)."
            )
        unknown.append(key)
    return by_name, unknown


def _check(entry: StoredTensor, name: str, tensor: torch.Tensor, layer: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """CheckpointError unless a stored tensor of a layer has the shape and an element type that the model can compute with."""
    try:
        kind = dtype(entry.dtype).kind
    except TypeMismatch:  # a type of safetensors that the IR does not have, such as F8_E4M3
        kind = "foreign"
    if kind not in ("float", "quantized"):
        raise CheckpointError(
            f"The weight {entry.name!r} in {entry.path} is stored as {entry.dtype}, but {name!r} is a float parameter: this is a "
            "quantized checkpoint of a kind that is not read. Use GPTQ, AWQ, GGUF, or the original one in bfloat16 or float32."
        )
    if kind == "quantized" and type(layer).__name__ == "Conv1D":
        raise UnsupportedError(
            f"The quantized weight {entry.name!r} in {entry.path} belongs to a layer that multiplies by columns (Conv1D, as in "
            "GPT-2), which is not supported. Use the original checkpoint: Stemma quantizes it with a pass."
        )
    if entry.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"The weight {entry.name!r} in {entry.path} has the shape {entry.shape}, but {checkpoint.described_by} describes "
            f"{tuple(tensor.shape)}: the configuration and the weights are from different models."
        )


def _example(
    checkpoint: Checkpoint, inputs: tuple[str, ...], limit: int
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Size]]]:
    """Example arguments of forward, and their symbolic axes."""
    batch, tokens = dim("batch"), dim("tokens", 1, limit)
    example: dict[str, torch.Tensor] = {}
    dims: dict[str, dict[int, Size]] = {}
    for name in inputs:
        if name == "pixel_values":
            example[name], dims[name] = torch.zeros(_EXAMPLE["batch"], *_pixels(checkpoint)), {0: batch}
        elif name == "input_ids" or name.endswith(("_mask", "_ids")):
            length = min(_EXAMPLE["tokens"], limit)
            example[name] = torch.zeros(_EXAMPLE["batch"], length, dtype=torch.int64)
            dims[name] = {0: batch, 1: tokens}
        else:
            raise UnsupportedError(
                f"{checkpoint.architecture} takes {name!r}, for which there are no known example sizes: trace the module with "
                "stemma.frontend.torch_export.trace and give examples."
            )
    return example, dims


def _pixels(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Channels, height and width of the images that a vision model takes."""
    vision = getattr(checkpoint.config, "vision_config", checkpoint.config)
    extent = getattr(vision, "image_size", 224)
    height, width = extent if isinstance(extent, (list, tuple)) else (extent, extent)
    return int(getattr(vision, "num_channels", 3)), int(height), int(width)
