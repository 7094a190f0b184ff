"""The pass manager: records, promises, dumps that re-enter, comparison of results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from stemma.ir import Module, Node, PassError, Tensor, ops, print_module
from stemma.passes.base import Label, Pass, PassContext
from stemma.passes.manager import read_dump, run_pipeline
from stemma.passes.rewrite import Rule, RulePass, rule
from tests.helpers import example, module

pytestmark = pytest.mark.quick
X = example("x", "f32[n, 4]")


@rule(lambda x: x * 1.0, cases=[{"x": "f32[n, 4]"}])
def mul_one(x: Node) -> Node:
    """mul(x, 1) -> x"""
    return x


@dataclass(frozen=True)
class Clean(RulePass):
    """Removes products with 1."""

    name: ClassVar[str] = "clean"
    rules: ClassVar[tuple[Rule, ...]] = (mul_one,)


@dataclass(frozen=True)
class Shift(Pass):
    """Adds `amount` to every result."""

    name: ClassVar[str] = "shift"
    amount: float = 1.0

    def run(self, module: Module, context: PassContext) -> Module:
        return module.map(lambda f: f.with_results((n, r + self.amount) for n, r in zip(f.result_names, f.results, strict=True)))


@dataclass(frozen=True)
class LossyShift(Shift):
    """The same, honestly labelled."""

    name: ClassVar[str] = "lossy_shift"
    label: ClassVar[Label] = "lossy"


START = module(y=ops.tanh(X * 1.0))


def test_records_say_what_happened() -> None:
    passes = (Clean(), Clean(), LossyShift(0.5))
    outcome = run_pipeline(START, passes, verify_each=True, measure=lambda step, changed: {"nodes": len(changed["forward"].nodes)})
    assert outcome.module is module(y=ops.tanh(X) + 0.5)
    first, second, third = outcome.records
    assert (first.name, first.modified, first.fired, first.nodes) == ("clean", True, {"mul_one": 1}, 2)
    assert first.difference == 0.0
    assert not second.modified and not second.fired
    assert third.label == "lossy" and third.options == {"amount": 0.5} and third.loss == {"nodes": 4}
    assert third.difference is not None and third.difference > 0.1
    assert third.as_json()["loss"] == {"nodes": 4} and first.loss is None


def test_a_pass_that_lies_about_its_label_is_named() -> None:
    with pytest.raises(PassError, match="'shift' is labelled identical, but it changed the result 'y' of 'forward' by"):
        run_pipeline(START, (Clean(), Shift(1e-6)), verify_each=True)
    inputs = {"forward": [{"x": [[1.0, 2.0, 3.0, 4.0]]}]}
    with pytest.raises(PassError, match="labelled identical"):
        run_pipeline(START, (Shift(1e-6),), verify_each=inputs)


def test_dumps_are_headed_and_re_enter(tmp_path: Path) -> None:
    passes = (Clean(), LossyShift(0.5), LossyShift(0.25))
    whole = run_pipeline(START, passes, dump=tmp_path).module
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["00_frontend.txt", "01_clean.txt", "02_lossy_shift.txt", "03_lossy_shift.txt"]
    assert "(by clean, " in (tmp_path / "01_clean.txt").read_text().splitlines()[0]
    assert read_dump(tmp_path / "00_frontend.txt") is START
    assert read_dump(tmp_path / "03_lossy_shift.txt") is whole
    resumed = run_pipeline(START, passes, dump=tmp_path, start_after="02_lossy_shift.txt", measure=lambda _, m: {"nodes": 1})
    assert resumed.module is whole
    # What was skipped has changed the results all the same, and is recorded.
    assert [(r.name, r.label, r.loss) for r in resumed.records] == [("lossy_shift", "lossy", {"nodes": 1})] * 2
    cleaned = read_dump(tmp_path / "01_clean.txt")
    assert run_pipeline(cleaned, passes, start_after="clean").module is whole
    assert print_module(whole) == print_module(resumed.module)


def test_a_state_that_reads_weights_which_a_pass_made_is_no_place_to_start(tmp_path: Path) -> None:
    table = ops.weight(name="table:clean", type=Tensor("f32", (4,)))
    (tmp_path / "01_clean.txt").write_text(print_module(module(y=X + table)))
    with pytest.raises(PassError, match="reads the weight 'table:clean', which the checkpoint does not have.* makes it .clean."):
        run_pipeline(START, (Clean(), LossyShift()), dump=tmp_path, start_after="01_clean.txt")


@pytest.mark.parametrize("where", ["03_clean.txt", "lossy_shift", "nothing"])
def test_an_impossible_place_to_start_is_an_error(where: str, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="passes|pipeline"):
        run_pipeline(START, (Clean(), LossyShift(), LossyShift()), start_after=where, dump=tmp_path)


def test_promises_are_checked() -> None:
    @dataclass(frozen=True)
    class Needs(Clean):
        requires: ClassVar[frozenset[str]] = frozenset({"causal"})

    @dataclass(frozen=True)
    class Breaks(Clean):
        ensures: ClassVar[frozenset[str]] = frozenset({"has_step"})

    @dataclass(frozen=True)
    class Unknown(Clean):
        requires: ClassVar[frozenset[str]] = frozenset({"tidy"})

    with pytest.raises(PassError, match="'clean' requires a module that is 'causal', but there is no attention"):
        run_pipeline(START, (Needs(),))
    with pytest.raises(PassError, match="'clean' promised a module that is 'has_step', but the module has no function `step`"):
        run_pipeline(START, (Breaks(),))
    with pytest.raises(PassError, match="unknown property 'tidy'; known: causal"):
        run_pipeline(START, (Unknown(),))


def test_a_failing_pass_is_named() -> None:
    @dataclass(frozen=True)
    class Fails(Clean):
        def run(self, module: Module, context: PassContext) -> Module:
            raise PassError("No reason.")

    with pytest.raises(PassError, match="The pass 'clean' failed. No reason."):
        run_pipeline(START, (Fails(),))

    @dataclass(frozen=True)
    class Refuses(Clean):
        def validate(self) -> None:
            raise PassError("clean: size=3 is odd.")

    with pytest.raises(PassError, match="The pass 'clean' failed: size=3 is odd."):
        run_pipeline(START, (Refuses(),))
