"""Whole models: from a checkpoint folder to native logits, compared with transformers in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

import stemma
from stemma.codegen.build import build
from stemma.frontend.torch_export import trace
from stemma.ir import dim, size
from stemma.passes.base import PassContext
from stemma.passes.manager import run_pipeline
from stemma.passes.pipelines import pipeline
from tests.conftest import Artifacts
from tests.models import ARCHITECTURES, CAUSAL, START, VOCABULARY

TOLERANCE = 1e-5  # relative L2; both sides round to f32 at every operation, which leaves about 1e-6
SHAPES = [(1, 1), (2, 3), (1, 9), (3, 17), (1, 40), (2, 120)]  # batch, tokens: around the window of 8, past the rows of one call
ROWS = 16
NEW_TOKENS = 64


def reference(folder: Path) -> Any:
    """The model as transformers loads it, in float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_pretrained(folder, dtype=torch.float32).eval()


def distance(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative L2."""
    assert got.shape == wanted.shape and np.isfinite(got).all()
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def token_ids(batch: int, tokens: int) -> NDArray[np.int64]:
    return np.random.default_rng([batch, tokens]).integers(0, VOCABULARY, (batch, tokens))


def check_logits(model: stemma.Model, wanted: Any) -> None:
    for shape in SHAPES:
        ids = token_ids(*shape)
        with torch.no_grad():
            logits = wanted(torch.from_numpy(ids)).logits.numpy()
        assert distance(model.forward(ids), logits) <= TOLERANCE, shape


def check_greedy(model: stemma.Model, wanted: Any, prompts: list[list[int]]) -> None:
    """The same 64 tokens, the prompts together in one batch; transformers gets them one by one, without padding."""
    wanted.generation_config.eos_token_id = None  # random weights may choose it any time
    got = model.generate_ids(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for prompt, ids in zip(prompts, got, strict=True):
        inputs = torch.tensor([prompt])
        full = wanted.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert ids == full[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", CAUSAL)
def test_language_models(artifacts: Artifacts, architecture: str) -> None:
    """Logits at several lengths and batch sizes, and greedy tokens, from one artifact whose calls take at most 16 rows."""
    folder = artifacts.checkpoint(architecture)
    with stemma.load(artifacts.compiled(folder, rows=ROWS)) as model:
        assert model.kind == "causal_lm" and (model.context, model.vocab) == (128, VOCABULARY)
        wanted = reference(folder)
        check_logits(model, wanted)
        check_greedy(model, wanted, [[START], token_ids(1, 5)[0].tolist(), token_ids(1, 30)[0].tolist()])


def test_a_folder_of_bf16_shards_with_tied_weights(artifacts: Artifacts) -> None:
    """Stored bfloat16 is used as stored: products in f32 of exactly those values. Long prompts are one call here."""
    folder = artifacts.checkpoint("llama", "bf16", shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    with stemma.load(artifacts.compiled(folder)) as model:
        tensors = {t["name"]: t for t in model.manifest.raw["weights"]["tensors"]}
        assert {t["dtype"] for t in tensors.values()} >= {"bf16"}
        assert sum(t["shape"] == [VOCABULARY, 64] for t in tensors.values()) == 1  # embedding and head share one weight
        wanted = reference(folder)
        check_logits(model, wanted)
        check_greedy(model, wanted, [[START], token_ids(1, 50)[0].tolist()])


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in CAUSAL])
def test_other_models(artifacts: Artifacts, architecture: str) -> None:
    """Every output, by the name that transformers gives it."""
    folder = artifacts.checkpoint(architecture)
    wanted = reference(folder)
    with stemma.load(artifacts.compiled(folder)) as model:
        assert model.kind == "model"
        for batch, tokens in SHAPES:
            if architecture == "vit":
                name = "pixel_values"
                given: NDArray[Any] = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32)).astype(np.float32)
            else:
                name, given = "input_ids", token_ids(batch, tokens)
            with torch.no_grad():
                outputs = {k: v.numpy() for k, v in wanted(**{name: torch.from_numpy(given)}).items()}
            got = model.forward(**{name: given})
            assert got.keys() == outputs.keys()
            for key, value in outputs.items():
                assert distance(got[key], value) <= TOLERANCE, (key, batch, tokens)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(24)
        self.up, self.down = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """x [batch, tokens, 24] and scale [batch] -> y [batch, tokens, 24], mean [batch, 24], largest [batch, tokens]"""
        y = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))) * scale[:, None, None]
        return {"y": y, "mean": y.mean(1), "largest": y.argmax(-1)}


class ConvNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.second = torch.nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False)
        self.head = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 3, height, width] -> [batch, 5]"""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.nn.functional.silu(self.second(x))
        return torch.softmax(self.head(x.mean((2, 3))), -1)


BATCH, TOKENS, SIDE = dim("batch", 1, 64), dim("tokens", 1, 512), dim("side", 5, 64)
Inputs = Callable[[int], dict[str, torch.Tensor]]
PLAIN: dict[str, tuple[type[torch.nn.Module], dict[str, dict[int, size.Size]], Inputs]] = {
    "mlp": (
        Mlp,
        {"x": {0: BATCH, 1: TOKENS}, "scale": {0: BATCH}},
        lambda n: {"x": torch.randn(n, 3 * n + 1, 24), "scale": torch.rand(n)},
    ),
    "convnet": (ConvNet, {"x": {0: BATCH, 2: SIDE, 3: SIDE}}, lambda n: {"x": torch.randn(n, 3, 5 + n, 5 + n)}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_any_torch_module(tmp_path: Path, name: str) -> None:
    """A module of the user's own, through tracing, the pipeline for other models, and the file."""
    cls, dims, inputs = PLAIN[name]
    torch.manual_seed(0)
    module = cls().eval()
    if isinstance(module, ConvNet):
        module.norm.running_mean.normal_()  # type: ignore[union-attr]
        module.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    traced, weights = trace(module, (), inputs(3), dims=dims, properties={"kind": "model", "name": name})
    final = run_pipeline(traced, pipeline("exact", (), causal=False, rows=1), PassContext(weights=weights)).module
    build(final, weights, tmp_path / "model.stemma", variants=("native",))
    with stemma.load(tmp_path / "model.stemma") as model:
        for n in (1, 2, 7, 20):
            given = inputs(n)
            with torch.no_grad():
                result = module(**given)
            wanted = result if isinstance(result, dict) else {"output": result}
            got = model.forward(**{k: v.numpy() for k, v in given.items()})
            assert got.keys() == wanted.keys()
            for key, value in wanted.items():
                if value.is_floating_point():
                    assert distance(got[key], value.numpy()) <= TOLERANCE, (key, n)
                else:
                    np.testing.assert_array_equal(got[key], value.numpy())
