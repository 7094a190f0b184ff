"""The speculate pass on the reference interpreter: whatever is drafted, the program's results are those of plain decoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stemma.frontend.programs.generate import generate
from stemma.ir import PassError, World, walk
from stemma.ir import trace as p
from stemma.ir.trace_constraint import Automaton
from stemma.passes.drafters import Drafter
from stemma.passes.speculate import Speculate
from tests.speculation import VOCAB, accepted_length, context, heads, models, run, same, speculated, traced

DRAFTERS = (
    "recycling", "lookahead{branch=4}", "stand{order=3,k=4}", "prompt_lookup{longest=2,length=5}", "medusa", "hydra{width=3}",
    "early_exit{length=4}", "draft_model{shape=chain,length=4}", "draft_model{shape=tree}", "draft_model{width=4}",
    "draft_model{exact=true,length=5}", "draft_model{shape=rsd,width=2,length=3}", "draft_model{shape=beam,width=3,length=4}",
    "recycling+draft_model{shape=chain}+lookahead",
)  # fmt: skip


@p.program
def telling(
    model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 12, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    repetition_penalty: float = 1.0, presence_penalty: float = 0.0, seed: p.Long = 0,
) -> dict[str, p.Value]:  # fmt: skip
    """Plain decoding that tells what its sequence holds at the end, and the sum of the logits that it saw."""
    text = model.start(prompt[:-1])

    def body(token: p.Value, total: p.Value) -> tuple[p.Value, ...]:
        logits = text.step(token)
        token = p.select(
            logits, text, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, seed=seed,
        )  # fmt: skip
        p.emit(token)
        return (p.emitted() < max_new_tokens) & ~model.is_end(token)[0], token, total + logits.sum() + text.hidden.sum()

    _, total = p.loop(body, prompt[-1:], p.as_value(0.0))
    return {"text": text.history(0, 64)[0], "total": total}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    draft=st.sampled_from(DRAFTERS), budget=st.integers(2, 16), shape=st.sampled_from(("measured", "fixed")),
    model=st.integers(0, 3), prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), length=st.integers(1, 24),
    temperature=st.sampled_from((0.0, 0.7, 1.0)), top_k=st.sampled_from((0, 3)), top_p=st.sampled_from((1.0, 0.8)),
    repetition=st.sampled_from((1.0, 1.3)), presence=st.sampled_from((0.0, 0.5)), seed=st.integers(0, 5),
)  # fmt: skip
def test_results_are_those_of_plain_decoding(
    draft: str, budget: int, shape: Any, model: int, prompt: list[int], length: int, temperature: float, top_k: int, top_p: float,
    repetition: float, presence: float, seed: int,
) -> None:  # fmt: skip
    """Tokens, sequences, logits: equal to the bit, in a first and a second request, which drafts from what the first one left."""
    module = speculated(telling, draft=draft, budget=budget, shape=shape)
    world = World(models=models(model), compiled=heads(model))
    options: dict[str, Any] = {
        "max_new_tokens": length, "temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition,
        "presence_penalty": presence, "seed": seed,
    }  # fmt: skip
    kept: dict[str, Any] = {}
    for text in (prompt, prompt[::-1]):
        plain = run(module, "telling_plain", world, prompt=text, **options)
        assert same(run(module, "telling", world, kept, prompt=text, **options), plain)


@dataclass(frozen=True)
class Scattered(Drafter):
    """Any tree at all, the same at every turn."""

    nodes: tuple[tuple[int, int], ...] = ()
    name: ClassVar[str] = "scattered"

    def draft(self, context: Any, text: Any, token: Any, tree: Any, state: Any) -> None:
        parents, tokens = [a for a, _ in self.nodes], [b for _, b in self.nodes]
        context.extend(tree, p.array(parents, "i32"), p.array(tokens, "i32"), p.full(len(tokens), 0.5))


@given(
    nodes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, VOCAB - 1)), min_size=1, max_size=12),
    model=st.integers(0, 20), temperature=st.sampled_from((0.0, 1.0)), length=st.integers(1, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_tree(nodes: list[tuple[int, int]], model: int, temperature: float, length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stemma.passes.speculate.make_drafters", lambda text: (Scattered(tuple(nodes)),))
        module = speculated(telling, budget=13, shape="fixed")
    world = World(models=models(model))
    options: dict[str, Any] = {"prompt": [1, 2], "max_new_tokens": length, "temperature": temperature}
    assert same(run(module, "telling", world, **options), run(module, "telling_plain", world, **options))


@pytest.mark.parametrize("draft", ["recycling", "draft_model", "draft_model{exact=true}", "hydra", "lookahead", "stand"])
def test_drafts_are_accepted(draft: str) -> None:
    """Several tokens per call where the guesses are good; hydra's functions and the small model are as good as the model here."""
    world = World(models=models(1, likeness=0.05), compiled=heads(0))
    module = speculated(draft=draft, budget=12)
    if draft == "hydra":
        weights = models(1, likeness=0.0)["model"]
        world = World(
            models=world.models,
            compiled={f"hydra_{i}": lambda h, path: np.stack([weights((int(t),))[0] for t in path[:, -1]]) for i in range(4)},
        )
    for temperature in (0.0, 1.0):
        length = accepted_length(module, world, prompt=[1, 2], max_new_tokens=60, temperature=temperature, ignore_eos=True)
        assert length > (1.2 if temperature and draft in ("lookahead", "stand") else 1.8)


def test_the_counted_noise_is_drafted_with() -> None:
    """A draft model like the target agrees with it at any temperature, as both choose with the same noise."""
    world = World(models=models(2, likeness=0.02))
    module = speculated(draft="draft_model{shape=chain,length=5}", budget=6, shape="fixed")
    for temperature in (0.0, 1.0, 1.5):
        assert accepted_length(module, world, prompt=[1], max_new_tokens=60, temperature=temperature, ignore_eos=True) > 4.5


# ---- programs of all sorts --------------------------------------------------------------------------------------------


Row = Annotated[p.Value, p.Array("i32", "row")]


@p.program
def obeying(
    model: p.Model, prompt: p.Tokens, indptr: Row, tokens: Annotated[p.Value, p.Array("i32", "edges")],
    targets: Annotated[p.Value, p.Array("i32", "edges")], *, max_new_tokens: int = 12, temperature: float = 0.0,
) -> None:  # fmt: skip
    """Constrained decoding."""
    text, automaton = model.start(prompt[:-1]), Automaton(indptr, tokens, targets)

    def body(token: p.Value, state: p.Value) -> tuple[p.Value, ...]:
        token = p.select(automaton.allow(text.step(token), state, text), text, temperature=temperature)
        p.emit(token)
        state = automaton.advance(state, token)
        return (p.emitted() < max_new_tokens) & ~automaton.done(state)[0], token, state

    p.loop(body, prompt[-1:], p.full(1, 0))


@pytest.mark.parametrize("draft", ["recycling", "draft_model", "lookahead+draft_model"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_goes_along(draft: str, temperature: float) -> None:
    """Words of 1 2 (3|4)* 5: the automaton's state is carried from node to node."""
    module = speculated(obeying, draft=draft, budget=10)
    automaton: dict[str, Any] = {"indptr": [0, 1, 2, 5, 5], "tokens": [1, 2, 3, 4, 5], "targets": [1, 2, 2, 2, 3]}
    for model in range(4):
        world = World(models=models(model))
        plain, fast = (
            run(module, name, world, prompt=[4], temperature=temperature, **automaton) for name in ("obeying_plain", "obeying")
        )
        assert same(plain, fast) and plain["output"].tokens[:2] == (1, 2)


@p.program
def samples(model: p.Model, prompt: p.Tokens, *, count: int = 3, length: int = 5, temperature: float = 1.0) -> None:
    """Several answers, one after another."""

    def answer(number: p.Value) -> tuple[p.Value, p.Value]:
        text = model.start(prompt[:-1])

        def body(token: p.Value, left: p.Value) -> tuple[p.Value, ...]:
            token = p.select(text.step(token), text, temperature=temperature, sequence=number.long())
            p.emit(token)
            return left > 1, token, left - 1

        p.loop(body, prompt[-1:], p.as_value(length))
        return number + 1 < count, number + 1

    p.loop(answer, p.as_value(0))


@p.program
def either(model: p.Model, prompt: p.Tokens, *, first: bool = True) -> None:
    """A loop in one branch only, then another one with a token that is computed in the turn."""
    text = model.start(prompt[:-1])

    def long() -> p.Value:
        def body(token: p.Value) -> tuple[p.Value, p.Value]:
            token = text.step(token).argmax()
            p.emit(token)
            return p.emitted() < 7, token

        last: p.Value = p.loop(body, prompt[-1:])
        return last

    last = p.cond(first, long, lambda: prompt[-1:] * 1)

    def body(number: p.Value) -> tuple[p.Value, p.Value]:
        found = text.step((number + 1) % VOCAB).argmax()
        p.emit(found)
        return p.emitted() < 12, (found + number) % VOCAB

    p.loop(body, last)


@pytest.mark.parametrize("draft", ["recycling", "draft_model+stand"])
@pytest.mark.parametrize("options", [{}, {"first": False}])
@pytest.mark.parametrize("program", [samples, either])
def test_loops_in_loops_and_branches(program: p.Program, options: dict[str, Any], draft: str) -> None:
    module = speculated(program, draft=draft, budget=8)
    options = options if program is either else {}
    for model in range(3):
        world, kept = World(models=models(model)), {}  # type: tuple[World, dict[str, Any]]
        for _ in range(2):
            fast = run(module, program.name, world, kept, prompt=[1, 3], **options)
            assert same(fast, run(module, f"{program.name}_plain", world, prompt=[1, 3], **options))
    assert sum(n.op.name == "expand" for n in walk(module[program.name])) >= (1 if program is samples else 2)


def test_kept_values_go_on_from_request_to_request() -> None:
    """The table has no gap to learn in the second request: it is accepted from the first turn on."""
    module, world = speculated(draft="recycling", budget=16, shape="fixed"), World(models=models(1, likeness=0.0))
    assert "recycling_table" in module["generate"].result_names
    kept: dict[str, Any] = {}
    first = run(module, "generate", world, kept, prompt=[1], max_new_tokens=30, ignore_eos=True)
    assert kept["recycling_table"].after
    assert same(run(module, "generate", world, kept, prompt=[1], max_new_tokens=30, ignore_eos=True), first)


def test_the_module_names_both_forms() -> None:
    module = speculated(draft="recycling", budget=9)
    assert module.properties["programs"] == ("generate", "generate_plain")
    assert dict(module.properties["program_plain"]) == {"generate": "generate_plain"}
    defaults = dict(module.properties["program_defaults"])
    assert defaults["generate"] == defaults["generate_plain"]
    report = dict(dict(module.properties["speculation"])["generate"])
    assert report["draft"] == "recycling" and report["nodes"] == 9 and report["label"] == "identical"
    assert dict(report["bytes"])["recycling_table"] == VOCAB * min(8, VOCAB) * 8


# ---- what cannot be speculated, and why -------------------------------------------------------------------------------


@p.program
def pair(model: p.Model, prompt: p.Tokens) -> None:
    texts = model.start(prompt).fork([0, 0])

    def body(tokens: p.Value) -> tuple[p.Value, p.Value]:
        tokens = texts.step(tokens).argmax()
        p.emit(tokens[:1])
        return p.emitted() < 4, tokens

    p.loop(body, p.full(2, 1))


@p.program
def twice(model: p.Model, prompt: p.Tokens) -> None:
    text = model.start(prompt)

    def body(token: p.Value) -> tuple[p.Value, p.Value]:
        token = text.step(text.step(token).argmax()).argmax()
        p.emit(token)
        return p.emitted() < 4, token

    p.loop(body, prompt[-1:])


@p.program
def forking(model: p.Model, prompt: p.Tokens) -> None:
    text = model.start(prompt)

    def body(token: p.Value) -> tuple[p.Value, p.Value]:
        text.keep([0])
        token = text.step(token).argmax()
        p.emit(token)
        return p.emitted() < 4, token

    p.loop(body, prompt[-1:])


@p.program
def sometimes(model: p.Model, prompt: p.Tokens) -> None:
    text = model.start(prompt)

    def body(token: p.Value) -> tuple[p.Value, p.Value]:
        found: p.Value = p.cond(token[0] > 0, lambda: text.step(token).argmax(), lambda: token * 1)
        p.emit(found)
        return p.emitted() < 4, found

    p.loop(body, prompt[-1:])


@p.program
def loopless(model: p.Model, prompt: p.Tokens) -> None:
    p.emit(model.start(prompt[:-1]).step(prompt[-1:]).argmax())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (pair, r"pair: its loop steps 2 sequences together at \w+.py:\d+ in body"),
        (twice, r"twice: its loop steps 2 times a turn at \w+.py:\d+ in body"),
        (forking, r"forking: its loop forks sequences at \w+.py:\d+ in body"),
        (sometimes, r"sometimes: the step at \w+.py:\d+ in \S+ is inside a loop or a branch"),
        (loopless, r"loopless: it has no loop that steps a model"),
    ],
)
def test_programs_that_cannot_be_speculated_say_why(program: p.Program, reason: str) -> None:
    """Nodes of equal structure are one, and have the line that made them first: of another program, perhaps."""
    with pytest.raises(PassError, match=reason):
        Speculate().run(traced(program), context())
    both = Speculate(budget=4).run(traced(program, generate), context())
    assert both.properties["programs"] == (program.name, "generate", "generate_plain")
    assert len(both.properties["not_speculated"]) == 1


def test_other_verifiers_need_a_select() -> None:
    with pytest.raises(PassError, match="chooses tokens in another way than by select at"):
        Speculate(verify="recursive").run(traced(either), context())


def test_budgets() -> None:
    module = traced(generate)
    for budget in (1, 0):
        with pytest.raises(PassError, match=f"a budget of {budget} is below one drafted node"):
            Speculate(budget=budget).run(module, context())
    with pytest.raises(PassError, match="0.0001 MB are too few for one drafted node, which needs 0.000"):
        Speculate(memory=0.0001, shape="fixed").run(module, context())
    roomy, tight = (Speculate(budget=64, memory=m, shape="fixed").run(module, context()) for m in (1.0, 0.001))
    nodes = [dict(dict(m.properties["speculation"])["generate"])["nodes"] for m in (roomy, tight)]
    assert nodes[0] == 64 and 2 <= nodes[1] < 64
    report = dict(dict(tight.properties["speculation"])["generate"])
    assert sum(dict(report["bytes"]).values()) <= 1000


def test_names_of_kept_values_are_not_free() -> None:
    @p.program
    def taken(model: p.Model, prompt: p.Tokens, *, governor: int = 1) -> None:
        text = model.start(prompt[:-1])

        def body(token: p.Value) -> tuple[p.Value, p.Value]:
            token = text.step(token).argmax()
            p.emit(token)
            return p.emitted() < governor, token

        p.loop(body, prompt[-1:])

    with pytest.raises(PassError, match="parameter 'governor' has the name of something that a drafter keeps"):
        Speculate().run(traced(taken), context())


# ---- other verifiers --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "shape"),
    [
        ("draft_model{shape=rsd,width=2,length=2}", "fixed"),
        ("draft_model{shape=beam,width=3,length=3}", "measured"),
        ("recycling", "fixed"),
    ],
)
def test_recursive_verification_keeps_the_distribution(draft: str, shape: Any) -> None:
    """Outputs of two tokens against their exact probabilities: chi-squared within five deviations of its mean."""
    world = World(models=models(3, likeness=0.6))
    module = speculated(draft=draft, budget=8, verify="recursive", shape=shape)
    assert Speculate(verify="recursive").label == "distribution"
    count, kept = 1200, {}  # type: tuple[int, dict[str, Any]]
    options: dict[str, Any] = {"prompt": [1, 2], "max_new_tokens": 3, "temperature": 1.0, "ignore_eos": True}
    seen = Counter(run(module, "generate", world, kept, seed=i, **options)["output"].tokens[1:] for i in range(count))
    expected = np.zeros((VOCAB, VOCAB))
    for first in range(VOCAB):
        for second in range(VOCAB):
            before = probabilities(world, (1, 2))[first] * probabilities(world, (1, 2, first))[second]
            expected[second] += before * probabilities(world, (1, 2, first, second))
    statistic, cells, rest = 0.0, 0, [0.0, 0.0]
    for pair, share in np.ndenumerate(expected):
        if share * count < 5:
            rest = [rest[0] + share * count, rest[1] + seen[pair]]
            continue
        statistic += (seen[pair] - share * count) ** 2 / (share * count)
        cells += 1
    statistic += (rest[1] - rest[0]) ** 2 / max(rest[0], 1e-9)
    assert cells > 8 and statistic < cells + 5 * (2 * cells) ** 0.5


def probabilities(world: World, tokens: tuple[int, ...]) -> Any:
    logits = world.models["model"](tokens)[0].astype(np.float64)
    e = np.exp(logits - logits.max())
    return e / e.sum()


@pytest.mark.parametrize("verify", ["recursive", "typical"])
@pytest.mark.parametrize("draft", ["recycling", "draft_model{shape=beam,width=3}", "recycling+draft_model{shape=rsd,width=2}"])
def test_at_temperature_0_every_verifier_is_exact(verify: Any, draft: str) -> None:
    world, module = World(models=models(2)), speculated(draft=draft, budget=10, verify=verify)
    plain, fast = (run(module, n, world, prompt=[1], max_new_tokens=20) for n in ("generate_plain", "generate"))
    assert same(plain, fast)


def test_typical_acceptance_is_lossy_and_accepts_more() -> None:
    assert Speculate(verify="typical").label == "lossy"
    world = World(models=models(5, likeness=1.0))
    lengths = {}
    for verify in ("recursive", "typical"):
        module = speculated(draft="recycling", budget=12, verify=verify, shape="fixed")
        options = {"prompt": [1], "max_new_tokens": 80, "temperature": 1.0, "ignore_eos": True}
        lengths[verify] = accepted_length(module, world, **options)
    assert lengths["typical"] > lengths["recursive"]
