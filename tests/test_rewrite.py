"""The rewrite engine: patterns, rules, fixpoints, explanations and the self-test of rules."""

from __future__ import annotations

from collections import Counter

import pytest

from stemma.ir import Node, PassError, ops, stamp
from stemma.passes.pattern import ANY, Match, any_of, leaf, maybe_cast, maybe_reshape, optional, scalar
from stemma.passes.rewrite import NoMatch, Rule, rewrite, rule
from stemma.passes.selftest import check_rule
from stemma.passes.why import explain
from tests.helpers import example, function, module

pytestmark = pytest.mark.quick
X, Y = example("x", "f32[n, 4]"), example("y", "f32[n, 4]")


@rule(lambda x: x * 1.0, cases=[{"x": "f32[n, 4]"}])
def mul_one(x: Node) -> Node:
    """mul(x, 1) -> x"""
    return x


def result(rules: tuple[Rule, ...], node: Node) -> Node:
    return rewrite(function(y=node), rules).results[0]


def test_a_rule_applies_everywhere_and_counts() -> None:
    fired: Counter[str] = Counter()
    new = rewrite(function(y=ops.tanh(X * 1.0) * 1.0 + X * 1.0), (mul_one,), fired)
    assert new.results[0] is ops.tanh(X) + X
    assert fired == {"mul_one": 2}  # x * 1 occurs twice but is one node


def test_nothing_to_do_gives_the_same_object() -> None:
    before = function(y=ops.tanh(X) + Y)
    assert rewrite(before, (mul_one,)) is before


def test_commutative_operations_match_in_both_orders() -> None:
    assert result((mul_one,), ops.mul(ops.constant(value=1.0, dtype="f32"), X)) is X

    @rule(lambda a, b: ops.exp(a) + ops.tanh(b))
    def swapped(a: Node, b: Node) -> Node:
        return a - b

    assert result((swapped,), ops.tanh(Y) + ops.exp(X)) is X - Y

    @rule(lambda a, b: ops.exp(a) - ops.tanh(b))
    def not_commutative(a: Node, b: Node) -> Node:
        return a + b

    before = ops.tanh(Y) - ops.exp(X)
    assert result((not_commutative,), before) is before


def test_a_variable_used_twice_must_be_one_node() -> None:
    @rule(lambda x: x * x)
    def square(x: Node) -> Node:
        return ops.pow(x, 2.0)

    assert result((square,), X * Y) is X * Y
    assert result((square,), X * X) is ops.pow(X, 2.0)


def test_attributes_are_matched_bound_and_defaulted() -> None:
    @rule(lambda x, eps: ops.neg(ops.rms_norm(x, eps=eps)))
    def captured(x: Node, eps: float) -> Node:
        return ops.layer_norm(x, eps=eps)

    assert result((captured,), -ops.rms_norm(X, eps=0.25)) is ops.layer_norm(X, eps=0.25)

    @rule(lambda x: ops.reduce_sum(x, axes=ANY))  # keepdims is not mentioned: it must be False
    def defaulted(x: Node) -> Node:
        return ops.reduce_max(x, axes=(1,))

    assert result((defaulted,), ops.reduce_sum(X, axes=(1,))).op.name == "reduce_max"
    kept = ops.reduce_sum(X, axes=(1,), keepdims=True)
    assert result((defaulted,), kept) is kept


def test_constants_by_value_and_captured() -> None:
    @rule(lambda x, c: ops.tanh(x * scalar(c)))
    def scaled(x: Node, c: float) -> Node:
        return ops.exp(x + c)

    assert result((scaled,), ops.tanh(X * 3.0)) is ops.exp(X + 3.0)
    before = ops.tanh(X * Y)
    assert result((scaled,), before) is before


def test_optional_inputs_casts_alternatives_and_leaves() -> None:
    w, b = (ops.weight(name=n, type=example(n, t).tensor) for n, t in (("w", "f32[2, 4]"), ("b", "f32[2]")))

    @rule(lambda x, w, b: ops.neg(ops.linear(x, w, optional(b))))
    def linear(x: Node, w: Node, b: Node | None) -> Node:
        return ops.linear(ops.neg(x), w, b)

    assert result((linear,), -ops.linear(X, w)) is ops.linear(-X, w)
    assert result((linear,), -ops.linear(X, w, b)) is ops.linear(-X, w, b)

    @rule(lambda x: ops.neg(maybe_cast(any_of(ops.exp(x), ops.tanh(x)))))
    def either(x: Node) -> Node:
        return ops.cast(x, dtype="f32")

    for inner in (ops.exp(X), ops.tanh(X), ops.cast(ops.tanh(X), dtype="f32")):
        assert result((either,), ops.neg(inner)) is ops.cast(X, dtype="f32")

    @rule(lambda x: ops.neg(maybe_reshape(ops.exp(x))))
    def reshaped(x: Node) -> Node:
        return ops.reshape(ops.sin(x), shape=(4, X.shape[0]))

    flat = ops.neg(ops.reshape(ops.exp(X), shape=(4, X.shape[0])))
    assert result((reshaped,), flat) is ops.reshape(ops.sin(X), shape=(4, X.shape[0]))

    @rule(lambda n: leaf(ops.iota, size=n, dtype="i32"))
    def counted(n: int) -> Node:
        return ops.cast(ops.iota(size=n), dtype="i32")

    assert result((counted,), ops.iota(size=5, dtype="i32")) is ops.cast(ops.iota(size=5), dtype="i32")


def test_new_nodes_carry_the_rule_and_the_source_line() -> None:
    @rule(lambda x: ops.log(ops.exp(x)))
    def stamped(x: Node) -> Node:
        return ops.ceil(ops.sin(x))

    with stamp(line="model.py:7 in forward"):
        before = ops.log(ops.exp(X))
    new = result((stamped,), before)
    assert new.origin == new.inputs[0].origin
    assert (new.origin.by, new.origin.line) == ("stamped", "model.py:7 in forward")


def test_alternating_rules_are_named() -> None:
    @rule(lambda a, b: a - b)
    def to_add(a: Node, b: Node) -> Node:
        return a + ops.neg(b)

    @rule(lambda a, b: a + ops.neg(b))
    def to_sub(a: Node, b: Node) -> Node:
        return a - b

    with pytest.raises(PassError, match="'to_add', 'to_sub' keep firing"):
        result((to_add, to_sub), X - Y)


@pytest.mark.parametrize("copies", [1, 3])
def test_growing_rules_are_named(copies: int) -> None:
    @rule(lambda x: ops.exp(x))
    def grow(x: Node) -> Node:
        for _ in range(copies):
            x = ops.exp(x)
        return x + x if copies == 1 else x

    with pytest.raises(PassError, match="'grow' keep firing"):
        result((grow,), ops.exp(X))


def test_a_wrong_type_names_the_rule() -> None:
    @rule(lambda x: ops.exp(x))
    def shrink(x: Node) -> Node:
        return ops.reduce_sum(x, axes=(0,))

    with pytest.raises(PassError, match="'shrink' would replace .*f32\\[n, 4\\].* the types differ"):
        result((shrink,), ops.exp(X))


def test_a_replacement_may_only_take_what_the_pattern_binds() -> None:
    with pytest.raises(PassError, match="takes \\['y'\\]"):

        @rule(lambda x: ops.exp(x))
        def unbound(y: Node) -> Node:
            return y


def single_user(match: Match) -> str | None:
    return None if match.only_used_inside(match.nodes[1]) else "tanh has other users"


@rule(lambda x: ops.exp(ops.tanh(x)), check=single_user, cases=[{"x": "f32[n]"}])
def private(x: Node) -> Node:
    """exp(tanh(x)) -> sin(x), when nothing else reads the tanh (not an identity; only for this test)"""
    return ops.sin(x)


def test_checks_may_ask_for_users() -> None:
    shared = ops.tanh(X)
    assert result((private,), ops.exp(shared)) is ops.sin(X)
    assert result((private,), ops.exp(shared) + shared) is ops.exp(shared) + shared
    assert result((private, mul_one), ops.exp(ops.tanh(X * 1.0))) is ops.sin(X)  # new nodes are looked at in the next sweep


def test_rules_enter_the_regions_of_loops_but_not_kernels() -> None:
    body = function("", again=ops.lt(ops.reduce_sum(X, axes=(0, 1)), 1.0), x=X * 1.0)
    new = result((mul_one,), ops.get(ops.loop(Y, body=body), index=0))
    assert new.inputs[0].attrs["body"].results[1] is X
    kernel = ops.fused(Y, body=function("", x=X * 1.0))
    assert result((mul_one,), kernel) is kernel


def test_why_names_the_node_the_attribute_and_the_reason() -> None:
    @rule(lambda x, w: ops.rms_norm(ops.tanh(x), w, eps=1e-6))
    def picky(x: Node, w: Node) -> Node:
        return x

    w = ops.weight(name="w", type=example("w", "f32[4]").tensor)
    found = explain(picky, module(y=ops.rms_norm(ops.tanh(X), w, eps=1e-5)))
    assert str(found[0]) == (
        "picky matched 1 of 2 operations at <rms_norm: f32[n, 4]> in forward: rms_norm has eps=1e-05 instead of 1e-06."
    )
    assert "tanh is expected instead of exp" in explain(picky, module(y=ops.rms_norm(ops.exp(X), w, eps=1e-6)))[0].reason
    assert explain(picky, module(y=ops.exp(X))) == []
    shared = ops.tanh(X)
    (rejected,) = explain(private, module(y=ops.exp(shared) + shared))
    assert rejected.reason == "tanh has other users" and not rejected.fires
    assert explain(private, module(y=ops.exp(shared)))[0].fires


def test_why_names_all_alternatives() -> None:
    @rule(lambda x: ops.neg(maybe_cast(any_of(ops.exp(x), ops.tanh(x)))))
    def either(x: Node) -> Node:
        return x

    assert explain(either, module(y=-ops.sin(X)))[0].reason == "cast or exp or tanh is expected instead of sin"


def test_why_reports_what_a_replacement_says() -> None:
    @rule(lambda x: ops.exp(x))
    def refuses(x: Node) -> Node:
        raise NoMatch("x is not small")

    assert explain(refuses, module(y=ops.exp(X)))[0].reason == "x is not small"


def test_rules_are_tested_by_themselves() -> None:
    assert check_rule(mul_one) == 5
    with pytest.raises(PassError, match="'private' changes the value of its example by"):
        check_rule(private)

    @rule(lambda x: ops.exp(x))
    def bare(x: Node) -> Node:
        return x

    with pytest.raises(PassError, match="'bare' has no examples"):
        check_rule(bare)

    @rule(lambda x, c: any_of(x * scalar(c), scalar(c) / x), cases=[{"x": "f32[n]", "c": 2.0}])
    def one_wrong_alternative(x: Node, c: float) -> Node:
        return x + x

    with pytest.raises(PassError, match="changes the value"):
        check_rule(one_wrong_alternative)
