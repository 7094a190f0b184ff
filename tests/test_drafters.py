"""Drafters: how they are named, the shapes of their trees, other vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stemma.frontend.programs.generate import generate
from stemma.ir import PassError, World
from stemma.ir.ops.program import ReferenceModel
from stemma.passes import ModelInfo, PassContext
from stemma.passes.drafters import all_drafters, make_drafters
from stemma.passes.drafters.shapes import RECYCLING, likeliest, published
from stemma.passes.speculate import Speculate
from tests.speculation import VOCAB, accepted_length, models, run, same, speculated, traced

pytestmark = pytest.mark.quick


def test_drafters_by_name(tmp_path: Path) -> None:
    assert set(all_drafters()) >= {
        "draft_model", "early_exit", "hydra", "lookahead", "medusa", "prompt_lookup", "recycling", "sparse", "stand",
    }  # fmt: skip
    first, second = make_drafters("recycling + draft_model{shape=chain, length=3}")
    assert first.written() == "recycling" and second.written() == "draft_model{shape=chain, length=3}"
    with pytest.raises(PassError, match="There is no drafter 'recicling'. Did you mean recycling"):
        make_drafters("recicling")
    with pytest.raises(PassError, match="The drafter 'draft_model' has no option 'lenght'. Its options: model=draft"):
        make_drafters("draft_model{lenght=3}")
    with pytest.raises(PassError, match="does not close"):
        make_drafters("draft_model{length=3")
    with pytest.raises(PassError, match="one is empty"):
        make_drafters("recycling+")
    for wrong in (Speculate(delta=-1.0), Speculate(epsilon=float("nan"))):
        with pytest.raises(PassError, match="is .*; it is a number of 0 or more"):
            wrong.validate()
    with pytest.raises(PassError, match="is empty"):
        make_drafters("+")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom stemma.passes.drafters import Drafter\n\n\n"
        "@dataclass(frozen=True)\nclass Repeat(Drafter):\n    times: int = 2\n    name: ClassVar[str] = 'repeat'\n\n"
        "    def draft(self, context, text, token, tree, state):\n        context.extend(tree, [0], token, [1.0])\n"
    )
    module = speculated(draft=f"{mine}:Repeat{{times=3}}+recycling", budget=6)
    world = World(models=models(1))
    assert same(*(run(module, n, world, prompt=[1], max_new_tokens=9) for n in ("generate", "generate_plain")))
    with pytest.raises(PassError, match="is not a drafter"):
        make_drafters(f"{mine}:Nothing")


def test_the_published_tree_of_token_recycling() -> None:
    """80 nodes in levels of 8, 21, 25, 15, 8 and 3; smaller budgets take the first of them, always with their parents."""
    assert tuple(len(level) for level in published()) == RECYCLING == (8, 21, 25, 15, 8, 3)
    assert published()[0] == tuple((0, rank) for rank in range(8))
    for nodes in range(1, 80):
        levels = published(nodes)
        assert sum(map(len, levels)) == nodes
        for before, level in zip([((0, 0),), *levels[:-1]], levels, strict=True):
            assert all(0 <= place < len(before) for place, _ in level)


@pytest.mark.parametrize("nodes", [1, 4, 9])
def test_the_fixed_tree_is_the_best_one(nodes: int) -> None:
    """Against every tree of two levels that could be better."""
    acceptance = (0.6, 0.25, 0.1)

    def value(levels: Any) -> float:
        total, before = 0.0, [1.0]
        for level in levels:
            before = [before[place] * acceptance[rank] for place, rank in level]
            total += sum(before)
        return total

    best = value(likeliest(nodes, acceptance, 2))
    for width in range(1, 4):
        first = [acceptance[r] for r in range(width)]
        second = sorted((a * b for a in first for b in acceptance), reverse=True)[: max(nodes - width, 0)]
        assert width > nodes or best >= sum(first) + sum(second) - 1e-12


def test_vocabularies_that_differ_are_translated() -> None:
    """The draft model has 5 tokens, in another order; what it cannot say is not drafted."""
    to_draft = np.array([3, 1, -1, 0, 2, 4])
    back = {int(d): t for t, d in enumerate(to_draft) if d >= 0}
    reference = models(4, likeness=0.05)

    def compute(tokens: tuple[Any, ...]) -> Any:
        logits, hidden = reference["draft"](tuple(back[t] for t in tokens))
        return logits[[back[i] for i in range(5)]], hidden

    infos = {"model": ModelInfo(VOCAB, 4, 200, (0,)), "draft": ModelInfo(5, 0, 200, (3,), None, to_draft)}
    for draft in ("draft_model{length=4}", "draft_model{shape=chain,length=4}", "draft_model{exact=true}"):
        module = Speculate(draft=draft, budget=8).run(traced(generate), PassContext(models=infos))
        world = World(models={"model": reference["model"], "draft": ReferenceModel(compute, 5)})
        for temperature in (0.0, 1.0):
            options: dict[str, Any] = {"prompt": [1], "max_new_tokens": 40, "temperature": temperature, "ignore_eos": True}
            assert same(run(module, "generate", world, **options), run(module, "generate_plain", world, **options))
            assert accepted_length(module, world, **options) > 1.3
    infos["draft"] = ModelInfo(5, 0, 200, (3,), None, np.full(VOCAB, -1))
    with pytest.raises(PassError, match="have 0.0% of their tokens in common"):
        Speculate(draft="draft_model").run(traced(generate), PassContext(models=infos))


def test_missing_models_are_named() -> None:
    info = {"model": ModelInfo(VOCAB, 0, 200, (0,))}
    bare = traced(generate)
    with pytest.raises(PassError, match="The drafter 'draft_model' needs the model 'draft'; there are: model."):
        Speculate(draft="draft_model").run(bare, PassContext(models=info))
    needs = Speculate(draft="draft_model+hydra+early_exit").needs()
    assert (
        needs.models == ("draft",)
        and needs.hidden
        and needs.heads == (("hydra", ""),)
        and [m.makes() for m in needs.made] == ["early"]
    )
