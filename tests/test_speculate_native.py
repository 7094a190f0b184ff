"""Speculation on the native machine: the bundled target gives the tokens of plain decoding, whatever drafts for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stemma
from stemma.codegen.program import Listed, attach
from stemma.compiler import compile
from stemma.ir import Module
from stemma.ir.trace import ModelSpec, TracedProgram, trace
from stemma.passes.base import ModelInfo, PassContext
from stemma.passes.registry import make_pass
from stemma.passes.speculate import Speculate
from stemma.program import generate
from stemma.sources import Source

pytestmark = pytest.mark.slow
MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"
HEADS = MODELS / "heads"
DRAFTERS = (
    "recycling", "lookahead", "stand", "prompt_lookup", "medusa", "hydra", "early_exit", "sparse", "draft_model",
    "draft_model{shape=chain,length=4}", "draft_model{shape=tree}", "draft_model{exact=true}", "draft_model{shape=rsd,width=2}",
    "draft_model{shape=beam,width=4}", "recycling+stand+draft_model{shape=chain}",
)  # fmt: skip
PROMPTS = (
    "def add(a, b):\n    return", "import os\n\n\ndef read(path):\n", "class Stack:\n    def __init__(self):\n", "x",
    "for i in range(10):",
    "# Sort a list of numbers\ndef sort(", "try:\n    value = int(text)\nexcept ", '"""Tools for dates."""\nimport datetime\n',
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stemma.Model]:
    """The bundled target with everything that drafters need."""
    path = tmp_path_factory.mktemp("speculation") / "all.stemma"
    draft = f"recycling+draft_model+medusa{{folder={HEADS}}}+hydra{{folder={HEADS}}}+early_exit+sparse"
    step = make_pass(f'speculate{{draft="{draft}"}}')
    compile(
        MODELS / "target", path, passes=(step,), variants=("native",), models=(Source("draft", MODELS / "draft"),)
    )  # fmt: skip
    with stemma.load(path) as loaded:
        yield loaded


def speculated(model: stemma.Model, **options: Any) -> TracedProgram:
    """The library's `generate`, speculated for an artifact."""
    models = {m["name"]: ModelInfo(m["vocab"], m["width"], m["context"], tuple(m["eos"])) for m in model.manifest.raw["models"]}
    plain = trace(generate, {name: ModelSpec(i.vocab, i.width, i.eos, i.context) for name, i in models.items()})
    module = attach(Module([], {}), [Listed(plain.function, plain.defaults)])
    return TracedProgram(
        Speculate(**options).run(module, PassContext(models=models, source=MODELS / "target"))["generate"], plain.defaults
    )


@pytest.mark.parametrize("shape", ["measured", "fixed"])
@pytest.mark.parametrize("draft", DRAFTERS)
def test_tokens_are_those_of_plain_decoding(model: stemma.Model, draft: str, shape: Any) -> None:
    program = speculated(model, draft=draft, budget=24, shape=shape)
    for seed, temperature in enumerate((0.0, 0.7, 1.0)):
        options = {"max_new_tokens": 40, "temperature": temperature, "seed": seed, "ignore_eos": seed == 2}
        for prompt in PROMPTS[seed::2]:
            plain = model.generate_ids(prompt, program="generate_plain", **options)
            assert model.generate_ids(prompt, program=program, **options) == plain
    assert model.last_statistics.trees > 0


def test_together_as_alone(model: stemma.Model) -> None:
    """Requests that are decoded together share calls of the model and nothing else."""
    options = {"max_new_tokens": 32, "temperature": 0.8, "sequence": list(range(len(PROMPTS)))}
    plain = model.generate_ids(PROMPTS, program="generate_plain", **options)
    assert model.generate_ids(PROMPTS, **options) == plain
    assert model.generate_ids(PROMPTS, batch_size=3, **options) == plain
    program = speculated(model, draft="recycling+draft_model", budget=16, shape="fixed")
    assert model.generate_ids(PROMPTS, program=program, **options) == plain


def test_filters_and_penalties_go_along(model: stemma.Model) -> None:
    program = speculated(model, draft="draft_model", budget=16)
    options: dict[str, Any]
    for options in ({"top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.2, "presence_penalty": 0.3}, {"min_p": 0.05}):
        for temperature in (0.0, 0.9):
            given = {"max_new_tokens": 40, "temperature": temperature, **options}
            plain = model.generate_ids(PROMPTS[1], program="generate_plain", **given)
            assert model.generate_ids(PROMPTS[1], program=program, **given) == plain


def test_good_guesses_are_accepted(model: stemma.Model) -> None:
    """A sampled text too: the draft model draws with the target's noise."""
    program = speculated(model, draft="draft_model{shape=chain,length=4}", budget=5, shape="fixed")
    for temperature in (0.0, 0.8):
        model.generate_ids(PROMPTS[0], program=program, max_new_tokens=100, temperature=temperature, ignore_eos=True)
        assert model.last_statistics.followed_per_tree > 2


def test_a_tree_at_the_end_of_the_context(model: stemma.Model) -> None:
    """Nodes beyond the context are not run, and decoding ends where plain decoding does."""
    program = speculated(model, draft="recycling", budget=24, shape="fixed")
    ids = (model.tokenizer.encode(PROMPTS[2]) * model.context)[: model.context - 9]
    with pytest.warns(UserWarning, match="context"):
        plain = model.generate_ids(ids, program="generate_plain", max_new_tokens=50, ignore_eos=True)
    with pytest.warns(UserWarning, match="context"):
        assert model.generate_ids(ids, program=program, max_new_tokens=50, ignore_eos=True) == plain


@pytest.mark.parametrize("verify", ["recursive", "typical"])
def test_other_verifiers_run(model: stemma.Model, verify: Any) -> None:
    """The same at temperature 0; sampled texts of the length that was asked for."""
    for draft in ("recycling", "draft_model{shape=beam,width=4}", "stand+recycling"):
        program = speculated(model, draft=draft, budget=16, verify=verify)
        plain = model.generate_ids(PROMPTS[3], program="generate_plain", max_new_tokens=30, ignore_eos=True)
        assert model.generate_ids(PROMPTS[3], program=program, max_new_tokens=30, ignore_eos=True) == plain
        sampled = model.generate_ids(PROMPTS[3], program=program, max_new_tokens=30, temperature=1.0, ignore_eos=True)
        assert len(sampled) == 30


@pytest.mark.parametrize("shape", ["measured", "fixed"])
@pytest.mark.parametrize("draft", ["recycling", "draft_model{shape=chain}", "prompt_lookup+recycling"])
def test_a_second_look_without_weight_changes_nothing(model: stemma.Model, draft: str, shape: Any) -> None:
    """alpha 0 gives the tokens of plain decoding to every prompt; another alpha gives others, of the length that was asked for."""
    plain, fast, lossy = [], [], []
    programs = [speculated(model, draft=draft, verify="reflective", alpha=alpha, budget=20, shape=shape) for alpha in (0.0, 0.5)]
    for temperature in (0.0, 0.7):
        options = {"max_new_tokens": 40, "temperature": temperature, "seed": 3, "ignore_eos": True}
        plain += [model.generate_ids(prompt, program="generate_plain", **options) for prompt in PROMPTS]
        fast += [model.generate_ids(prompt, program=programs[0], **options) for prompt in PROMPTS]
        assert model.generate_ids(PROMPTS, program=programs[0], **options) == fast[-len(PROMPTS) :]
        lossy += [model.generate_ids(prompt, program=programs[1], **options) for prompt in PROMPTS]
    assert fast == plain and all(len(text) == 40 for text in lossy)
    assert lossy != plain or shape == "measured"  # which drafts nothing while that does not pay
