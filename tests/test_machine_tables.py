"""Tables of drafters and the governor: natively as in the reference, and what every table must keep to."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Context, Function, Node, TypeMismatch, World, ops
from stemma.ir.ops.governor import GovernorValue, seconds
from stemma.ir.ops.program import SequencesValue, TreeValue
from stemma.ir.ops.tables import NgramsValue, TrieValue
from tests.machine import reference
from tests.native_ops import VOCAB, drawn, followed, param, results_of, run_function, started

MODEL = reference(11, VOCAB, 2)
CONTEXT = Context(None, np.float32, World(models={"model": MODEL}))
TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=40)
QUICK = settings(max_examples=40, deadline=None)


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    """One operation's reference evaluation."""
    return ops.OPS[name].evaluate(CONTEXT, *inputs, **attrs)


def scalar(value: float, dtype: str = "i32") -> Node:
    node: Node = ops.constant(value=value, dtype=dtype)
    return node


def both(text: list[int], *results: Any) -> None:
    """Native and reference results of nodes made from the parameter `text` are equal."""
    array = np.array(text, np.int32)
    node = param("text", array)
    made = [r(node) for r in results]
    native, expected = run_function(Function("f", [node], results_of(*made)), text=array)
    for name, value in expected.items():
        np.testing.assert_array_equal(native[name], value, err_msg=name)


# ---- the text itself --------------------------------------------------------------------------------------------------


@QUICK
@given(TEXT, st.integers(1, 5), st.integers(1, 8))
def test_suffix_lookup(text: list[int], longest: int, length: int) -> None:
    last = np.array(text[-1:], np.int32)
    found = run("suffix_lookup", SequencesValue(MODEL, (tuple(text[:-1]),)), last, longest=longest, length=length).tolist()
    for n in range(min(longest, len(text) - 1), 0, -1):  # the definition, in words of its own
        places = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if places:
            endless = list(text)
            while len(endless) < places[-1] + n + length:
                endless.append(endless[places[-1] + n + len(endless) - len(text)])
            assert found == endless[places[-1] + n : places[-1] + n + length]
            break
    else:
        assert found == [-1] * length

    def made(node: Node) -> Node:
        before = ops.slice(node, axis=0, start=0, stop=len(text) - 1)
        token = ops.slice(node, axis=0, start=len(text) - 1, stop=len(text))
        result: Node = ops.suffix_lookup(started(before), token, longest=longest, length=length)
        return result

    both(text, made)


# ---- trie -------------------------------------------------------------------------------------------------------------


@QUICK
@given(TEXT, st.integers(0, 40), st.integers(2, 6), st.sampled_from([6, 12, 30, 1000]), st.integers(1, 12))
def test_trie(text: list[int], cut: int, branch: int, capacity: int, size: int) -> None:
    """Learned in two parts or whole, natively or not, a trie drafts the same, and only what was seen."""
    whole = SequencesValue(MODEL, (tuple(text),))
    trie = run("trie_learn", TrieValue(capacity), whole, np.int32(0), branch=branch)
    first = run("trie_learn", TrieValue(capacity), SequencesValue(MODEL, (tuple(text[:cut]),)), np.int32(0), branch=branch)
    parts = run("trie_learn", first, whole, np.int32(min(cut, len(text))), branch=branch)
    assert parts == trie and len(trie.counts) <= capacity
    if capacity == 1000:
        for r, n in trie.counts.items():
            assert n == sum(tuple(text[i : i + len(r)]) == r for i in range(len(text)))
    drafted = run(
        "trie_draft", trie, SequencesValue(MODEL, (tuple(text[:-1]),)), drawn_value(text[-1], size), branch=branch, source=1
    )
    check_seen(text, drafted)

    def made(node: Node) -> Node:
        head = ops.slice(node, axis=0, start=0, stop=min(cut, len(text)))
        empty = ops.empty_state(kind="trie", args=(capacity,))
        begun = ops.trie_learn(empty, started(head), scalar(0), branch=branch)
        again = ops.trie_learn(begun, started(node), scalar(min(cut, len(text))), branch=branch)
        before = started(ops.slice(node, axis=0, start=0, stop=len(text) - 1))
        again = ops.trie_draft(again, before, drawn(text[-1], [], size), branch=branch, source=1)
        result: Node = ops.tree_nodes(again)
        return result

    both(text, made)


def drawn_value(root: int, size: int) -> TreeValue:
    return TreeValue(size, size, (root,), (-1,), (1.0,), (0,))


def check_seen(text: list[int], tree: TreeValue) -> None:
    """Each path of a tree, after some suffix of the text, occurs in the text; the tree keeps its limit."""
    assert len(tree.tokens) <= tree.limit
    for node in range(1, len(tree.tokens)):
        path = [tree.tokens[i] for i in tree.path(node)]
        assert any(text[i : i + len(path)] == path for i in range(len(text)))


def test_a_full_trie_forgets_what_is_rare() -> None:
    text = [1, 2, 1, 2, 1, 2, 1, 2, *range(3, 9)] * 2
    trie = run("trie_learn", TrieValue(12), SequencesValue(MODEL, (tuple(text),)), np.int32(0), branch=2)
    assert (1, 2) in trie.counts and len(trie.counts) <= 12
    assert run("trie_learn", trie, SequencesValue(MODEL, (tuple(text),)), np.int32(len(text)), branch=2) == trie
    with pytest.raises(TypeMismatch, match="capacity"):
        ops.trie_learn(ops.empty_state(kind="trie", args=(3,)), started(param("t", np.zeros(1, np.int32))), scalar(0), branch=4)


# ---- n-grams ----------------------------------------------------------------------------------------------------------


@QUICK
@given(TEXT, st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.0, 0.7]), st.integers(0, 99))
def test_ngrams(text: list[int], order: int, k: int, size: int, temperature: float, seed: int) -> None:
    """Natively as in the reference: learned from every step of a text, then drafted; children come from the likeliest k."""
    rows = np.random.default_rng(seed).standard_normal((len(text), VOCAB)).astype(np.float32)
    table = NgramsValue(order, k)
    for end in range(1, len(text) + 1):
        table = run("ngrams_learn", table, SequencesValue(MODEL, (tuple(text[:end]),)), rows[end - 1 : end])
    best = np.argsort(-rows, axis=1, kind="stable")[:, :k]
    for context, (count, found) in table.entries.items():
        places = [e for e in range(len(context), len(text) + 1) if tuple(text[e - len(context) : e]) == context]
        assert count == len(places) and len(found) <= k
        assert {t for t, _ in found} <= {int(t) for e in places for t in best[e - 1]}
        assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    settings_of = np.float32(temperature), np.int64(seed), np.int64(3)
    before = SequencesValue(MODEL, (tuple(text[:-1]),))
    drafted = run("ngrams_draft", table, before, drawn_value(text[-1], size), *settings_of, source=2)
    for node in range(1, len(drafted.tokens)):
        path = (*text[:-1], *(drafted.tokens[i] for i in drafted.path(node)))
        assert drafted.tokens[node] in [t for t, _ in table.lookup(path[:-1])]

    array = np.array(text, np.int32)
    parameters = [param("text", array), param("rows", rows)]
    state = ops.empty_state(kind="ngrams", args=(order, k))
    for end in range(1, len(text) + 1):
        row = ops.slice(parameters[1], axis=0, start=end - 1, stop=end)
        state = ops.ngrams_learn(state, started(ops.slice(parameters[0], axis=0, start=0, stop=end)), row)
    head = started(ops.slice(parameters[0], axis=0, start=0, stop=len(text) - 1))
    chosen = scalar(temperature, "f32"), scalar(seed, "i64"), scalar(3, "i64")
    tree = ops.ngrams_draft(state, head, drawn(text[-1], [], size), *chosen, source=2)
    native, expected = run_function(Function("f", parameters, results_of(ops.tree_nodes(tree))), text=array, rows=rows)
    for name, value in expected.items():
        np.testing.assert_array_equal(native[name], value)


def test_ngrams_learn_followed_nodes() -> None:
    """While a tree is followed its nodes' rows are learned, each after its own text."""
    rows = np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32)
    tree = TreeValue(3, 3, (5, 6, 7), (-1, 0, 0), (1.0, 1.0, 1.0), (0, 0, 0))
    text = SequencesValue(MODEL, ((1, 2),))
    text = run("expand", text, tree, fresh=3)[0]
    for token in (5, 7):
        text = run("follow", text, np.array([token], np.int32))[0]
    table = run("ngrams_learn", NgramsValue(2, 2), text, rows)
    assert table.entries.keys() == {(2, 5), (5, 7)}
    for context, row in (((2, 5), rows[0]), ((5, 7), rows[2])):
        assert [t for t, _ in table.entries[context][1]] == np.argsort(-row)[:2].tolist()

    history, path, parameter = np.array([1, 2], np.int32), np.array([5, 7], np.int32), param("rows", rows)
    nodes = [param("history", history), param("path", path), parameter]
    after = followed(nodes[0], drawn(5, [(0, 6, 1.0), (0, 7, 1.0)], 3), nodes[1], 2)
    state = ops.ngrams_learn(ops.empty_state(kind="ngrams", args=(2, 2)), after, parameter)
    zero = scalar(0, "f32"), scalar(0, "i64"), scalar(0, "i64")
    drafted = ops.ngrams_draft(state, started(nodes[0]), drawn(5, [], 6), *zero)
    function = Function("f", nodes, results_of(ops.tree_nodes(drafted)))
    native, expected = run_function(function, history=history, path=path, rows=rows)
    assert native["r0_0"] == expected["r0_0"] > 1
    np.testing.assert_array_equal(native["r0_1"], expected["r0_1"])


# ---- governor ---------------------------------------------------------------------------------------------------------

NODES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 8), st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.01, 0.0])), max_size=8)


def grown(nodes: list[tuple[int, int, float]], size: int) -> TreeValue:
    tree = drawn_value(1, size)
    for parent, token, score in nodes:
        tree = tree.add(parent, token, float(np.float32(score)), 0)[0]
    return tree


def value_of_tree(governor: GovernorValue, tree: TreeValue, nodes: tuple[int, ...]) -> float:
    scores = governor.scores(tree)
    return (1 + sum(scores[i] for i in nodes)) / seconds(len(nodes) + 1)


@QUICK
@given(NODES, st.integers(1, 12), st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=20))
def test_prune_keeps_the_best_subtree(nodes: list[tuple[int, int, float]], size: int, turns: list[list[int]]) -> None:
    """Against every connected subset of a small tree, after any history of acceptances; natively the same nodes."""
    tree, governor = grown(nodes, 12), GovernorValue(size, 1)
    paths = []
    for wanted in turns:  # follow the wanted tokens as far as the tree goes
        text, path = run("expand", SequencesValue(MODEL, ((3,),)), tree, fresh=1)[0], []
        for token in (1, *wanted):
            if not run("has_child", text, np.array([token], np.int32)):
                break
            text = run("follow", text, np.array([token], np.int32))[0]
            path.append(token)
        governor = run("learn", governor, text)
        paths.append(path)
    kept = run("prune", governor, tree)
    assert kept.tokens[0] == 1 and len(kept.tokens) <= size and all(p < i for i, p in enumerate(kept.parents))
    assert {kept_path(kept, i) for i in range(len(kept.tokens))} <= {kept_path(tree, i) for i in range(len(tree.tokens))}
    if governor.turns % 16 != 15:
        best = max(
            value_of_tree(governor, tree, chosen)
            for n in range(min(len(tree.tokens), size))
            for chosen in combinations(range(1, len(tree.tokens)), n)
            if all(tree.parents[i] in (0, *chosen) for i in chosen)
        )
        again = {kept_path(tree, i): i for i in range(1, len(tree.tokens))}
        chosen = tuple(again[kept_path(kept, i)] for i in range(1, len(kept.tokens)))
        assert value_of_tree(governor, tree, chosen) == pytest.approx(best)

    def made(history: Node) -> Node:
        drafted = drawn(1, [(p, t, s) for p, t, s in nodes], 12)
        state = ops.empty_state(kind="governor", args=(size, 1))
        for path in paths:
            state = ops.learn(state, followed(history, drafted, ops.array(values=tuple(path)), len(path)))
        result: Node = ops.tree_nodes(ops.prune(state, drafted))
        return result

    both([3], made)  # the prompt goes in with each call, so that no time is measured and the reference's costs hold


def kept_path(tree: TreeValue, node: int) -> tuple[int, ...]:
    return tuple(tree.tokens[i] for i in tree.path(node))


def test_plan_starts_with_whole_trees() -> None:
    both([3], lambda _: ops.plan(ops.empty_state(kind="governor", args=(9, 2)), size=20))
    assert run("plan", GovernorValue(9, 2), size=4) == 4


def test_empty_states_are_checked() -> None:
    for kind, args in (("trie", ()), ("trie", (0,)), ("ngrams", (2,)), ("nothing", (1,))):
        with pytest.raises(TypeMismatch, match="no empty state"):
            ops.empty_state(kind=kind, args=args)
