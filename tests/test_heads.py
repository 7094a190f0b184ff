"""The bundled Medusa and Hydra heads: their files, the script that made them, what they were trained on."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stemma.ir import Array

pytestmark = pytest.mark.quick
EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = EXAMPLES / "models" / "heads"
HEADS, WIDTH = 4, 256
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "medusa": {
        f"medusa.{i}.{part}": shape for i in range(HEADS) for part, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    },
    "hydra": {
        f"hydra.{i}.{part}": shape
        for i in range(HEADS)
        for part, shape in (
            ("in.weight", (WIDTH, WIDTH * (i + 2))),
            ("in.bias", (WIDTH,)),
            ("block.weight", (WIDTH, WIDTH)),
            ("block.bias", (WIDTH,)),
        )
    },
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/train_heads.py, which imports its neighbour train_bundled.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_heads")


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def medusa(w: dict[str, Array], i: int, h: Array, path: Array) -> Array:
    return h + silu(w[f"medusa.{i}.weight"] @ h + w[f"medusa.{i}.bias"])


def hydra(w: dict[str, Array], i: int, h: Array, path: Array) -> Array:
    x = np.concatenate([h, *path[: i + 1]])
    y = h + silu(w[f"hydra.{i}.in.weight"] @ x + w[f"hydra.{i}.in.bias"])
    return y + silu(w[f"hydra.{i}.block.weight"] @ y + w[f"hydra.{i}.block.bias"])


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_files(kind: str) -> None:
    """Tensors as documented, in bfloat16, finite and trained, in a small file that says what it is."""
    path = FOLDER / f"{kind}.safetensors"
    assert path.stat().st_size < 3_000_000
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == f"{kind} heads={HEADS}"
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES[kind]
    for tensor in tensors.values():
        assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all() and tensor.any()


@pytest.mark.parametrize("kind, forward", [("medusa", medusa), ("hydra", hydra)])
def test_the_script_computes_what_the_card_says(kind: str, forward: Callable[..., Array], script: Any) -> None:
    """The torch module agrees with the formula in numpy, on a hidden vector and a path of embeddings."""
    module = script.load_heads(kind, FOLDER)
    weights = {name: tensor.double().numpy() for name, tensor in load_file(FOLDER / f"{kind}.safetensors").items()}
    random = np.random.default_rng(0)
    hidden, path = 2.0 * random.standard_normal(WIDTH), 0.1 * random.standard_normal((HEADS, WIDTH))
    result = module(torch.from_numpy(hidden).float(), torch.from_numpy(path).float()).numpy()
    for i in range(HEADS):
        np.testing.assert_allclose(result[i], forward(weights, i, hidden, path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_head_reads_only_the_path_it_may(kind: str, script: Any) -> None:
    """Head i of Hydra changes with t_1..t_i and nothing later; Medusa's with none."""
    module = script.load_heads(kind, FOLDER)
    hidden, path = torch.ones(WIDTH), torch.zeros(HEADS, WIDTH)
    before = module(hidden, path)
    for place in range(HEADS):
        other = path.clone()
        other[place] = 0.5
        changed = (module(hidden, other) != before).any(-1).tolist()
        assert changed == [kind == "hydra" and i >= place for i in range(HEADS)]


def test_folding_the_scale_keeps_the_function(script: Any) -> None:
    """What Hydra computes on enlarged embeddings in training is what the stored weights compute on the embeddings."""
    module = script.load_heads("hydra", FOLDER)
    hidden, path = torch.ones(WIDTH), torch.full((HEADS, WIDTH), 0.1)
    module.path_scale = 4.0
    before = module(hidden, path)
    module.fold()
    torch.testing.assert_close(module(hidden, path), before, rtol=1e-4, atol=1e-4)


def test_drafting_lines_up_with_the_text(script: Any) -> None:
    """draft() gives head i the tokens that follow its place, in order, and the hidden state of that place."""
    embedding, ids = torch.eye(WIDTH), torch.arange(10)[None]

    def heads(hidden: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        assert torch.equal(hidden[0, :, 0], torch.arange(6.0))
        assert torch.equal(path[0].argmax(-1), torch.arange(6)[:, None] + 1 + torch.arange(HEADS))
        return torch.zeros(HEADS, 1, 6, WIDTH)

    assert script.draft(heads, embedding, torch.arange(10.0)[None, :, None].expand(1, 10, WIDTH), ids).shape == (HEADS, 1, 6, WIDTH)


def test_held_out_files_are_not_trained_on(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training texts, which the prompts of the generated ones come from too, have no held-out file nor its test module."""
    held_out = importlib.import_module("train_bundled").HELD_OUT
    root = Path(sysconfig.get_paths()["stdlib"])
    given: list[str] = []

    def tokenize(texts: list[str]) -> list[torch.Tensor]:
        given.extend(texts)
        return [torch.tensor([1])]

    monkeypatch.setattr(script, "tokenize", tokenize)
    assert set(script.training_tokens()) == {"library", "tests"}
    assert len(given) > 100
    unseen = [root / name for name in held_out]
    unseen += [path for name in held_out for path in root.rglob(f"test_{name}")]
    assert len(unseen) >= len(held_out)
    assert not {path.read_text("utf-8") for path in unseen} & set(given)
