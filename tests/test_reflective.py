"""Reflective verification: its operations, and the pass against the method written out in numpy, natively too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.frontend.programs.generate import generate
from stemma.ir import (
    Context,
    Function,
    Module,
    Node,
    PassError,
    StemmaError,
    Tensor,
    TypeMismatch,
    World,
    ops,
    parse_module,
    print_module,
    verify,
    walk,
)
from stemma.ir import trace as p
from stemma.ir.ops.choose import filtered, gumbel_noise
from stemma.ir.ops.governor import GovernorValue
from stemma.ir.ops.program import ReferenceModel, SequencesValue, TreeValue
from stemma.ir.ops.reflect import best_chain, mix_logits, retract
from stemma.ir.trace import ModelSpec, trace
from stemma.passes import ModelInfo, PassContext
from stemma.passes.drafters import Drafter
from stemma.passes.speculate import Speculate
from tests.native_ops import Ops, drawn, native_error, param, results_of, run_function, run_op, started
from tests.speculation import VOCAB, accepted_length, context, models, run, same, traced
from tests.test_speculate import obeying

CONTEXT: Any = Context(None, np.float32)
DTYPES = {"max_new_tokens": "i4", "top_k": "i4", "seed": "i8", "sequence": "i8", "ignore_eos": "?"}


# ---- operations -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3), size=st.integers(1, 70), seed=st.integers(0, 999), weight=st.floats(0, 1, width=32))
def test_mixed_logits(rows: int, size: int, seed: int, weight: float) -> None:
    """The mixture of the softmaxes, on the scale of the first logits; natively the same but for rounding."""
    a, b = (np.random.default_rng([seed, i]).standard_normal((rows, size)).astype(np.float32) * 6 for i in range(2))
    native, expected = run_op("mix_logits", a, b, np.float32(weight))
    x, y = (np.exp(v.astype(np.float64)) for v in (a, b))
    totals = x.sum(1, keepdims=True)
    wanted = np.log((1 - weight) * x + weight * y * totals / y.sum(1, keepdims=True))
    np.testing.assert_allclose(expected["r0"], wanted, rtol=0, atol=2e-6 * (1 + np.abs(wanted).max()))
    np.testing.assert_allclose(native["r0"], wanted, rtol=0, atol=2e-6 * (1 + np.abs(wanted).max()))
    np.testing.assert_allclose(np.exp(wanted).sum(1), totals[:, 0])


def test_weights_at_the_ends() -> None:
    """Weight 0 gives the first logits to the bit, 1 the second ones' softmax; a token that neither can choose stays so."""
    inf = np.float32(np.inf)
    a, b = np.array([[1, -inf, -inf, 0.3]], np.float32), np.array([[2, 1, -inf, -80]], np.float32)
    for result in run_op("mix_logits", a, b, np.float32(0)):
        np.testing.assert_array_equal(result["r0"], a)
    for result in run_op("mix_logits", a, b, np.float32(1)):
        np.testing.assert_allclose(np.exp(result["r0"]).sum(), np.exp(a).sum(), rtol=1e-6)
        np.testing.assert_allclose(result["r0"][0, [0, 1, 3]] - result["r0"][0, 0], [0, -1, -82], rtol=1e-6)
    for result in run_op("mix_logits", a, b, np.float32(0.5)):
        assert result["r0"][0, 2] == -np.inf and np.isfinite(result["r0"][0, [0, 1, 3]]).all()


def test_weights_and_shapes_are_checked() -> None:
    x = np.zeros((1, 3), np.float32)
    for weight in (-0.1, 1.5, np.nan):
        assert "it must be between 0 and 1" in native_error("mix_logits", x, x, np.float32(weight))
        with pytest.raises(StemmaError, match="between 0 and 1"):
            mix_logits.evaluate(CONTEXT, x, x, np.float32(weight))
    a, text, tree = param("a", x), started(param("t", np.zeros(2, np.int32))), drawn(1, [], 3)
    with pytest.raises(TypeMismatch, match="the other logits"):
        mix_logits(a, param("b", np.zeros((1, 4), np.float32)), ops.constant(value=0.5, dtype="f32"))
    with pytest.raises(TypeMismatch, match="takes f32"):
        mix_logits(param("c", np.zeros(3, np.float32)), a, ops.constant(value=0.5, dtype="f32"))
    with pytest.raises(TypeMismatch, match="not a governor"):
        best_chain(tree, text)
    with pytest.raises(TypeMismatch, match="not a token tree"):
        retract(text, text)


nodes_of_trees = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 4), st.sampled_from((1.0, 0.75, 0.5, 0.25, 0.0))), max_size=14
)


@settings(max_examples=40, deadline=None)
@given(nodes_of_trees, st.booleans())
def test_the_best_chain(nodes: list[tuple[int, int, float]], measured: bool) -> None:
    """Of all paths the one with the greatest sum of chances; natively the same."""
    tree = drawn(1, nodes, 16)
    governor = [ops.empty_state(kind="governor", args=(16, 1))] if measured else []
    native, expected = run_function(Function("f", [], results_of(ops.tree_nodes(best_chain(tree, *governor)))))
    for name, value in expected.items():
        np.testing.assert_array_equal(native[name], value)
    value = TreeValue(16, 16, (1,), (-1,), (1.0,), (0,))
    for parent, token, score in nodes:
        value = value.add(parent, token, score, 0)[0]
    kept = GovernorValue(16, 1)
    every = range(len(value.tokens))
    chances = kept.scores(value) if measured else [float(np.prod([value.scores[i] for i in value.path(n)])) for n in every]
    worth = [sum(chances[i] for i in value.path(n)[1:]) for n in every]
    path = value.path(int(np.argmax(worth)))
    chain = best_chain.evaluate(CONTEXT, value, *([kept] if measured else []))
    assert chain.tokens == tuple(value.tokens[i] for i in path) == tuple(expected["r0_1"][: len(path)])
    assert chain.parents == tuple(range(-1, len(path) - 1)) and chain.scores == tuple(value.scores[i] for i in path)


def test_retracted_nodes_are_forgotten() -> None:
    """Slots and children of later nodes are gone; what is left is followed as if nothing else had been there."""
    history = param("t", np.array([1, 2], np.int32))
    small, large = drawn(3, [(0, 4, 1.0)], 6), drawn(3, [(0, 4, 1.0), (1, 5, 1.0), (0, 6, 1.0)], 6)

    def read(text: Node) -> list[Node]:
        tokens = [ops.array(values=(token,)) for token in (3, 4, 5, 6)]
        found = [ops.has_child(text, tokens[0])]
        for token in tokens[:2]:
            followed = ops.follow(text, token)
            text = ops.get(followed, index=0)
            found += [ops.get(followed, index=1), *(ops.has_child(text, t) for t in tokens)]
        return [*found, ops.history(ops.settle(text), ops.constant(value=0, dtype="i32"), size=8)]

    text = retract(ops.get(ops.expand(started(history), large, fresh=6), index=0), small)
    plain = ops.get(ops.expand(started(history), small, fresh=6), index=0)
    native, expected = run_function(Function("f", [history], results_of(*read(text), *read(plain))), t=np.array([1, 2], np.int32))
    half = len(expected) // 2
    for i in range(half):
        for results in (native, expected):
            np.testing.assert_array_equal(results[f"r{i}"], results[f"r{i + half}"])
        np.testing.assert_array_equal(native[f"r{i}"], expected[f"r{i}"])
    assert expected["r3"] and not expected["r5"]  # 4 is a child of the root, 6 no longer


def test_only_the_end_of_a_tree_is_retracted() -> None:
    root = TreeValue(6, 6, (3,), (-1,), (1.0,), (0,))
    tree, other = root.add(0, 4, 1.0, 0)[0], root.add(0, 5, 1.0, 0)[0]
    text = SequencesValue(models(0)["model"], ((1,),))
    with pytest.raises(StemmaError, match="not the beginning"):
        retract.evaluate(CONTEXT, text, root)
    expanded = replace(text, tree=tree, ran=2)
    for wrong in (other, tree.add(1, 2, 1.0, 0)[0]):
        with pytest.raises(StemmaError, match="not the beginning"):
            retract.evaluate(CONTEXT, expanded, wrong)
    with pytest.raises(StemmaError, match="already followed"):
        retract.evaluate(CONTEXT, replace(expanded, visited=(0,)), root)
    assert retract.evaluate(CONTEXT, expanded, root) == replace(text, tree=root, ran=1)

    def failure(first: Node, second: Node, follow: bool) -> str:
        history = param("t", np.array([1], np.int32))
        text = ops.get(ops.expand(started(history), first, fresh=6), index=0)
        if follow:
            text = ops.get(ops.follow(text, ops.array(values=(3,))), index=0)
        fake = Ops(Function("f", [history], {"n": ops.length(retract(text, second))}))
        try:
            with pytest.raises(RuntimeError) as error:
                fake.run("f", t=np.array([1], np.int32))
            return str(error.value)
        finally:
            fake.close()

    small, large = drawn(3, [(0, 4, 1.0)], 6), drawn(3, [(0, 4, 1.0), (1, 5, 1.0)], 6)
    assert "not the beginning" in failure(small, large, False)
    assert "not the beginning" in failure(small, drawn(3, [(0, 5, 1.0)], 6), False)
    assert "already followed" in failure(small, small, True)


def test_slots_of_retracted_nodes_are_free() -> None:
    history = param("t", np.array([1, 2], np.int32))
    small, large = drawn(3, [(0, 4, 1.0)], 6), drawn(3, [(0, 4, 1.0), (1, 5, 1.0), (0, 6, 1.0)], 6)
    used = []
    for made in (large, small):
        text = retract(ops.get(ops.expand(started(history), made, fresh=6), index=0), small)
        asked = ops.host(ops.length(text), function="stop", type=Tensor("i32", ()))
        fake = Ops(Function("f", [history], {"later": ops.history(text, asked, size=4)}))
        try:
            fake.start("f", t=np.array([1, 2], np.int32))
            assert fake.advance() == 2
            used.append(fake.used()[0])
        finally:
            fake.close()
    assert used[0] == used[1] == 4


# ---- the method -------------------------------------------------------------------------------------------------------

REFLECTION = (3, 1)


@dataclass(frozen=True)
class Usual(Drafter):
    """A chain of `length` tokens, each the usual one after the one before."""

    usual: tuple[int, ...] = ()
    length: int = 3
    name: ClassVar[str] = "usual"

    def draft(self, context: Any, text: Any, token: Any, tree: Any, state: Any) -> None:
        table, node = p.array(self.usual), p.array([0])
        for _ in range(self.length):
            token = table[token]
            node = context.extend(tree, node, token, [1.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's folder with a tokenizer of the words a to f."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({word: i for i, word in enumerate("abcdefg")}, unk_token="g"))
    made.pre_tokenizer = Whitespace()
    found = tmp_path_factory.mktemp("checkpoint")
    made.save(str(found / "tokenizer.json"))
    return found


def reflected(folder: Path, drafter: Drafter | None = None, limit: int = 200, program: Any = generate, **options: Any) -> Any:
    """A module with the program speculated; by its own drafter when one is given."""
    given_context = context()
    given_context.source = folder
    given_context.models["model"] = replace(given_context.models["model"], context=limit)
    with pytest.MonkeyPatch.context() as patch:
        if drafter is not None:
            patch.setattr("stemma.passes.speculate.make_drafters", lambda text: (drafter,))
        module = Speculate(**{"verify": "reflective", "reflection": "d b", **options}).run(traced(program), given_context)
    verify(module)
    assert parse_module(print_module(module)) is module
    return module


def transcribed(
    model: ReferenceModel, prompt: Sequence[int], usual: Sequence[int], length: int, alpha: float, count: int, seed: int,
    limit: int, filters: tuple[Any, ...],
) -> tuple[list[int], int]:  # fmt: skip
    """The method, as it is written: tokens, and how many calls of the model made them."""
    text, out, calls = [*prompt], list[int](), 0

    def look(*parts: Sequence[int]) -> Any:
        x = model(tuple(t for part in parts for t in part))[0].astype(np.float64)
        return x, np.exp(x) / np.exp(x).sum()

    while len(out) < count:
        calls += 1
        start, draft = list(text), list[int]()
        if len(text) - 1 + 1 + 2 * length + len(REFLECTION) <= limit:
            for _ in range(length):
                draft.append(usual[(draft or text)[-1]])
        for i in range(len(draft) + 1):
            logits, first = look(start, draft[:i])
            _, second = look(start, draft, REFLECTION, draft[:i]) if draft else (None, first)
            fused = np.log((1 - alpha) * first + alpha * second) + np.log(np.exp(logits).sum())
            scores = filtered(fused, text, *filters)
            if filters[0] > 0:
                scores = scores + gumbel_noise(seed, 0, len(text), scores.size)
            text.append(int(np.argmax(scores)))
            out.append(text[-1])
            if len(out) == count or out[-1] not in draft[i : i + 1]:
                break
    return out, calls


@settings(max_examples=80, deadline=None)
@given(
    model=st.integers(0, 30), prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), length=st.integers(1, 5),
    alpha=st.sampled_from((0.0, 0.3, 0.8, 1.0)), temperature=st.sampled_from((0.0, 0.7, 1.0)), seed=st.integers(0, 9),
    top_k=st.sampled_from((0, 3)), repetition=st.sampled_from((1.0, 1.4)), limit=st.sampled_from((18, 200)),
)  # fmt: skip
def test_the_method(
    folder: Path, model: int, prompt: list[int], length: int, alpha: float, temperature: float, seed: int, top_k: int,
    repetition: float, limit: int,
) -> None:  # fmt: skip
    """Tokens and calls are those of the method written out: second looks, their weight, filters, the end of the context."""
    known = models(model)["model"]
    usual = tuple(int(np.argmax(known((t,))[0])) for t in range(VOCAB))
    module = reflected(folder, Usual(usual, length), limit, budget=3 + 2 * length, alpha=alpha, shape="fixed")
    options: dict[str, Any] = {
        "prompt": prompt, "max_new_tokens": 14, "temperature": temperature, "seed": seed, "top_k": top_k,
        "repetition_penalty": repetition, "ignore_eos": True,
    }  # fmt: skip
    filters = (temperature, top_k, 1.0, 0.0, repetition, 0.0)
    tokens, calls = transcribed(known, prompt, usual, length, alpha, 14, seed, limit, filters)
    world = World(models=models(model))
    assert list(run(module, "generate", world, **options)["output"].tokens) == tokens
    assert accepted_length(module, World(models={"model": known}), **options) == len(tokens) / calls


@settings(max_examples=60, deadline=None)
@given(
    draft=st.sampled_from(("recycling", "lookahead{branch=4}", "stand", "prompt_lookup", "draft_model", "recycling+draft_model")),
    shape=st.sampled_from(("measured", "fixed")), budget=st.integers(5, 17), model=st.integers(0, 20),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), temperature=st.sampled_from((0.0, 0.7)),
    seed=st.integers(0, 9), top_p=st.sampled_from((1.0, 0.8)), presence=st.sampled_from((0.0, 0.5)),
)  # fmt: skip
def test_without_weight_the_text_is_that_of_plain_decoding(
    folder: Path, draft: str, shape: str, budget: int, model: int, prompt: list[int], temperature: float, seed: int, top_p: float,
    presence: float,
) -> None:  # fmt: skip
    """alpha 0: to the bit, whatever was drafted, in a first and a second request."""
    module = reflected(folder, draft=draft, shape=shape, budget=budget, alpha=0.0)
    world = World(models=models(model))
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": temperature, "seed": seed, "top_p": top_p}
    kept: dict[str, Any] = {}
    for text in (prompt, prompt[::-1]):
        plain = run(module, "generate_plain", world, prompt=text, presence_penalty=presence, **options)
        assert same(run(module, "generate", world, kept, prompt=text, presence_penalty=presence, **options), plain)


def test_the_second_look_changes_the_text(folder: Path) -> None:
    """With a weight some texts differ; drafts are accepted, in fewer calls than tokens."""
    module = reflected(folder, draft="draft_model{shape=chain,length=4}", budget=11, alpha=0.5, shape="fixed")
    assert Speculate(verify="reflective").label == "lossy"
    differing = 0
    for model in range(6):
        world = World(models=models(model, likeness=0.8))
        options: dict[str, Any] = {"prompt": [1, 2], "max_new_tokens": 20, "temperature": 0.7, "ignore_eos": True}
        differing += not same(run(module, "generate", world, **options), run(module, "generate_plain", world, **options))
    assert differing >= 3
    assert accepted_length(module, World(models=models(1, 0.05)), prompt=[1], max_new_tokens=40, ignore_eos=True) > 1.7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_goes_along(folder: Path, temperature: float) -> None:
    """Words of 1 2 (3|4)* 5, whatever the second look finds likely."""
    module = reflected(folder, program=obeying, draft="draft_model", budget=11, alpha=0.6)
    automaton: dict[str, Any] = {"indptr": [0, 1, 2, 5, 5], "tokens": [1, 2, 3, 4, 5], "targets": [1, 2, 2, 2, 3]}
    for model in range(4):
        world = World(models=models(model))
        tokens = run(module, "obeying", world, prompt=[4], temperature=temperature, **automaton)["output"].tokens
        assert re.fullmatch(r"12[34]*5?", "".join(map(str, tokens))) and (len(tokens) == 12 or tokens[-1] == 5)


def on_fakes(folder: Path, drafter: Drafter, **options: Any) -> tuple[Ops, Any, dict[str, Any]]:
    """Fake models with `generate` speculated for them, that program, and its options as arrays."""
    plain = trace(generate, {"model": ModelSpec(4, 2, (1,), 100)})
    module = Module(
        [plain.function], {"programs": ("generate",), "program_defaults": (("generate", tuple(plain.defaults.items())),)}
    )
    info = PassContext(models={"model": ModelInfo(4, 2, 100, (1,))}, source=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stemma.passes.speculate.make_drafters", lambda text: (drafter,))
        found = Speculate(verify="reflective", reflection="d b", **options).run(module, info)["generate"]
    given_options = {**plain.defaults, "ignore_eos": True, "max_new_tokens": 24}
    return Ops(found, vocab=4, max_rows=32), found, {k: np.asarray(v, DTYPES.get(k, "f4")) for k, v in given_options.items()}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_natively_as_in_the_reference(folder: Path, alpha: float, temperature: float) -> None:
    """Whole texts on fake models, whose logits depend on every token before."""
    fake, function, options = on_fakes(folder, Usual((2, 3, 1, 0)), budget=9, alpha=alpha, shape="fixed")
    try:
        for seed in range(8):
            options |= {
                "seed": np.int64(seed),
                "temperature": np.float32(temperature),
                "prompt": np.array([seed % 4, 2, 3], np.int32),
            }
            native = fake.run("generate", **options)
            assert native == fake.expect(function, **options) and len(native[0]) == 24
        _, _, trees, _, followed, *_ = fake.statistics()
        assert followed / trees > 1.1 and fake.used() == [0, 0]
    finally:
        fake.close()


# ---- what it needs ----------------------------------------------------------------------------------------------------


def test_nodes_of_a_call(folder: Path) -> None:
    """1 + 2k + m nodes, of which the first 1 + k can be followed; memory counts them all."""
    module = reflected(folder, draft="prompt_lookup", budget=12, shape="fixed")
    report = dict(dict(module.properties["speculation"])["generate"])
    assert report["nodes"] == 1 + 2 * 4 + 2 and report["verify"] == "reflective" and report["label"] == "lossy"
    assert dict(report["bytes"])["logits"] == 11 * 4 * (VOCAB + 4)
    expanded = [n for n in walk(module["generate"]) if n.op.name == "expand"]
    assert [n.attrs["fresh"] for n in expanded] == [11]
    tight = reflected(folder, draft="prompt_lookup", budget=64, memory=0.0003, shape="fixed")
    report = dict(dict(tight.properties["speculation"])["generate"])
    assert report["nodes"] == 7 and sum(dict(report["bytes"]).values()) == 280


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 4}, "a budget of 4 cannot hold the root, one drafted token twice and the 2 tokens .* give 5 or more"),
        ({"alpha": 1.5}, "alpha is 1.5; it is a weight between 0 and 1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"reflection": " "}, "the reflection ' ' has no tokens"),
        ({"reflection": "a z"}, "has the token 6, which the model does not have"),
        ({"budget": 9, "memory": 0.0001}, "0.0001 MB are too few for one drafted node, which needs 0.08"),
    ],
)
def test_what_cannot_be(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        reflected(folder, draft="prompt_lookup", **options)


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    step = Speculate(verify="reflective", draft="prompt_lookup")
    with pytest.raises(PassError, match="encoded by the checkpoint's tokenizer, and no checkpoint is at hand"):
        step.run(traced(generate), context())
    for text, message in ((None, "and there is no .*tokenizer.json"), ("no json", "cannot be read")):
        if text is not None:
            (tmp_path / "tokenizer.json").write_text(text)
        given_context = context()
        given_context.source = tmp_path
        with pytest.raises(PassError, match=message):
            step.run(traced(generate), given_context)


def test_a_model_with_other_tokens(folder: Path) -> None:
    given_context = context()
    given_context.source = folder
    given_context.models["model"] = replace(given_context.models["model"], to_target=np.zeros(VOCAB, np.int32))
    with pytest.raises(PassError, match="whose tokens are not those of the checkpoint"):
        Speculate(verify="reflective", draft="prompt_lookup").run(traced(generate), given_context)
