"""Lossy programs are measured against their plain twins, and the artifact says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stemma
from stemma.compiler import compile
from stemma.program_loss import ANSWER, PROMPT, _surprise, program_quality
from tests.commands import succeeded

TARGET = Path(__file__).parent.parent / "examples" / "models" / "target"


@pytest.mark.parametrize("verify", ["typical", "reflective"])
def test_lossy_verifiers_are_measured(tmp_path: Path, verify: str) -> None:
    path = tmp_path / "lossy.stemma"
    report = compile(
        TARGET, path, passes=[f"speculate{{draft=recycling,verify={verify},shape=fixed,budget=16}}"], variants=["native"]
    )  # fmt: skip
    with stemma.load(path) as model:
        assert model.check() > 0  # the amended artifact has its hashes
        loss = model.manifest.raw["programs"]["generate"]["loss"]
        assert "loss" not in model.manifest.raw["programs"]["generate_plain"]
        assert loss["answers"] == 24 and 0 <= loss["equal"] < 1 and 0 <= loss["first_divergence"] < ANSWER
        assert any(program_quality(loss) in note for note in report.notes)
        shown = " ".join(succeeded("inspect", path).split())
        assert f"lossy: {loss['equal']:.0%} of 24 answers" in shown and verify in shown
        prompt, answer = list(range(5, 5 + PROMPT)), list(range(40, 50))
        logp = 0.0
        for i, token in enumerate(answer):
            row = model.forward([[*prompt, *answer[:i]]])[0, -1].astype(np.float64)
            logp += row[token] - np.log(np.exp(row).sum())
        assert abs(_surprise(model, prompt, answer) + logp / len(answer)) < 1e-4
