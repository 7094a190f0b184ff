"""Lossy programs are measured against their plain twins, and the artifact says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import stemma
from stemma.compiler import compile
from stemma.program_loss import ANSWER, PROMPT, _surprise, program_quality

TARGET = Path(__file__).parent.parent / "examples" / "models" / "target"


def test_typical_acceptance_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "lossy.stemma"
    report = compile(TARGET, path, passes=["speculate{draft=recycling,verify=typical,shape=fixed,budget=16}"], variants=["native"])
    with stemma.load(path) as model:
        assert model.check() > 0  # the amended artifact has its hashes
        loss = model.manifest.raw["programs"]["generate"]["loss"]
        assert "loss" not in model.manifest.raw["programs"]["generate_plain"]
        assert loss["answers"] == 24 and 0 <= loss["equal"] < 1 and 0 <= loss["first_divergence"] < ANSWER
        assert any(program_quality(loss) in note for note in report.notes)
        prompt, answer = list(range(5, 5 + PROMPT)), list(range(40, 50))
        logp = 0.0
        for i, token in enumerate(answer):
            row = model.forward([[*prompt, *answer[:i]]])[0, -1].astype(np.float64)
            logp += row[token] - np.log(np.exp(row).sum())
        assert abs(_surprise(model, prompt, answer) + logp / len(answer)) < 1e-4
