"""Tables of drafters and the governor: natively as in the reference, and what every table must keep to."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Context, Function, Node, State, TypeMismatch, World, ops
from stemma.ir.ops.governor import EXPLORE, GovernorValue, seconds
from stemma.ir.ops.program import SequencesValue, TreeValue
from stemma.ir.ops.tables import NgramsValue, RecycledValue, TrieValue
from tests.machine import reference
from tests.native_ops import VOCAB, Ops, drawn, followed, param, results_of, run_function, started

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
    looked, matched = run("suffix_lookup", SequencesValue(MODEL, (tuple(text[:-1]),)), last, longest=longest, length=length)
    found = looked.tolist()
    for n in range(min(longest, len(text) - 1), 0, -1):  # the definition, in words of its own
        places = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if places:
            endless = list(text)
            while len(endless) < places[-1] + n + length:
                endless.append(endless[places[-1] + n + len(endless) - len(text)])
            assert found == endless[places[-1] + n : places[-1] + n + length] and matched == n
            break
    else:
        assert found == [-1] * length and matched == 0

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


def test_a_kept_table_is_lent() -> None:
    """Requests change the kept table in place; one that starts meanwhile begins with a copy, and one that fails gives it back."""
    text, trie, last = param("text", np.zeros(2, np.int32)), ops.param(name="trie", type=State("trie", (99,))), ints_of("last")
    learnt = ops.trie_learn(trie, started(text), scalar(0), branch=3)
    after = ops.get(ops.step(started(text), last), index=0)  # fails for a token out of the vocabulary
    nodes = ops.tree_nodes(ops.trie_draft(learnt, after, drawn(5, [], 4), branch=3))
    fake = Ops(Function("f", [text, trie, last], {"tokens": ops.get(nodes, index=1), "trie": learnt}))

    def tokens(id: int) -> list[int]:
        assert fake.status(id) == 1
        return [int(t) for t in fake.result(id, "tokens") if t >= 0]

    def begin(*text: int, last: int = 0) -> int:
        return fake.start("f", text=np.array(text, np.int32), last=np.array([last], np.int32))

    try:
        begin(5, 6)
        fake.advance()
        each = [begin(5, 7), begin(5, 8)]
        fake.advance()
        assert [tokens(id) for id in each] == [
            [5, 6, 7],
            [5, 6, 8],
        ]  # a table that is learnt from later does not change an earlier one
        failed = begin(5, 1, last=70)
        fake.advance()
        assert fake.status(failed) == 2 and "vocabulary" in fake.error(failed)
        again = begin(5, 8)
        fake.advance()
        assert tokens(again)[:2] == [5, 8] and 6 in tokens(again)
    finally:
        fake.close()


def ints_of(name: str) -> Node:
    return param(name, np.zeros(1, np.int32))


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


@pytest.mark.parametrize("k", [1, 8, 16, 17])
@pytest.mark.parametrize("kind", ["numbers", "equal", "few"])
def test_likeliest_of_many(kind: str, k: int) -> None:
    """The k largest of a long row: natively in two passes, with ties to the lower token."""
    vocab, rng = 1000, np.random.default_rng(k)
    row = rng.standard_normal((1, vocab)).astype(np.float32)
    if kind == "equal":
        row = np.round(row)
    if kind == "few":
        row[0, rng.permutation(vocab)[: vocab - 20]] = -np.inf
    text = np.array([3], np.int32)
    nodes = [param("text", text), param("row", row)]
    begun = ops.start(nodes[0], model="model", vocab=vocab, width=2)
    table = ops.ngrams_learn(ops.empty_state(kind="ngrams", args=(1, k)), begun, nodes[1])
    before = ops.start(ops.slice(nodes[0], axis=0, start=0, stop=0), model="model", vocab=vocab, width=2)
    tree = ops.ngrams_draft(table, before, drawn(3, [], k + 1), scalar(0, "f32"), scalar(0, "i64"), scalar(0, "i64"))
    fake = Ops(Function("f", nodes, results_of(ops.tree_nodes(tree))), vocab=vocab)
    try:
        found = fake.run("f", text=text, row=row)[1]["r0_1"].tolist()
    finally:
        fake.close()
    assert found == [3, *np.argsort(-row[0], kind="stable")[:k].tolist()]


# ---- recycling --------------------------------------------------------------------------------------------------------


def test_recycling() -> None:
    """What every node computed, followed or not, is drafted after its token; natively as in the reference."""
    nodes, path, after = [(0, 6, 1.0), (0, 7, 1.0), (2, 8, 1.0)], (5, 7), {"parents": (0, 0, 1, 2), "ranks": (0, 1, 0, 2)}
    tree = drawn_value(5, 4)
    for parent, token, score in nodes:
        tree = tree.add(parent, token, score, 0)[0]
    text = run("expand", SequencesValue(MODEL, ((1, 2),)), tree, fresh=4)[0]
    table = run("recycling_learn", RecycledValue(VOCAB, 3), text)
    assert table.after.keys() == {5, 6, 7, 8}
    for history in ((1, 2, 5), (1, 2, 5, 6), (1, 2, 5, 7), (1, 2, 5, 7, 8)):
        logits = MODEL(history)[0]
        assert [t for t, _ in table.after[history[-1]]] == np.argsort(-logits, kind="stable")[:3].tolist()
        assert sum(share for _, share in table.after[history[-1]]) == pytest.approx(1)
    for root in (5, 6, 9):
        drafted = run("recycling_draft", table, drawn_value(root, 5), **after, source=1)
        assert (len(drafted.tokens) > 1) == (root != 9)
        assert {kept_path(drafted, i)[:2] for i in range(1, len(drafted.tokens))} <= {
            (root, t) for t, _ in table.after.get(root, ())
        }

        def made(node: Node, root: int = root) -> Node:
            text = followed(node, drawn(5, nodes, 4), ops.array(values=path), len(path))
            state = ops.recycling_learn(ops.empty_state(kind="recycling", args=(VOCAB, 3)), text)
            result: Node = ops.tree_nodes(ops.recycling_draft(state, drawn(root, [], 5), **after, source=1))
            return result

        both([1, 2], made)
    with pytest.raises(TypeMismatch, match="a parent before each guess"):
        ops.recycling_draft(ops.empty_state(kind="recycling", args=(VOCAB, 3)), drawn(5, [], 4), parents=(1,), ranks=(0,))


# ---- governor ---------------------------------------------------------------------------------------------------------

NODES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 8), st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.01, 0.0])), max_size=6)


def grown(drafts: list[list[tuple[int, int, float]]], size: int) -> TreeValue:
    tree = drawn_value(1, size)
    for source, nodes in enumerate(drafts):
        for parent, token, score in nodes:
            tree = tree.add(parent, token, float(np.float32(score)), source)[0]
    return tree


def test_drafters_agree() -> None:
    tree = grown([[(0, 5, 0.5), (1, 6, 0.5)], [(0, 5, 0.25), (0, 7, 1.0)], [(0, 5, 1.0), (0, 5, 1.0), (1, 6, 1.0)]], 8)
    assert tree.tokens == (1, 5, 6, 7) and tree.sources == (0, 0, 0, 1) and tree.agreed == (0, 3, 1, 0)
    governor = GovernorValue(8, 3)
    assert len({governor.place(tree, i) for i in (1, 2, 3)}) == 3
    alone = grown([[(0, 5, 0.5), (1, 6, 0.5)]], 8)
    assert governor.place(tree, 1) != governor.place(alone, 1)


def value_of_tree(governor: GovernorValue, tree: TreeValue, nodes: tuple[int, ...]) -> float:
    scores = governor.scores(tree)
    return sum(scores[i] for i in nodes) - seconds(len(nodes) + 1) / seconds(1)


@QUICK
@given(st.tuples(NODES, NODES), st.integers(1, 12), st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=20))
def test_prune_keeps_the_best_subtree(
    drafts: tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]], size: int, turns: list[list[int]]
) -> None:
    """Against every connected subset of a small tree, after any history of acceptances; natively the same nodes."""
    tree, governor = grown([*drafts], 9), GovernorValue(size, 2)
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
    if governor.turns % EXPLORE != EXPLORE - 1:
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
        drafted = drawn(1, drafts[0], 9)
        if drafts[1]:
            parents, tokens, scores = zip(*drafts[1], strict=True)
            columns = ops.array(values=parents), ops.array(values=tokens), ops.array(values=scores, dtype="f32")
            drafted = ops.get(ops.tree_extend(drafted, *columns, source=1), index=0)
        state = ops.empty_state(kind="governor", args=(size, 2))
        for path in paths:
            state = ops.learn(state, followed(history, drafted, ops.array(values=tuple(path)), len(path)))
        result: Node = ops.tree_nodes(ops.prune(state, drafted))
        return result

    both([3], made)  # the prompt goes in with each call, so that no time is measured and the reference's costs hold


def kept_path(tree: TreeValue, node: int) -> tuple[int, ...]:
    return tuple(tree.tokens[i] for i in tree.path(node))


def test_a_new_governor_asks_every_drafter() -> None:
    governor = ops.empty_state(kind="governor", args=(9, 2))
    both([3], lambda _: ops.ask(governor, drawn(1, [], 20), source=1, slow=False))
    with pytest.raises(TypeMismatch, match="has 2 drafters, and was asked for number 2"):
        ops.attend(governor, source=2)


def test_plan_starts_with_whole_trees() -> None:
    both([3], lambda _: ops.plan(ops.empty_state(kind="governor", args=(9, 2)), size=20))
    assert run("plan", GovernorValue(9, 2), size=4) == 4


def test_empty_states_are_checked() -> None:
    for kind, args in (("trie", ()), ("trie", (0,)), ("ngrams", (2,)), ("nothing", (1,))):
        with pytest.raises(TypeMismatch, match="no empty state"):
            ops.empty_state(kind=kind, args=args)
