"""Choosing tokens and constraints: natively as in the reference; verifiers of drafts against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Array, Context, Function, Node, StemmaError, TypeMismatch, World, ops
from stemma.ir.ops.choose import SETTINGS, gumbel_noise
from stemma.ir.ops.program import SequencesValue, TreeValue
from tests.machine import reference
from tests.native_ops import VOCAB, drawn, followed, native_error, param, results_of, run_function, run_op, started

MODEL = reference(11, VOCAB, 2)
CONTEXT = Context(None, np.float32, World(models={"model": MODEL}))
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
           "seed": 0, "sequence": 0}  # fmt: skip
DTYPES = dict(zip(SETTINGS, ("f32", "i32", "f32", "f32", "f32", "f32", "i64", "i64"), strict=True))


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    """One operation's reference evaluation."""
    return ops.OPS[name].evaluate(CONTEXT, *inputs, **attrs)


def values(**changed: Any) -> list[Any]:
    """Settings as arrays, in their order."""
    kinds = {"f32": np.float32, "i32": np.int32, "i64": np.int64}
    return [np.array(v, kinds[DTYPES[n]]) for n, v in (NEUTRAL | changed).items()]


def constants(**changed: Any) -> list[Node]:
    return [ops.constant(value=v, dtype=DTYPES[n]) for n, v in (NEUTRAL | changed).items()]


SETTINGS_OF = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 0.5, 1.0]), "top_k": st.sampled_from([0, 3]), "top_p": st.sampled_from([1.0, 0.8]),
    "min_p": st.sampled_from([0.0, 0.05]), "repetition_penalty": st.sampled_from([1.0, 1.5]),
    "presence_penalty": st.sampled_from([0.0, 0.5]), "seed": st.integers(0, 2**40), "sequence": st.integers(0, 2**40),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SETTINGS_OF, st.lists(st.integers(0, VOCAB - 1), max_size=5, unique=True), st.integers(0, 10**6), st.booleans())
def test_native_choices_are_those_of_the_reference(
    given_settings: dict[str, Any], tokens: list[int], seed: int, point: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((1, VOCAB)) * 2).astype(np.float32)
    logits[0, rng.integers(0, VOCAB, 2)] = -np.inf
    q = rng.dirichlet(np.ones(VOCAB), 2).astype(np.float32)
    history, path = np.array([1, 2, 2], np.int32), np.array([4], np.int32)
    arrays = {"history": history, "path": path, "logits": logits, "q": q}
    nodes = {n: param(n, v) for n, v in arrays.items()}
    text = followed(nodes["history"], drawn(4, [(0, t, 0.5) for t in tokens], 8), nodes["path"], 1)
    inputs = (nodes["logits"], text, *constants(**given_settings))
    bounds = ops.constant(value=0.2, dtype="f32"), ops.constant(value=0.6, dtype="f32")
    made = [
        ops.select(*inputs), ops.select_typical(*inputs, *bounds), ops.select_recursive(*inputs, rule="point"),
        ops.select_recursive(*inputs, nodes["q"], rule="point" if point else "scores"),
    ]  # fmt: skip
    native, expected = run_function(Function("f", list(nodes.values()), results_of(*made)), **arrays)
    for name, value in expected.items():
        np.testing.assert_array_equal(native[name], value, err_msg=name)


# ---- recursive rejection sampling -------------------------------------------------------------------------------------

TRIALS = 1500
CRITICAL = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5}  # chi-squared at p = 1e-4 by degrees of freedom


def followed_value(children: list[int], position: int) -> SequencesValue:
    """A text of position - 1 tokens and the root of a tree, which was followed, with these children."""
    count = len(children)
    tree = TreeValue(count + 1, count + 1, (0, *children), (-1, *[0] * count), (1.0,) * (count + 1), (0,) * (count + 1))
    return SequencesValue(MODEL, ((0,) * position,), tree, count + 1, (0,))


def chi_squared(counts: Array, p: Array) -> tuple[float, int]:
    kept = p * TRIALS > 0.5
    assert counts[~kept].sum() < 12
    return float(((counts[kept] - p[kept] * TRIALS) ** 2 / (p[kept] * TRIALS)).sum()), int(kept.sum()) - 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", ["point", "scores", "coupled"])
def test_recursive_selection_has_the_distribution_of_the_model(seed: int, rule: str) -> None:
    """Children sampled without replacement from any q (scores), fixed ones, and ones drawn with the very noise of the position."""
    rng = np.random.default_rng([seed, len(rule)])
    vocab, count = int(rng.integers(2, 6)), int(rng.integers(0, 4))
    p, q = rng.dirichlet(np.ones(vocab)), rng.dirichlet(np.ones(vocab) * 0.7)
    logits = np.log(p).astype(np.float32)[None]
    fixed = [int(t) for t in rng.permutation(vocab)[:count]]
    counts = np.zeros(vocab)
    for position in range(1, TRIALS + 1):
        drawn_noise = gumbel_noise(seed, 0, position, vocab)
        order = [int(t) for t in np.argsort(-(np.log(q) + drawn_noise))[: min(count, vocab)]]
        text = followed_value(fixed if rule == "point" else order, position)
        extra = [q.astype(np.float32)[None]] if rule == "scores" else []
        attrs = {"rule": "scores" if rule == "scores" else "point"}
        counts[run("select_recursive", logits, text, *values(seed=seed), *extra, **attrs)[0]] += 1
    found, freedom = chi_squared(counts, p)
    assert freedom < 1 or found < CRITICAL[freedom], (counts / TRIALS, p)


def test_the_rule_matters() -> None:
    """Sampled children under the rule for fixed ones are fine; a child's probability under q decides how often it is taken."""
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    taken = {"point": 0, "scores": 0}
    for rule in taken:
        for position in range(1, 1001):
            inputs = (np.log(p).astype(np.float32)[None], followed_value([0], position), *values(), q.astype(np.float32)[None])
            taken[rule] += int(run("select_recursive", *inputs, rule=rule)[0] == 0)
    assert abs(taken["point"] - 500) < 65 and abs(taken["scores"] - 500) < 65


def test_typical_acceptance() -> None:
    """Medusa's rule, transcribed: p(x) > min(epsilon, delta * exp(-entropy)); the likeliest of those that pass."""
    rng = np.random.default_rng(4)
    taken = 0
    for position in range(1, 200):
        logits = (rng.standard_normal((1, 6)) * 2).astype(np.float32)
        children = [int(t) for t in rng.permutation(6)[:2]]
        given_settings = values(seed=7, temperature=0.8)
        chosen = run(
            "select_typical", logits, followed_value(children, position), *given_settings, np.float32(0.09), np.float32(0.3)
        )[0]
        p = np.exp(logits[0].astype(np.float64) / np.float32(0.8))
        p /= p.sum()
        entropy = -(p * np.log(p + 1e-5)).sum()
        passing = [t for t in children if p[t] > min(0.09, 0.3 * np.exp(-entropy))]
        if passing:
            taken += 1
            assert chosen == max(passing, key=lambda t: p[t])
        else:
            assert chosen == run("select", logits, SequencesValue(MODEL, ((0,) * position,)), *given_settings)[0]
    assert 20 < taken < 199


def test_verifiers_check_their_inputs() -> None:
    text, logits = started(param("t", np.zeros(2, np.int32))), param("x", np.zeros((1, VOCAB), np.float32))
    with pytest.raises(TypeMismatch, match="rule"):
        ops.select_recursive(logits, text, *constants(), rule="other")
    with pytest.raises(TypeMismatch, match="draft distributions"):
        ops.select_recursive(logits, text, *constants(), param("q", np.zeros((2, 3), np.float32)))
    with pytest.raises(TypeMismatch, match="epsilon"):
        ops.select_typical(logits, text, *constants())
    with pytest.raises(TypeMismatch, match="settings"):
        ops.select_typical(logits, text, *constants()[:5])


# ---- constraints ------------------------------------------------------------------------------------------------------

# State 0: tokens 1, 3, 4; 1: token 2; 2: nothing; 3: tokens 0, 5
AUTOMATON = [np.array(a, np.int32) for a in ([0, 3, 4, 4, 6], [1, 3, 4, 2, 0, 5], [1, 2, 3, 0, 3, 3])]


def equal(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name, value in both[1].items():
        np.testing.assert_array_equal(both[0][name], value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 3]), st.integers(-1, 6)), min_size=1, max_size=5), st.integers(0, 999))
def test_constraints(rows: list[tuple[int, int]], seed: int) -> None:
    indptr, tokens, targets = AUTOMATON
    states, chosen = (np.array(c, np.int32) for c in zip(*rows, strict=True))
    logits = np.random.default_rng(seed).standard_normal((len(rows), 6)).astype(np.float32)
    equal(run_op("allow", logits, states, indptr, tokens))
    equal(run_op("candidates", logits, states, indptr, tokens, targets, width=4))
    equal(run_op("advance", states, chosen, indptr, tokens, targets))
    for left in (-1, 2):
        states[0] = left
        equal(run_op("advance", states, chosen, indptr, tokens, targets))
        if len(rows) > 1:
            equal(run_op("candidates", logits, states, indptr, tokens, targets, states, width=3))


def test_constraints_that_admit_nothing() -> None:
    indptr, tokens, targets = AUTOMATON
    logits, states, positions = np.zeros((2, 6), np.float32), np.array([0, 2], np.int32), np.array([7, 8], np.int32)
    cases: list[tuple[str, tuple[Any, ...], dict[str, int], str]] = [
        ("allow", (logits, states, indptr, tokens), {}, "admits no token (sequence 1, state 2)"),
        ("allow", (logits, states, indptr, tokens, positions), {}, "admits no token at position 8 (sequence 1, state 2)"),
        (
            "candidates",
            (logits, states * 0 - 1, *AUTOMATON, positions),
            {"width": 3},
            "no token at position 7 (sequence 0, state -1)",
        ),
        ("candidates", (logits, states, *AUTOMATON), {"width": 2}, "admits 3 tokens in state 0; `candidates` has width=2"),
        ("allow", (logits, states + 3, indptr, tokens), {}, "has 4 states, and was asked for state 5"),
        ("allow", (logits[:, :4], states * 0, indptr, tokens), {}, "names the token 4; the vocabulary has 4"),
        ("advance", (states, states, np.array([0, 9, 1], np.int32), tokens, targets), {}, "state 0 has the edges 0 to 9 of 6"),
    ]
    for name, arrays, attrs, message in cases:
        assert message in native_error(name, *arrays, **attrs), name
        with pytest.raises(StemmaError) as error:
            run(name, *arrays, **attrs)
        assert message in str(error.value)


def test_constraint_types_are_checked() -> None:
    x, s, a = param("x", np.zeros((1, 3), np.float32)), param("s", np.zeros(1, np.int32)), param("a", np.zeros(2, np.int32))
    with pytest.raises(TypeMismatch, match="i32 arrays of one axis"):
        ops.allow(x, s, x, a)
    with pytest.raises(TypeMismatch, match="i32\\[1\\]"):
        ops.allow(x, a, a, a)
    with pytest.raises(TypeMismatch, match="edges are"):
        ops.advance(s, s, a, s, a)
    with pytest.raises(TypeMismatch, match="width"):
        ops.candidates(x, s, a, a, a, width=0)
