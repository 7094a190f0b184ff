"""Constraints on a compiled model: what comes out matches, and speculation changes nothing of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stemma
from stemma.compiler import compile
from stemma.runtime import InputError, StemmaRuntimeError

DRAFT = Path(__file__).parent.parent / "examples" / "models" / "draft"
CALL = r"[a-z_]+\((self|x)(, [a-z]+){0,2}\)"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
    "required": ["old"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stemma.Model]:
    path = tmp_path_factory.mktemp("constraint") / "draft.stemma"
    passes = ["speculate{draft=recycling+lookahead,budget=16}"]
    compile(DRAFT, path, programs=["generate", "constrained"], passes=passes, variants=["native"])
    with stemma.load(path) as loaded:
        yield loaded


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_answers_match_their_expression(model: stemma.Model, temperature: float) -> None:
    constraint = model.constraint(regex=CALL)
    whole = 0
    for seed in range(6):
        options: dict[str, Any] = {"max_new_tokens": 40, "temperature": temperature, "seed": seed, **constraint}
        plain = model.generate_ids("def ", program="constrained_plain", **options)
        assert model.generate_ids("def ", program="constrained", **options) == plain
        text = model.tokenizer.decode(plain)
        complete = plain[-1] in model.manifest.eos
        whole += complete
        assert not complete or re.fullmatch(CALL, text), text
    assert whole >= 1


def test_answers_follow_their_schema(model: stemma.Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 80, "temperature": 0.8, **model.constraint(json_schema=SCHEMA)}
    texts = []
    for seed in range(6):
        ids = model.generate_ids("record = ", program="constrained", seed=seed, **options)
        assert ids == model.generate_ids("record = ", program="constrained_plain", seed=seed, **options)
        if ids[-1] in model.manifest.eos:
            texts.append(model.tokenizer.decode(ids))
    assert texts
    for text in texts:
        assert isinstance(json.loads(text)["old"], bool)


def test_answers_are_among_the_choices(model: stemma.Model) -> None:
    choices = ["yes", "no", "maybe not"]
    for seed in range(5):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, **model.constraint(choices=choices)}
        assert model.generate("x = ", program="constrained", **options) in choices
    batch = model.generate(["x = ", "y = ", "z"], program="constrained", **model.constraint(choices=choices))
    assert set(batch) <= set(choices)


def test_wrong_constraints_are_explained(model: stemma.Model) -> None:
    for wrong, words in (
        ({"regex": "("}, "cannot be used"), ({"json_schema": "{"}, "JSON"), ({"choices": []}, "empty"), ({}, "one of"),
        ({"regex": "a", "choices": ["b"]}, "one of"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            model.constraint(**wrong)
    nothing = {"indptr": [0, 0], "tokens": [1], "targets": [0]}
    with pytest.raises((InputError, StemmaRuntimeError), match="admits no token"):
        model.generate("x", program="constrained", **nothing)
    assert model.generate("def ", max_new_tokens=4, program="generate")  # usable afterwards


@pytest.mark.parametrize(
    "constraint, message",
    [
        ({"choices": "yes"}, "choices='yes' must be a list"),
        ({"choices": 3}, "choices=3 must be a list"),
        ({"choices": ["yes", 3]}, "A choice is text or token ids, not int"),
        ({"choices": [[10**6]]}, "a token id=1000000 must be an integer from 0 to"),
        ({"regex": 3}, "regex=3 must be text"),
        ({"json_schema": {"const": object()}}, "is no JSON: Object of type object"),
        ({"json_schema": ""}, "The JSON schema '' cannot be used"),
    ],
)
def test_constraints_that_are_none(model: stemma.Model, constraint: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.constraint(**constraint)
