"""Finding passes by name, file and entry point; options from text."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from stemma.ir import PassError, ops
from stemma.passes import Pass, PassContext, check_rule, registry, run_pipeline
from stemma.passes.canonicalize import Canonicalize
from stemma.passes.registry import all_passes, describe, find_rules, make_pass
from stemma.passes.simplify_weights import weight
from tests.helpers import example, module

pytestmark = pytest.mark.quick
EXAMPLES = Path(__file__).parent.parent / "examples" / "passes"


@dataclass(frozen=True)
class Everything(Pass):
    """All kinds of options."""

    number: int
    ratio: float = 0.5
    flag: bool = False
    word: str = "a"
    many: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ()
    maybe: float | None = None
    kind: Literal["tall", "wide"] = "tall"
    name: ClassVar[str] = "everything"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("everything", f"{__name__}:Everything", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Everything)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.GROUP else [])


def test_a_pass_by_its_name() -> None:
    assert make_pass("canonicalize") == Canonicalize()
    assert make_pass(" canonicalize{} ") == Canonicalize()


def test_options_are_read_by_the_types_of_the_fields() -> None:
    text = 'everything{number=3, ratio=1e-3,flag=true, word="x, {y}", many=(4,5), names=(q_proj, "k"), maybe=none, kind=wide}'
    assert make_pass(text) == Everything(3, 1e-3, True, "x, {y}", (4, 5), ("q_proj", "k"), None, "wide")
    assert make_pass("everything{number=-1,maybe=2}") == Everything(-1, maybe=2.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("canonicalise", "no pass 'canonicalise'. Did you mean canonicalize?"),
        ("zzz", "There are: awq, "),
        ("canonicalize{deep=1}", "takes no option 'deep'. It has none."),
        ("everything{nunber=1}", "takes no option 'nunber'. Its options: number=..., ratio=0.5, flag=False"),
        ("everything{nunber=1}", "kind=tall. Did you mean number?"),
        ("everything{number=1,ratio=nan}", "takes a value of the type float, not 'nan'"),
        ("everything{3}", "takes options written option=value, not '3'"),
        ("everything", "needs a value for number: everything{number=...}"),
        ("everything{number=three}", "option 'number' of the pass 'everything' takes a value of the type int, not 'three'"),
        ("everything{number=1,flag=1}", "type bool, not '1'"),
        ("everything{number=1,kind=long}", "is one of tall, wide, not 'long'"),
        ("everything{number=1,number=2}", "given twice"),
        ("everything{number=1", "does not close them"),
        ("./none.py:Pass", "There is no file none.py"),
    ],
)
def test_mistakes_are_explained(text: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        make_pass(text)
    assert message in str(caught.value)


def test_files_that_are_no_passes(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from stemma.passes import Pass\nclass Plain: ...\nclass Nameless(Pass): ...\n")
    mistakes = {"Other": "no class 'Other'; its passes are: Nameless", "Plain": "not a pass", "Nameless": "no name"}
    for name, message in mistakes.items():
        with pytest.raises(PassError, match=message):
            make_pass(f"{file}:{name}")
    file.write_text("1 / 0\n")
    with pytest.raises(PassError, match="fails when it is loaded: ZeroDivisionError"):
        make_pass(f"{file}:Plain")


def test_the_example_passes_are_used_like_ours() -> None:
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 40
    sparsify = make_pass(f"{EXAMPLES}/sparsify.py:Sparsify{{alpha=1.0}}")
    w = weight("w", "bf16[3, 4]")
    start = module(y=ops.linear(example("x", "f32[n, 4]"), w))
    outcome = run_pipeline(start, (sparsify,), verify_each=True)
    (record,) = outcome.records
    assert record.label == "lossy" and record.options == {"alpha": 1.0} and (record.difference or 0) > 0
    nothing = make_pass(f"{EXAMPLES}/sparsify.py:Sparsify{{alpha=0.0}}")
    assert run_pipeline(start, (nothing,), verify_each=True).records[0].difference == 0
    (rule,) = find_rules(f"{EXAMPLES}/fast_gelu.py:FastGelu")
    assert check_rule(rule)
    fast = make_pass(f"{EXAMPLES}/fast_gelu.py:FastGelu").run(module(y=ops.gelu(example("x", "f32[n]"))), PassContext())
    assert fast["forward"].results[0].op.name == "mul"


def test_the_list_of_passes() -> None:
    found = {entry["name"]: entry for entry in describe()}
    assert found["canonicalize"]["label"] == "identical" and "neutral" in found["canonicalize"]["rules"]
    assert found["everything"]["options"]["many"] == (1, 2)
    assert found["everything"]["doc"] == "All kinds of options."
    assert all(entry["doc"] for entry in found.values())


def test_rules_are_found_by_rule_or_by_pass() -> None:
    assert [r.name for r in find_rules("attention_mask")] == ["attention_mask"]
    assert {r.name for r in find_rules("raise_rope")} == {"rope", "partial_rope"}
    with pytest.raises(PassError, match="no rule or pass 'atention_mask'. Did you mean attention_mask"):
        find_rules("atention_mask")
    with pytest.raises(PassError, match="'everything' is not made of rules"):
        find_rules("everything")


def test_an_entry_point_may_not_take_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = EntryPoint("canonicalize", "somewhere:Other", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [taken])
    with pytest.raises(PassError, match="which exists already"):
        all_passes()
