"""What lossy decoding programs cost: their texts beside the plain ones, both judged by the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stemma.ir import Array
from stemma.passes.measure import log_softmax
from stemma.runtime import Model, load

TEMPERATURES = (0.0, 0.7, 1.0)
PROMPT, ANSWER, PROMPTS = 32, 64, 8  # tokens, tokens, prompts


def measure_programs(path: Path, documents: Sequence[Array]) -> dict[str, dict[str, Any]]:
    """For each lossy program of an artifact that has a plain twin, what `_loss` finds on the beginnings of the documents."""
    with load(path, huge_pages=False) as model:
        entries = model.manifest.raw["programs"]
        lossy = [n for n, spec in model.programs.items() if entries[n]["label"] == "lossy" and spec.plain]
        prompts = [[int(t) for t in d[:PROMPT]] for d in documents[:PROMPTS]]
        return {name: _loss(model, name, prompts) for name in lossy} if prompts else {}


def program_quality(loss: Mapping[str, Any] | None) -> str:
    """A program's loss in words."""
    if not loss:
        return "not measured"
    first = loss["first_divergence"]
    return (
        f"{loss['equal']:.0%} of {loss['answers']} answers equal plain ones, "
        + ("" if first is None else f"others from token {first} on, ")
        + f"perplexity of the answers {loss['perplexity_before']:.3f} -> {loss['perplexity_after']:.3f}"
    )


def _loss(model: Model, name: str, prompts: list[list[int]]) -> dict[str, Any]:
    """answers: how many were compared, at TEMPERATURES; equal: the share that is the same; first_divergence: the median place of
    the first differing token in others; perplexity_before, perplexity_after: of plain and lossy answers, by the model's logits."""
    spec = model.programs[name]
    equal, places = 0, []
    surprise: dict[str, list[float]] = {name: [], str(spec.plain): []}
    temperatures = TEMPERATURES if spec.option("temperature") else (None,)
    for temperature in temperatures:
        options = {"max_new_tokens": ANSWER, "ignore_eos": True, "seed": 1, "temperature": temperature}
        given = {k: v for k, v in options.items() if v is not None and spec.option(k) is not None}
        texts = {program: model.generate_ids(prompts, program=program, **given) for program in surprise}
        for program, answers in texts.items():
            surprise[program] += [_surprise(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        for lossy, plain in zip(texts[name], texts[str(spec.plain)], strict=True):
            equal += lossy == plain
            differing = [i for i, (a, b) in enumerate(zip(lossy, plain)) if a != b]
            places += differing[:1]
    count = len(prompts) * len(temperatures)
    return {
        "answers": count, "equal": equal / count, "first_divergence": int(np.median(places)) if places else None,
        "perplexity_before": float(np.exp(np.mean(surprise[str(spec.plain)]))),
        "perplexity_after": float(np.exp(np.mean(surprise[name]))),
    }  # fmt: skip


def _surprise(model: Model, prompt: list[int], answer: list[int]) -> float:
    """Mean negative log-probability (nats) of the answer's tokens."""
    logits = model.forward([[*prompt, *answer[:-1]]])[0, len(prompt) - 1 :].astype(np.float64)
    return float(-np.mean(log_softmax(logits)[np.arange(len(answer)), answer]))
