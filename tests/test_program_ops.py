"""The reference meaning of decoding programs: a followed tree is the same as stepping, whatever the tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.ir import (
    OPS,
    Array,
    Context,
    Function,
    Module,
    Node,
    State,
    StemmaError,
    Tensor,
    TypeMismatch,
    World,
    dim,
    interpret,
    ops,
    parse_module,
    print_module,
    verify,
)
from stemma.ir.ops.choose import gumbel_noise
from stemma.ir.ops.program import OutputValue, ReferenceModel, SequencesValue, TreeValue

pytestmark = pytest.mark.quick
VOCAB = 5


def hashed(tokens: tuple[int, ...]) -> tuple[Array, Array]:
    """Logits that depend on every token and its place."""
    rng = np.random.default_rng([7, *tokens])
    return rng.standard_normal(VOCAB).astype(np.float32), rng.standard_normal(2).astype(np.float32)


MODEL = ReferenceModel(hashed, VOCAB, 2)
CONTEXT = Context(None, np.float32, World(models={"model": MODEL}))


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    """One operation's reference evaluation."""
    return OPS[name].evaluate(CONTEXT, *inputs, **attrs)


trees = st.lists(st.tuples(st.integers(0, 20), st.integers(0, VOCAB - 1)), max_size=20)


@given(trees, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4), st.integers(1, 24))
def test_following_a_tree_is_stepping(nodes: list[tuple[int, int]], prompt: list[int], limit: int) -> None:
    tree = TreeValue(24, limit, (prompt[-1],), (-1,), (1.0,), (0,))
    for parent, token in nodes:
        before = tree
        tree, node = tree.add(parent, token, 0.5, 0)
        assert len(tree.tokens) <= max(limit, 1) and (node == -1 or tree.tokens[node] == token)
        assert tree is before or node == len(tree.tokens) - 1
    plain = SequencesValue(MODEL, (tuple(prompt[:-1]),))
    followed, logits, _ = run("expand", plain, tree, fresh=24)
    assert followed.histories == plain.histories
    next_token = np.array([prompt[-1]], np.int32)
    while run("has_child", followed, next_token):
        followed, seen, hidden = run("follow", followed, next_token)
        plain, expected, expected_hidden = run("step", plain, next_token)
        np.testing.assert_array_equal(seen, expected)
        np.testing.assert_array_equal(hidden, expected_hidden)
        np.testing.assert_array_equal(logits[followed.visited[-1]], expected[0])
        next_token = np.array([int(np.argmax(seen))], np.int32)
    path = run("followed_path", followed, size=24)
    assert [tree.tokens[i] for i in path if i >= 0] == list(followed.histories[0][len(prompt) - 1 :])
    with pytest.raises(StemmaError, match="does not go on"):
        run("follow", followed, next_token)
    assert run("settle", followed) == plain


@given(trees, st.integers(1, 10))
def test_a_tree_may_be_expanded_as_it_grows(nodes: list[tuple[int, int]], first: int) -> None:
    whole = TreeValue(24, 24, (1,), (-1,), (1.0,), (0,))
    for parent, token in nodes[:first]:
        whole = whole.add(parent, token, 1.0, 0)[0]
    start = SequencesValue(MODEL, ((3, 2),))
    part, _, _ = run("expand", start, whole, fresh=24)
    ran = len(whole.tokens)
    for parent, token in nodes[first:]:
        whole = whole.add(parent, token, 1.0, 0)[0]
    grown, fresh, _ = run("expand", part, whole, fresh=24)
    at_once, every, _ = run("expand", start, whole, fresh=24)
    assert grown == at_once
    np.testing.assert_array_equal(fresh[: len(whole.tokens) - ran], every[ran : len(whole.tokens)])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, VOCAB - 1)), max_size=9), trees)
def test_merged_trees_have_the_paths_of_both(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    made = []
    for nodes in (a, b):
        tree = TreeValue(64, 64, (1,), (-1,), (1.0,), (0,))
        for parent, token in nodes:
            tree = tree.add(parent, token, 1.0, 0)[0]
        made.append(tree)

    def paths(tree: TreeValue) -> set[tuple[int, ...]]:
        return {tuple(tree.tokens[j] for j in tree.path(i)) for i in range(len(tree.tokens))}

    merged = run("tree_merge", *made)
    assert paths(merged) == paths(made[0]) | paths(made[1])


def test_sequences_are_values() -> None:
    """A step leaves the sequences that it was given as they were; forks go their own ways; -1 leaves a sequence alone."""
    one = SequencesValue(MODEL, ((1, 2),))
    three = run("fork", one, np.array([0, 0, 0], np.int32))
    stepped, logits, _ = run("step", three, np.array([3, -1, 4], np.int32))
    assert three.histories == ((1, 2),) * 3 and stepped.histories == ((1, 2, 3), (1, 2), (1, 2, 4))
    np.testing.assert_array_equal(logits[0], hashed((1, 2, 3))[0])
    assert not logits[1].any()
    fed, each, _ = run("feed", one, np.array([3, 4], np.int32))
    assert fed.histories == ((1, 2, 3, 4),)
    np.testing.assert_array_equal(each[0], logits[0])


def sequences(count: int = 1, model: str = "model") -> Node:
    return ops.param(name="s", type=State("sequences", (model, count, VOCAB, 0)))


def test_types_are_checked() -> None:
    token, two = ops.param(name="t", type=Tensor("i32", (1,))), sequences(2)
    with pytest.raises(TypeMismatch, match="the tokens must be i32\\[2\\]"):
        ops.step(two, token)
    with pytest.raises(TypeMismatch, match="2 sequences where 1"):
        ops.follow(two, token)
    with pytest.raises(TypeMismatch, match="need a table"):
        ops.sync(sequences(), ops.param(name="o", type=State("sequences", ("draft", 1, 9, 0))))
    output = ops.param(name="output", type=State("output"))
    with pytest.raises(TypeMismatch, match="after the end"):
        ops.emit(ops.finish(output), token)
    body = Function(
        "", [sequences(1)], {"again": ops.constant(value=True, dtype="bool"), "s": ops.fork(sequences(1), ops.array(values=(0, 0)))}
    )
    with pytest.raises(TypeMismatch, match="the loop carries"):
        ops.loop(sequences(1), body=body)


def test_a_program_prints_verifies_and_runs() -> None:
    length = dim("prompt_length", 1, 64)
    prompt, output = ops.param(name="prompt", type=Tensor("i32", (length,))), ops.param(name="output", type=State("output"))
    s, token = sequences(), ops.param(name="token", type=Tensor("i32", (1,)))
    start = ops.start(ops.slice(prompt, axis=0, start=0, stop=length - 1), model="model", vocab=VOCAB)
    stepped = ops.step(s, token)
    chosen = ops.cast(ops.argmax(ops.get(stepped, index=1), axis=1), dtype="i32")
    emitted = ops.emit(output, chosen)
    again = ops.lt(ops.emitted(emitted), ops.constant(value=6, dtype="i32"))
    body = Function("", [s, token, output], {"again": again, "s": ops.get(stepped, index=0), "token": chosen, "output": emitted})
    loop = ops.loop(start, ops.slice(prompt, axis=0, start=length - 1, stop=length), output, body=body)
    function = Function("greedy", [prompt, output], {"output": ops.get(loop, index=2)})
    module = Module([function], {"programs": ("greedy",)})
    verify(module)
    assert parse_module(print_module(module)) is module
    world = World(models={"model": ReferenceModel(lambda t: (hashed(t)[0], np.zeros(0, np.float32)), VOCAB)})
    result = interpret(function, {"prompt": [1, 2], "output": OutputValue()}, float_type=np.float32, world=world)
    history = [1, 2]
    for _ in range(6):
        history.append(int(np.argmax(hashed(tuple(history))[0])))
    assert result["output"].tokens == tuple(history[2:])


def test_noise_is_gumbel() -> None:
    """Mean 0.5772, variance pi^2 / 6, and another value wherever seed, sequence, position or token differ."""
    noise = gumbel_noise(1, 2, 3, 20000)
    assert abs(noise.mean() - 0.5772) < 0.03 and abs(noise.var() - np.pi**2 / 6) < 0.06
    for other in (gumbel_noise(2, 2, 3, 20000), gumbel_noise(1, 3, 3, 20000), gumbel_noise(1, 2, 4, 20000)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.03
    np.testing.assert_array_equal(gumbel_noise(1, 2, 3, 7), noise[:7])
