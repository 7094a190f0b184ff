"""Programs of the library on a compiled model: the machine gives what the reference interpreter gives, greedy and sampled.

The reference's model is the compiled step itself, whose bits do not depend on what runs with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stemma
from stemma import program as p
from stemma.ir import World, interpret
from stemma.ir.ops.program import OutputValue, ReferenceModel
from stemma.runtime import Model
from tests.conftest import Artifacts

PROMPT = [5, 9, 30, 2, 9, 30]
SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}]
ELSEWHERE = {"superposed", "constrained", "constrained_beam"}  # a step that mixes tokens; automata


def of_each(texts: Any, *_: Any) -> Any:
    """A number for each row of tokens."""
    return np.asarray(texts).sum(1) % 5


HOST = {"answer": of_each, "score": lambda *a: of_each(*a).astype(np.float32), "reward": lambda *a: of_each(*a).astype(np.float32)}


@pytest.fixture(scope="module")
def model(artifacts: Artifacts) -> Iterator[Model]:
    with stemma.load(artifacts.compiled(artifacts.checkpoint("llama")), threads=2) as loaded:
        yield loaded


def others(name: str) -> list[str] | None:
    """Names of the arrays that a program takes besides its prompt; None when it needs another model."""
    try:
        traced = p.trace(p.PROGRAMS[name], {"model": p.ModelSpec(100, 0, (1,), 128)})
    except p.TraceError:
        return None
    names = [q.attrs["name"] for q in traced.function.params]
    return [n for n in names if n not in ("prompt", "output") and n not in traced.defaults]


ALONE = [name for name in p.PROGRAMS if others(name) is not None and name not in ELSEWHERE]


def test_most_programs_are_run_here() -> None:
    assert {"generate", "beam_search", "best_of_n", "contrastive_search", "step_beam"} <= set(ALONE)


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ALONE)
def test_the_machine_gives_what_the_reference_gives(model: Model, name: str, settings: dict[str, Any]) -> None:
    program = p.PROGRAMS[name]
    (listed,) = (m for m in model.manifest.raw["models"] if m["name"] == "model")
    spec = p.ModelSpec(model.vocab, listed["width"], tuple(listed["eos"]), model.context)
    traced = p.trace(program, {"model": spec})
    names = {q.attrs["name"] for q in traced.function.params}
    options = {n: v for n, v in {"max_new_tokens": 12, **settings}.items() if n in names}
    options |= {row: [7, 9] for row in others(name) or ()}
    reference = ReferenceModel(lambda t: (model.forward([list(t)])[0, -1], np.zeros(0, np.float32)), model.vocab)
    inputs = {**traced.defaults, **options, "prompt": PROMPT, "output": OutputValue()}
    wanted = interpret(traced.function, inputs, float_type=np.float32, world=World({"model": reference}, HOST))
    found = model.run(program, PROMPT, host=HOST, **options)
    assert found.tokens == list(wanted["output"].tokens) and found.tokens
    for key, value in found.results.items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-5, err_msg=key)
    model.run("generate", PROMPT, max_new_tokens=3)  # other machines of the model are not disturbed
    assert model.run(program, PROMPT, host=HOST, **options).tokens == found.tokens
