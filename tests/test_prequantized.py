"""GPTQ and AWQ checkpoints: the same codes, scales and zero points, whatever the layout; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import stemma
from stemma.compiler import compile
from stemma.frontend.hf import load_checkpoint, trace_checkpoint
from stemma.frontend.prequantized import unpack_tensors
from stemma.frontend.safetensors import read_header
from stemma.ir import CheckpointError, UnsupportedError, interpret
from stemma.passes.base import PassContext
from stemma.passes.canonicalize import Canonicalize
from stemma.passes.quantize import Quantize
from tests.models import VOCABULARY, make_checkpoint
from tests.quantized_files import Written, awq_linear, gptq_linear, quantized_folder

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def packed(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The weight "x.weight" of a file, and the notes."""
    save_file({f"x.{n}": t.contiguous() for n, t in tensors.items()}, folder / "w.safetensors")
    found, notes = unpack_tensors(read_header(folder / "w.safetensors"), config, folder)
    assert set(found) == {"x.weight"}
    return found["x.weight"], notes


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([32, 64, 128, 96, 384]), outputs=st.sampled_from([32, 96, 160]),
    symmetric=st.booleans(), spread=st.booleans(), v2=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_gptq_values_are_exact(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    group: int,
    outputs: int,
    symmetric: bool,
    spread: bool,
    v2: bool,
    seed: int,
) -> None:
    """(q - z) * s in f32 to the bit, in whole and by rows; groups that kernels take, also the last one that is not full."""
    symmetric |= bits == 8
    rng = np.random.default_rng(seed)
    made = gptq_linear(rng, outputs, 384, bits, group, symmetric=symmetric, spread=spread, stored_offset=1 - v2)
    config = GPTQ | {"bits": bits, "sym": symmetric, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    weight, notes = packed(tmp_path_factory.mktemp("gptq"), config, made.tensors)
    assert not notes and weight.dtype.startswith(f"{'' if symmetric else 'u'}int{bits}_g")
    assert weight.dtype.endswith(f"g{next(g for g in (128, 64, 32) if group % g == 0 and 384 % group % g == 0)}")
    wanted = made.values if weight.order is None else made.values[:, weight.order]
    assert np.array_equal(weight.load().dequantize(), wanted)
    assert (weight.order is not None) == bool((np.diff(made.tensors["g_idx"].numpy()) < 0).any())
    for start, stop in ((0, 1), (5, 31), (outputs - 1, outputs), (7, 9)):
        assert np.array_equal(weight.rows()[start:stop].dequantize(), wanted[start:stop])


@settings(max_examples=8, deadline=None)
@given(group=st.sampled_from([32, 64, 128]), outputs=st.sampled_from([8, 40, 72]), seed=st.integers(0, 99))
def test_awq_values_are_exact(tmp_path_factory: pytest.TempPathFactory, group: int, outputs: int, seed: int) -> None:
    made = awq_linear(np.random.default_rng(seed), outputs, 256, group)
    weight, _ = packed(tmp_path_factory.mktemp("awq"), AWQ, made.tensors)
    assert weight.dtype == f"uint4_g{group}" and np.array_equal(weight.load().dequantize(), made.values)
    assert np.array_equal(weight.rows()[3:7].dequantize(), made.values[3:7])


def gptq(bits: int, group: int, **options: Any) -> Callable[[int, int], Written]:
    rng = np.random.default_rng(bits)
    return lambda outputs, columns: gptq_linear(rng, outputs, columns, bits, min(group, columns), **options)


CASES: dict[str, tuple[dict[str, Any], Callable[[int, int], Written], set[str]]] = {
    "gptq int8 whole rows": (GPTQ | {"bits": 8, "group_size": -1}, gptq(8, 1 << 20, symmetric=True), {"int8_g64", "int8_g128"}),
    "gptq v2 uint3": (
        GPTQ | {"bits": 3, "sym": False, "checkpoint_format": "gptq_v2"}, gptq(3, 64, symmetric=False, stored_offset=0),
        {"uint3_g64"},
    ),
    "gptq uint2, sorted": (
        GPTQ | {"bits": 2, "sym": False, "desc_act": True}, gptq(2, 32, symmetric=False, spread=True), {"uint2_g32"},
    ),
    "awq": (AWQ, lambda n, k: awq_linear(np.random.default_rng([n, k]), n, k, 32), {"uint4_g32"}),
}  # fmt: skip


def logits(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def distance(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", CASES)
def test_imported_model_equals_the_dequantized_one(name: str, tmp_path: Path) -> None:
    """By the reference semantics; Quantize finds nothing left to do in the projections."""
    config, linear, types = CASES[name]
    model = quantized_folder(tmp_path, config, linear)
    module, store = trace_checkpoint(tmp_path)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    assert distance(interpret(module["forward"], {"input_ids": ids}, store)["logits"], logits(model, ids)) < 1e-5
    plain = Canonicalize().run(module, PassContext(weights=store))
    projections = [
        n.inputs[1].dtype for n in plain["forward"].nodes if n.op.name == "linear" and n.inputs[1].shape[0] != VOCABULARY
    ]
    assert len(projections) == 7 and set(projections) == types
    again = Quantize(bits=8).run(plain, PassContext(weights=store))
    assert [n.inputs[1].dtype for n in again["forward"].nodes if n.op.name == "linear"] == [*projections, "int8"]


def test_sorted_columns_run_on_the_cpu(tmp_path: Path) -> None:
    """Exact is labelled identical, and q, k and v, whose columns are in one order, are one kernel."""
    rng = np.random.default_rng(1)
    orders: dict[int, int] = {}

    def linear(outputs: int, columns: int) -> Written:
        state = orders.setdefault(columns, int(rng.integers(1 << 30)))  # linears of one input have one order, as GPTQ makes them
        index = np.random.default_rng(state).permutation(np.arange(columns) // 32)
        made = gptq_linear(rng, outputs, columns, 4, 32, symmetric=True)
        moved = np.argsort(np.argsort(index, kind="stable"), kind="stable")  # the sorted column of each column
        codes = made.tensors["qweight"].numpy().view(np.uint32)
        spread = (codes[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & np.uint32(15)).reshape(columns, outputs)[moved]
        words = (spread.reshape(-1, 8, outputs) << np.arange(0, 32, 4, dtype=np.uint32)[:, None]).sum(1, dtype=np.uint32)
        tensors = made.tensors | {
            "qweight": torch.from_numpy(words.view(np.int32)),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return Written(tensors, made.values[:, moved])

    model = quantized_folder(tmp_path / "c", GPTQ | {"desc_act": True}, linear)
    report = compile(tmp_path / "c", tmp_path / "m.stemma", variants=("native",))
    assert {r.label for r in report.records} == {"identical"} and report.loss is None
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    assert distance(stemma.load(tmp_path / "m.stemma").forward(ids), logits(model, ids)) < 1e-5
    module, _ = trace_checkpoint(tmp_path / "c")
    takes = [n for n in module["forward"].nodes if n.op.name == "take"]
    assert len(takes) == 4, "one for q, k and v, one for the output, one for gate and up, one for down"


def test_zero_points_of_the_other_format_are_noticed(tmp_path: Path) -> None:
    """Symmetric weights tell which format their zero points are in, whatever the configuration says."""
    made = gptq_linear(np.random.default_rng(0), 32, 64, 4, 32, symmetric=True, stored_offset=0)
    weight, notes = packed(tmp_path, GPTQ, made.tensors)
    assert weight.dtype == "int4_g32" and np.array_equal(weight.load().dequantize(), made.values)
    assert len(notes) == 1 and "checkpoint format 'gptq'" in notes[0]


def test_dynamic_bits_and_biases_of_zeros(tmp_path: Path) -> None:
    """Bits come from the tensors; a bias of zeros where the model has none is left out, another one is an error."""
    rng = np.random.default_rng(0)
    widths = iter([4, 8, 4, 4, 4, 4, 4])
    quantized_folder(tmp_path, GPTQ, lambda n, k: gptq_linear(rng, n, k, next(widths), 32, symmetric=True))
    tensors = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.0.mlp.up_proj.bias"
    save_file(tensors | {bias: torch.zeros(128, dtype=torch.float16)}, tmp_path / "model.safetensors")
    module, _ = trace_checkpoint(tmp_path)
    assert {t.dtype for t in module.weights().values()} >= {"int4_g32", "int8_g32"} and bias not in module.weights()
    save_file(tensors | {bias: torch.ones(128, dtype=torch.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"no place \\({bias}\\)"):
        trace_checkpoint(tmp_path)


def edited(name: str, value: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"model.layers.0.mlp.up_proj.{name}"
        old = tensors.pop(key)
        if value is not None:
            tensors[key] = value(old).contiguous()

    return change


REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], None] | None, str]] = {
    "method": ({"quant_method": "aqlm"}, None, "quantized by aqlm, which is not read"),
    "bits": ({"bits": 5}, None, "bits=5"),
    "layout": ({"checkpoint_format": "marlin"}, None, "layout 'marlin'"),
    "awq layout": (AWQ | {"version": "gemv"}, None, "layout 'gemv'"),
    "no scales": ({}, edited("scales", None), "has no scales"),
    "no zero points": ({}, edited("qzeros", None), "has no qzeros"),
    "float codes": ({}, edited("qweight", lambda t: t.float()), "f32\\[8, 128\\]"),
    "too few codes": ({}, edited("qweight", lambda t: t[:-1]), "do not fit each other"),
    "group that is none": ({}, edited("g_idx", lambda t: t + 1), "names groups 1..2"),
    "scales of f32": ({}, edited("scales", lambda t: t.float() + 1e-7), "f16 cannot hold"),
    "infinite scales": ({}, edited("scales", lambda t: t * torch.inf), "not finite"),
    "another shape": ({}, edited("g_idx", lambda t: torch.cat([t, t])), "do not fit each other"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gptq") / "model"
    quantized_folder(made, GPTQ, gptq(4, 32, symmetric=True))
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_clear_error(name: str, folder: Path, tmp_path: Path) -> None:
    change, edit, words = REFUSED[name]
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ | change}))
    if edit:
        edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        checkpoint = load_checkpoint(tmp_path)
        checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].load()
    assert "\n" not in str(error.value) and 40 < len(str(error.value)) < 600


def test_layers_by_columns_are_refused(tmp_path: Path) -> None:
    """GPT-2's layers have their weights the other way round."""
    make_checkpoint("gpt2", tmp_path, n_layer=1)
    tensors = load_file(tmp_path / "model.safetensors")
    made = gptq_linear(np.random.default_rng(0), 192, 64, 4, 32, symmetric=True)
    del tensors["transformer.h.0.attn.c_attn.weight"]
    tensors |= {f"transformer.h.0.attn.c_attn.{n}": t.contiguous() for n, t in made.tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    with pytest.raises(UnsupportedError, match="c_attn.weight' .* by columns \\(Conv1D, as in GPT-2\\)"):
        trace_checkpoint(tmp_path)


def test_uneven_groups(tmp_path: Path) -> None:
    """Groups of 16 columns have no kernel."""
    made = gptq_linear(np.random.default_rng(0), 32, 64, 4, 16, symmetric=True)
    with pytest.raises(CheckpointError, match=r"groups of \[16\] columns, which no kernel takes"):
        packed(tmp_path, GPTQ, made.tensors)
    wide = gptq_linear(np.random.default_rng(0), 32, 64, 8, 32, symmetric=False)
    with pytest.raises(CheckpointError, match="8 bits and zero points that are not in the middle"):
        packed(tmp_path, GPTQ | {"bits": 8, "sym": False}, wide.tensors)
