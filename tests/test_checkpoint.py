"""Checkpoint folders: every architecture against transformers, and every way in which a folder can be broken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stemma.calibration import Calibration
from stemma.frontend.hf import Checkpoint, load_checkpoint, trace_checkpoint
from stemma.frontend.safetensors import INDEX, read_header
from stemma.ir import CheckpointError, Module, StemmaError, UnsupportedError, WeightStore, interpret
from tests.helpers import roundtrip
from tests.models import ARCHITECTURES, CAUSAL, END, START, VOCABULARY, make_checkpoint

WEIGHTS = "model.safetensors"


def reference(folder: Path, cls: str) -> Any:
    """The model as transformers loads it, in float32."""
    return getattr(transformers, cls).from_pretrained(folder, dtype=torch.float32).eval()


def inputs(kind: str, batch: int, tokens: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(batch)
    return random.normal(size=(batch, 3, 32, 32)) if kind == "pixel_values" else random.integers(0, VOCABULARY, (batch, tokens))


def agree(module: Module, store: WeightStore, model: Any, *sizes: tuple[int, int], **extra: Any) -> None:
    """The interpreter in f64 against transformers in f32, by relative L2 error of every result."""
    name = module.properties["inputs"][0]
    for batch, tokens in sizes:
        x = inputs(name, batch, tokens)
        got = interpret(module["forward"], {name: x, **extra}, store)
        with torch.no_grad():
            value = torch.tensor(x, dtype=torch.float32 if name == "pixel_values" else torch.int64)
            wanted = model(**{name: value}, **{k: torch.tensor(v) for k, v in extra.items()})
        for key, result in got.items():
            expected = wanted[key].numpy()
            assert result.shape == expected.shape
            error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
            assert error < 1e-5, f"{key} at {batch} x {tokens}: relative error {error:.2e}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_equals_transformers(architecture: str, tmp_path: Path) -> None:
    """One module at two sizes, one longer than the sliding windows (8); weights alternate between f32 and bf16."""
    stored = "bf16" if ARCHITECTURES.index(architecture) % 2 else "f32"
    folder = make_checkpoint(architecture, tmp_path / architecture, stored)
    module, store = trace_checkpoint(folder)
    roundtrip(module)
    properties = module.properties
    assert properties["name"] == architecture and properties["kind"] == ("causal_lm" if architecture in CAUSAL else "model")
    if architecture in CAUSAL:
        assert properties["results"] == ("logits",) and properties["inputs"] == ("input_ids",)
        assert (properties["vocab"], properties["context"]) == (VOCABULARY, 128)
        assert (properties["eos"], properties["bos"]) == ((END,), START)
        assert [d.name for d in module["forward"].dims()] == ["batch", "tokens"]
    agree(module, store, reference(folder, properties["architecture"]), (2, 21), (1, 1))
    kinds = {t.dtype for t in module.weights().values()}
    assert stored in kinds and all(n.dtype == "f32" for n in module["forward"].results)


_SMALL = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
              max_position_embeddings=128)  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "GPTNeoXForCausalLM": _SMALL,
    "MixtralForCausalLM": dict(_SMALL, num_key_value_heads=2, num_local_experts=4),
    "ResNetForImageClassification": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], image_size=32),
}


@pytest.mark.parametrize("name", OTHERS)
def test_classes_that_nothing_here_names_just_work(name: str, tmp_path: Path) -> None:
    """Experts, parallel residuals, convolutions with batch normalisation: by general lowerings, with no word about them in ours."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(cls.config_class(**OTHERS[name])).save_pretrained(tmp_path, save_original_format=False)
    module, store = trace_checkpoint(tmp_path)
    roundtrip(module)
    agree(module, store, reference(tmp_path, name), (2, 9), (1, 1))


def test_experts_stored_one_by_one_are_refused_with_the_way_out(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**OTHERS["MixtralForCausalLM"])
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="experts.*save_original_format=False"):
        trace_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint in bf16, in one file, with tied embeddings; tests copy it before they break it."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "llama", "bf16")


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.mark.quick
def test_tied_embeddings_are_one_weight_read_lazily(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("stemma.frontend.torch_export._decompose")  # slow, and not needed for such a model
    checkpoint = load_checkpoint(llama)
    assert "lm_head.weight" not in checkpoint.tensors
    module, store = trace_checkpoint(checkpoint)
    weights = [n for n in module["forward"].nodes if n.op.name == "weight" and n.shape == (VOCABULARY, 64)]
    assert [w.attrs["name"] for w in weights] == ["model.embed_tokens.weight"]
    assert {f.name for f in checkpoint.files} == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert checkpoint.bytes == sum(2 * e.bytes // 2 for e in checkpoint.tensors.values()) and not checkpoint.notes
    before = store("model.norm.weight")
    tensors = load_file(llama / WEIGHTS)
    assert np.array_equal(before, tensors["model.norm.weight"].float().numpy()) and before.dtype == np.float32
    assert store("model.norm.weight") is not before, "a store keeps nothing in memory"


def test_shards_context_and_extra_inputs(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2", tmp_path / "sharded", "f16", shard_bytes=60_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / INDEX).exists()
    module, store = trace_checkpoint(folder, inputs=("input_ids", "attention_mask"), context=64)
    roundtrip(module)
    assert module.properties["context"] == 64 and module["forward"].dims()[1].hi == 64
    assert module.properties["inputs"] == ("input_ids", "attention_mask")
    mask = np.ones((2, 12), np.int64)
    mask[0, 7:] = 0
    agree(module, store, reference(folder, "Qwen2ForCausalLM"), (2, 12), attention_mask=mask)


def test_names_are_found_with_and_without_the_base_model_prefix(tmp_path: Path) -> None:
    """A folder saved as GPT2Model, and one whose norms have the names of 2018, load into the full classes."""
    folder = make_checkpoint("gpt2", tmp_path / "gpt2")
    tensors = load_file(folder / WEIGHTS)
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, folder / WEIGHTS)
    module, store = trace_checkpoint(folder)
    assert "transformer.wte.weight" in store
    agree(module, store, reference(folder, "GPT2LMHeadModel"), (1, 5))

    folder = make_checkpoint("bert", tmp_path / "bert")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, former in old.items():
            name = name.replace(new, former)
        tensors["bert." + name] = tensor
    save_file(tensors, folder / WEIGHTS)
    module, store = trace_checkpoint(folder)
    agree(module, store, reference(folder, "BertModel"), (1, 5))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("linear", {"factor": 4.0}), ("dynamic", {"factor": 4.0}), ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32})],
)
def test_rope_scalings(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **extra}
    folder = make_checkpoint("llama", tmp_path / kind, num_hidden_layers=1, rope_parameters=rope)
    module, store = trace_checkpoint(folder)
    agree(module, store, reference(folder, "LlamaForCausalLM"), (1, 40))


def test_rope_scaling_that_depends_on_the_length_needs_a_limit(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32}  # fmt: skip
    folder = make_checkpoint(
        "phi3", tmp_path / "phi3", num_hidden_layers=1, rope_parameters=rope, original_max_position_embeddings=32
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="'longrope'.* at most 32"):
        trace_checkpoint(folder)
    module, store = trace_checkpoint(folder, context=32)
    agree(module, store, reference(folder, "Phi3ForCausalLM"), (1, 32))


def test_tracing_touches_no_weight_memory(tmp_path: Path) -> None:
    """A configuration of 38 GB in float32 is traced from headers alone."""
    config = transformers.LlamaConfig(
        vocab_size=256000, hidden_size=16384, intermediate_size=65536, num_hidden_layers=1, num_attention_heads=128,
        num_key_value_heads=8, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * int(np.prod(shape))]}
        end += 2 * int(np.prod(shape))
    text = json.dumps(header).encode()
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole on the disk
    before = memory()
    module, _ = trace_checkpoint(tmp_path)
    assert memory() - before < 300e6
    assert sum(t.elements for t in module.weights().values() if isinstance(t.elements, int)) > 7e9


def memory() -> float:
    """The largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not ...}))


def edit_generation(folder: Path, **changes: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def cut(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])


def replace_header(folder: Path, text: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def to_shards(folder: Path, drop: str | None = None, misplaced: bool = False) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, members in files.items():
        save_file({n: tensors[n] for n in members}, folder / file)
    places = {n: file for file, members in files.items() for n in members}
    if misplaced:
        places[names[0]] = "b.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    if drop:
        (folder / drop).unlink()


def to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder missing": (lambda f: shutil.rmtree(f), "does not exist"),
    "folder is a file": (to_file, "is a file"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "architecture is text": (lambda f: edit_config(f, architectures="LlamaForCausalLM"), "no 'architectures' entry, a list"),
    "no place for an answer": (lambda f: edit_config(f, max_position_embeddings=1), "max_position_embeddings = 1; at least 2"),
    "layers without end": (lambda f: edit_config(f, num_hidden_layers=10**9), "describes 1000000000 layers, but the files hold"),
    "end token is text": (lambda f: edit_generation(f, eos_token_id=[2, "x"]), "eos_token_id = \\[2, 'x'\\], which is no token id"),
    "end token of another model": (lambda f: edit_generation(f, eos_token_id=10**6), "names no end token of its vocabulary"),
    "tokenizer is empty": (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer.json cannot be read as a tokenizer"),
    "tokenizer is another JSON": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read as a tokenizer"),
    "tokenizer settings are a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "holds no JSON object"),
    "tokenizer settings are no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "cannot be read as JSON"),
    "template is a number": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": 3}'), "neither text nor a list of named texts",
    ),
    "header is deep": (lambda f: replace_header(f, b"[" * 100_000), "header of .* is damaged"),
    "header names infinity": (
        lambda f: replace_header(f, b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'), "header of .* damaged",
    ),
    "no architecture": (lambda f: edit_config(f, architectures=...), "no 'architectures' entry"),
    "unknown architecture": (lambda f: edit_config(f, architectures=["NoSuchForCausalLM"]), "'NoSuchForCausalLM'.* does not have"),
    "unknown model type": (lambda f: edit_config(f, model_type="no_such"), "no model that transformers knows"),
    "impossible config": (lambda f: edit_config(f, num_attention_heads=0), "config.json' describes|describes no"),
    "quantized by another": (lambda f: edit_config(f, quantization_config={"quant_method": "aqlm"}), "quantized by aqlm"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no model.safetensors"),
    "pickles only": (pickle_only, "save_pretrained"),
    "two files, no index": (lambda f: to_shards(f, drop=INDEX), "no model.safetensors.index.json"),
    "truncated data": (lambda f: cut(f, (f / WEIGHTS).stat().st_size - 100), "is truncated"),
    "truncated header": (lambda f: cut(f, 50), "truncated inside its header"),
    "empty file": (lambda f: cut(f, 0), "no safetensors file"),
    "header is no JSON": (lambda f: replace_header(f, b"{{{"), "header of .* is damaged"),
    "header lies": (
        lambda f: replace_header(f, b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'), "'x' of the shape \\(3,\\)",
    ),
    "shard absent": (lambda f: to_shards(f, drop="b.safetensors"), "lists the shard 'b.safetensors' with"),
    "tensor in another shard": (lambda f: to_shards(f, misplaced=True), "different checkpoints"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("x"), "safetensors index"),
    "tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop(Q_PROJ)), f"1 tensors are missing.*{Q_PROJ}"),
    "tensor too many": (lambda f: edit_tensors(f, lambda t: t.update(more=torch.zeros(2))), "1 tensors of the files.*more"),
    "wrong shape": (lambda f: edit_tensors(f, lambda t: t.update({Q_PROJ: torch.zeros(64, 32)})), "\\(64, 32\\).*\\(64, 64\\)"),
    "integer weights": (lambda f: edit_tensors(f, lambda t: t.update({Q_PROJ: torch.zeros(64, 64).char()})), "stored as i8"),
    "float8 weights": (
        lambda f: edit_tensors(f, lambda t: t.update({Q_PROJ: torch.zeros(64, 64).to(torch.float8_e4m3fn)})), "stored as F8_E4M3",
    ),
    "fewer layers in the config": (lambda f: edit_config(f, num_hidden_layers=1), "9 tensors of the files have no place"),
    "more layers in the config": (lambda f: edit_config(f, num_hidden_layers=3), "9 tensors are missing"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_folders_are_one_clear_error(name: str, broken: Path) -> None:
    damage, words = BREAKAGES[name]
    damage(broken)
    with pytest.raises(CheckpointError, match=words) as error:
        trace_checkpoint(broken)
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and 40 < len(text) < 700


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found_on_load(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((3, 5), 60000.0).to(dtype)  # large values of one sign are no overflow of the check
    save_file({"good": tensor.clone()}, tmp_path / "good.safetensors")
    tensor[1, 2] = value
    save_file({"layer.weight": tensor}, tmp_path / "bad.safetensors")
    good = read_header(tmp_path / "good.safetensors")["good"].load()
    assert good.shape == (3, 5) and np.isfinite(good).all()
    with pytest.raises(CheckpointError, match="'layer.weight' in .*NaN or infinite"):
        read_header(tmp_path / "bad.safetensors")["layer.weight"].load()


@pytest.mark.quick
def test_every_stored_type_is_read_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
             "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool}  # fmt: skip
    tensors = {n: (torch.randn(7, 3) * 50).to(d) for n, d in kinds.items()} | {"empty": torch.zeros(0, 4), "one": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "t.safetensors")
    entries = read_header(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        value = entries[name].load()
        assert entries[name].dtype == (name if name in kinds else "f32") and value.shape == tuple(tensor.shape)
        assert np.array_equal(value, (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())


def test_large_tensors_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stemma.frontend.safetensors._CHUNK", 1000)
    tensor = torch.randn(37, 61).bfloat16()
    save_file({"x": tensor}, tmp_path / "t.safetensors")
    entry = read_header(tmp_path / "t.safetensors")["x"]
    assert np.array_equal(entry.load(), tensor.float().numpy())
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="ended inside the tensor 'x'"):
        entry.load()


@pytest.mark.quick
def test_a_missing_tokenizer_is_a_note(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "generation_config.json").unlink()
    edit_config(broken, eos_token_id=None, bos_token_id=None)
    checkpoint: Checkpoint = load_checkpoint(broken)
    assert checkpoint.eos == () and checkpoint.bos is None
    assert len(checkpoint.notes) == 1 and "no tokenizer.json" in checkpoint.notes[0]
    edit_config(broken, eos_token_id=[4, 7])
    assert load_checkpoint(broken).eos == (4, 7)


def test_models_with_other_inputs_say_what_to_do(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'input_values'.*torch_export.trace"):
        trace_checkpoint(tmp_path)


@pytest.mark.quick
def test_a_first_token_of_another_model_is_left_out(broken: Path) -> None:
    edit_generation(broken, bos_token_id=10**6)
    checkpoint = load_checkpoint(broken)
    assert checkpoint.bos is None and "1000000 is none of the" in checkpoint.notes[0]


@pytest.mark.quick
@pytest.mark.parametrize("positions, expected", [(10**12, 1 << 30), (None, 1 << 30), (128, 128)])
def test_the_context_is_one_that_the_runtime_counts(broken: Path, positions: int | None, expected: int) -> None:
    """Artifacts of models without a limit, or with a huge one, load."""
    text = SimpleNamespace() if positions is None else SimpleNamespace(max_position_embeddings=positions)
    config = SimpleNamespace(get_text_config=lambda: text)
    assert replace(load_checkpoint(broken), config=config).context == expected


@pytest.mark.quick
def test_a_tokenizer_of_another_model_is_found(broken: Path) -> None:
    text = Calibration("def f(self): return self")
    with pytest.raises(StemmaError, match="tokenizer.json gives the token .*, but the model has 5 tokens"):
        text.documents(load_checkpoint(broken), 5, [])
