"""Every program of the library on compiled models: the machine gives the tokens that the reference interpreter gives.

The reference's logits are those of the compiled step itself, whose bits do not depend on what runs with it; hidden states and mixed
embeddings, which it does not show, are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import stemma
from stemma import program as p
from stemma.ir import World, interpret
from stemma.ir.ops.program import OutputValue, ReferenceModel
from stemma.runtime import Model
from tests.conftest import Artifacts

BUNDLED = Path(__file__).parent.parent / "examples" / "models" / "draft"
PROMPT = [5, 9, 30, 2, 9, 30]
SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3, "sequence": 1, "ignore_eos": True}]


def quality(tokens: Any, *_: Any) -> Any:
    """A number for each row of tokens that depends on all of them."""
    return np.array([(sum((i + 1) * int(t) for i, t in enumerate(row) if t >= 0) % 17) / 4 for row in tokens], np.float32)


HOST: dict[str, Callable[..., Any]] = {
    "answer": lambda tokens: (quality(tokens) % 3 - 1).astype(np.int32), "reward": quality, "score": quality,
    "ngrams": lambda texts, tokens: ((texts.sum(1, keepdims=True) + tokens) % 5 / -2.0).astype(np.float32),
}  # fmt: skip
ALLOWED = np.arange(20, 90, dtype=np.int32)  # an automaton that allows these tokens again and again
ROWS: dict[str, Any] = {
    "newlines": [7, 9, 30], "stops": [2, 40, 41], "ends": [2, 40, 41],
    "indptr": np.array([0, ALLOWED.size], np.int32), "tokens": ALLOWED,
    "targets": np.zeros(ALLOWED.size, np.int32),
}  # fmt: skip


class Compiled:
    """An artifact of two models, whose step gives hidden states and takes mixed embeddings, and both as reference models."""

    def __init__(self, artifacts: Artifacts, main: Path, other: Path) -> None:
        options: dict[str, Any] = {"models": {"draft": other}, "programs": ("generate", "contrastive_search", "superposed")}
        self.model = stemma.load(artifacts.compiled(main, **options), threads=2)
        self.other = self.model if other == main else stemma.load(artifacts.compiled(other), threads=2)
        self.specs = {
            m["name"]: p.ModelSpec(m["vocab"], m["width"], tuple(m["eos"]), m["context"]) for m in self.model.manifest.raw["models"]
        }
        self.references = {
            name: reference(model, folder, self.specs[name])
            for name, model, folder in (("model", self.model, main), ("draft", self.other, other))
        }

    def close(self) -> None:
        self.model.close()
        self.other.close()


def reference(model: Model, folder: Path, spec: p.ModelSpec) -> ReferenceModel:
    original: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    original.eval()

    def compute(tokens: tuple[Any, ...]) -> tuple[Any, Any]:
        mixed = [t if isinstance(t, tuple) else ((t, 1.0),) for t in tokens]
        plain = all(not isinstance(t, tuple) for t in tokens)
        logits, hidden = None, np.zeros(spec.width, np.float32)
        if not plain or spec.width:
            with torch.no_grad():
                table = original.get_input_embeddings()
                embedded = torch.stack([sum(table(torch.tensor(t)) * w for t, w in row) for row in mixed])
                given = original(inputs_embeds=embedded[None], output_hidden_states=True)
            logits = given.logits[0, -1].numpy()
            hidden = given.hidden_states[-1][0, -1].numpy()[: spec.width]
        return (model.forward([list(tokens)])[0, -1] if plain else logits), hidden

    return ReferenceModel(compute, spec.vocab, spec.width)


@pytest.fixture(scope="module", params=["random", "bundled"])
def compiled(request: Any, artifacts: Artifacts) -> Iterator[Compiled]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if request.param == "bundled":
        made = Compiled(artifacts, BUNDLED, BUNDLED)
    else:
        made = Compiled(artifacts, artifacts.checkpoint("llama"), artifacts.checkpoint("llama", seed=1))
    yield made
    made.close()
    torch.set_num_threads(before)


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", p.PROGRAMS)
def test_the_machine_gives_what_the_reference_gives(compiled: Compiled, name: str, settings: dict[str, Any]) -> None:
    traced = p.trace(p.PROGRAMS[name], compiled.specs)
    names = {q.attrs["name"] for q in traced.function.params}
    options = {n: v for n, v in {"max_new_tokens": 12, "span": 5, "expansions": 4, **ROWS, **settings}.items() if n in names}
    inputs = {**traced.defaults, **options, "prompt": PROMPT, "output": OutputValue()}
    wanted = interpret(traced.function, inputs, float_type=np.float32, world=World(compiled.references, HOST))
    found = compiled.model.run(p.PROGRAMS[name], PROMPT, host=HOST, **options)
    assert found.tokens == list(wanted["output"].tokens) and found.tokens
    assert found.results.keys() == wanted.keys() - {"output"}
    for key, value in found.results.items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-4, atol=1e-4, err_msg=key)
    compiled.model.run("generate", PROMPT, max_new_tokens=3)  # what runs between changes nothing
    assert compiled.model.run(p.PROGRAMS[name], PROMPT, host=HOST, **options).tokens == found.tokens
