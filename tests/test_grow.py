"""Checkpoints that were made larger for measurements compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.grow import NEURONS, grow

TARGET = Path(__file__).resolve().parent.parent / "examples" / "models" / "target"


def test_a_grown_checkpoint_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    layers = grow(TARGET, tmp_path, 80)
    assert layers > 5
    tokens = torch.arange(100, 120)[None]
    logits = []
    for folder in (TARGET, tmp_path):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert model.config.num_hidden_layers == layers and model.config.intermediate_size == NEURONS
    assert torch.equal(*logits)
