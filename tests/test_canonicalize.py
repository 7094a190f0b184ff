"""Canonicalization, and every registered rule by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Function, Module, Node, interpret, ops
from stemma.passes import PassContext, check_rule, run_pipeline
from stemma.passes.canonicalize import Canonicalize
from stemma.passes.registry import all_rules
from stemma.passes.selftest import difference, make_inputs
from stemma.passes.simplify_weights import weight
from tests.helpers import example, function, module, roundtrip

pytestmark = pytest.mark.quick
X, Y = example("x", "f32[n, 4]"), example("y", "f32[n, 4]")
N = X.shape[0]


def canonical(node: Node) -> Node:
    return Canonicalize().run(module(y=node), PassContext())["forward"].results[0]


@pytest.mark.parametrize("name", sorted(all_rules()))
def test_every_rule_preserves_the_value_of_its_examples(name: str) -> None:
    assert check_rule(all_rules()[name]) >= 1


@pytest.mark.parametrize("name", sorted(all_rules()))
def test_every_rule_says_before_and_after(name: str) -> None:
    assert "->" in all_rules()[name].doc


def test_common_subexpressions_are_one_node() -> None:
    """Interning: building an expression twice gives the same object, so there is nothing left to eliminate."""
    first, second = (ops.tanh(X * 2.0) + Y for _ in range(2))
    assert first is second
    f = function(y=first * second)
    assert len(f.nodes) == 7  # x, 2, mul, tanh, y, add, mul


def test_rewriting_makes_expressions_common() -> None:
    a, b = ops.tanh(X * 1.0), ops.tanh(ops.neg(ops.neg(X)))
    assert canonical(a + b) is ops.tanh(X) + ops.tanh(X)


def test_dead_code_is_not_there() -> None:
    """A function is what its results depend on: dropping a result drops everything only it needed."""
    dear = ops.exp(Y)
    f = function(y=ops.tanh(X), z=dear)
    assert dear in f.nodes
    assert f.with_results([("y", f.results[0])]).nodes == (X, ops.tanh(X))


def test_one_form_for_what_models_write_differently() -> None:
    constant = ops.broadcast_to(ops.constant(value=2.0, dtype="f32"), shape=(N, 4))
    for same in (X * 2.0, ops.mul(constant, X), ops.mul(ops.reshape(ops.constant(value=2.0, dtype="f32"), shape=(1, 1)), X * 1.0)):
        assert canonical(same) is X * 2.0
    assert canonical(X / ops.sqrt(Y)) is X * ops.rsqrt(Y)
    assert canonical(ops.pow(X, 2.0)) is X * X
    folded = canonical(ops.tanh(X) * ops.sqrt(ops.constant(value=16.0, dtype="f32")))
    assert folded is ops.tanh(X) * 4.0


def test_a_broadcast_that_gives_the_shape_stays() -> None:
    row = example("r", "f32[4]")
    wide = ops.broadcast_to(row, shape=(N, 4))
    assert canonical(wide + 1.0) is wide + 1.0
    assert canonical(wide + X) is row + X


def test_weights_of_linears_keep_their_stored_type() -> None:
    """The transposed Conv1D weights of GPT-2: only the bias is widened."""
    w, b = weight("w", "bf16[4, 3]"), ops.cast(weight("b", "bf16[3]"), dtype="f32")
    x = example("x", "f32[n, m, 4]")
    n, m = x.shape[:2]
    flat = ops.linear(ops.reshape(x, shape=(n * m, 4)), ops.transpose(ops.cast(w, dtype="f32"), axes=(1, 0)), b)
    assert canonical(ops.reshape(flat, shape=(n, m, 3))) is ops.linear(x, ops.transpose(w, axes=(1, 0)), b)
    assert canonical(ops.matmul(x, ops.cast(w, dtype="f32")) + b) is ops.linear(x, ops.transpose(w, axes=(1, 0)), b)
    assert canonical(ops.embedding(ops.cast(w, dtype="f32"), example("i", "i64[n]"))).inputs[0] is w
    parts = [ops.slice(ops.cast(w, dtype="f32"), axis=0, start=s, stop=s + 2) for s in (0, 2)]
    assert canonical(ops.linear(example("z", "f32[n, 3]"), ops.concat(*parts, axis=0))).inputs[1] is w


def test_a_product_of_two_inputs_is_no_linear() -> None:
    product = ops.matmul(X, example("z", "f32[4, 3]"))
    assert canonical(product) is product


UNARY = (ops.neg, ops.tanh, ops.abs, ops.sigmoid)
BINARY = (ops.add, ops.sub, ops.mul, ops.maximum, ops.minimum)


@st.composite
def graphs(draw: st.DrawFn) -> Function:
    """Random elementwise and view chains over [n, 4] with many trivial steps."""
    pool = [X, Y, ops.broadcast_to(example("r", "f32[4]"), shape=(N, 4))]
    for _ in range(draw(st.integers(1, 12))):
        a, b = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        c = ops.constant(value=draw(st.sampled_from([0.0, 1.0, 2.0, 0.5])), dtype="f32")
        match draw(st.integers(0, 8)):
            case 0:
                new = draw(st.sampled_from(UNARY))(a)
            case 1 | 2:
                new = draw(st.sampled_from(BINARY))(a, b)
            case 3:
                new = draw(st.sampled_from(BINARY))(*draw(st.permutations([a, c])))
            case 4:
                new = ops.reshape(ops.reshape(a, shape=(4, 1, N)), shape=(N, 4))
            case 5:
                new = ops.transpose(ops.transpose(ops.reshape(a, shape=(N, 2, 2)), axes=(2, 1, 0)), axes=(2, 1, 0))
                new = ops.reshape(new, shape=(N, 4))
            case 6:
                cut = draw(st.integers(0, 4))
                parts = [ops.slice(a, axis=1, start=s, stop=t) for s, t in ((0, cut), (cut, 4))]
                new = ops.concat(*draw(st.permutations(parts)), axis=1)
            case 7:
                new = ops.where(draw(st.sampled_from([ops.gt, ops.ge]))(a, b), a, draw(st.sampled_from([a, b])))
            case _:
                new = ops.cast(ops.cast(a, dtype="f64"), dtype="f32")
        pool.append(new)
    return function("forward", y=pool[-1], z=pool[-2])


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_canonical_forms_have_the_same_value_and_are_final(graph: Function) -> None:
    before = roundtrip(Module([graph]))
    after = roundtrip(run_pipeline(before, (Canonicalize(),)).module)
    assert run_pipeline(after, (Canonicalize(),)).module is after
    for n in (1, 3):
        inputs = make_inputs(graph, {"n": n})
        results = [interpret(m["forward"], inputs, sizes={"n": n}) for m in (before, after)]
        for name in ("y", "z"):
            assert difference(results[0][name], results[1][name]) <= 1e-12
