"""verify_each on decoding programs: a pass labelled identical that changes an answer is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from stemma.codegen.program import attach
from stemma.frontend.programs import generate
from stemma.ir import Function, Module, Node, PassError, ops
from stemma.ir import trace as p
from stemma.library import listed
from stemma.passes import Label, ModelInfo, Pass, PassContext, Stage, run_pipeline
from stemma.passes.compare_programs import changed_answers
from stemma.passes.speculate import Speculate

pytestmark = pytest.mark.quick
INFO = ModelInfo(9, 0, 64, (8,))


@p.program
def measured(model: p.Model, prompt: p.Tokens) -> dict[str, Any]:
    """One token, and an array."""
    text = model.start(prompt[:-1])
    logits = text.step(prompt[-1:])
    p.emit(logits.argmax())
    return {"twice": logits * 2.0}


@p.program
def asks(model: p.Model, prompt: p.Tokens) -> None:
    """What a Python function says."""
    p.emit(p.host("say", prompt, type=("i32", (1,))))


@pytest.fixture
def module() -> Module:
    bare = Module([], {"models": (("model", 9, 0, (8,), 64),)})
    return attach(bare, listed([generate, measured, asks], {"model": INFO}))


@dataclass(frozen=True)
class Doubled(Pass):
    """Other numbers where the constant 1.0 or 2.0 is, or one more token."""

    what: str = "measured"
    name: ClassVar[str] = "doubled"
    label: ClassVar[Label] = "identical"
    stage: ClassVar[Stage] = "program"

    def run(self, module: Module, context: PassContext) -> Module:
        def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
            if node.op.name == "constant" and node.attrs["value"] == 2.0:
                made: Node = ops.constant(value=4.0, dtype=node.dtype)
                return made
            if node.op.name == "loop" and self.what == "generate":
                body = node.attrs["body"]
                pairs = list(zip(body.result_names, body.results, strict=True))
                once = Function("", body.params, [("again", ops.constant(value=False, dtype="bool")), *pairs[1:]])
                return node.op(*inputs, body=once)
            return node.rebuild(*inputs)

        return module.replace(module[self.what].rewrite(replace))


class Lossy(Doubled):
    """The same, told about."""

    name: ClassVar[str] = "lossy_doubled"
    label: ClassVar[Label] = "lossy"


@pytest.mark.parametrize("what, count", [("generate", "4 of 4"), ("measured", "2 of 2")])
def test_a_changed_program_is_found(module: Module, what: str, count: str) -> None:
    with pytest.raises(PassError, match=f"'doubled' is labelled identical, but {count} answers .* first of '{what}'"):
        run_pipeline(module, [Doubled(what)], verify_each=True)
    record = run_pipeline(module, [Lossy(what)], verify_each=True).records[0]
    assert record.difference == 1.0 and record.modified
    run_pipeline(module, [Doubled(what)])


def test_speculation_is_compared(module: Module) -> None:
    step = Speculate("recycling", budget=6)
    result = run_pipeline(module, [step], PassContext(models={"model": INFO}), verify_each=True)
    assert result.records[0].difference == 0.0
    differing, total, _ = changed_answers(module, result.module)
    assert (differing, total) == (0, 4)


def test_programs_that_stay_or_ask_are_left_out(module: Module) -> None:
    assert changed_answers(module, module) == (0, 0, "")
    asked = module["asks"]
    other = Function("asks", asked.params, [("output", asked.params[-1])])
    assert other is not asked and changed_answers(module, module.replace(other)) == (0, 0, "")
