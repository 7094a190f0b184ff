"""Token trees: drafted continuations of one sequence, run in one call and followed as if they had been stepped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from stemma.ir.errors import StemmaError, TypeMismatch
from stemma.ir.formats import Array
from stemma.ir.ops.program import (
    BOOL,
    I32,
    ProgramOp,
    SequencesValue,
    TreeValue,
    expect,
    outputs_type,
    sequences_type,
    stack_rows,
    tree_size,
)
from stemma.ir.types import State, Tensor, Tuple, Type


class Tree(ProgramOp):
    """`tree(root i32[1], limit i32(), size=)`: a tree of its root alone, which may grow to min(limit, size) nodes."""

    name = "tree"

    def infer(self, root: Tensor, limit: Tensor, *, size: int) -> Type:
        expect(root, Tensor("i32", (1,)), "the root")
        expect(limit, I32, "the limit")
        if size < 1:
            raise TypeMismatch(f"a tree of {size} nodes has no room for its root")
        return State("tree", (size,))

    def evaluate(self, ctx: Any, root: Any, limit: Any, *, size: int) -> Any:
        return TreeValue(size, int(limit), (int(root[0]),), (-1,), (1.0,), (0,))


class TreeExtend(ProgramOp):
    """`tree_extend(tree, parents i32[m], tokens i32[m], scores f32[m], source=0) -> (tree, nodes i32[m])`: adds children.

    A child that is there already is found, not added. A negative token or parent, or a tree that is full, gives node -1. scores:
    the drafter's probability of the token after its parent (1 for a certain one); source: a number for the drafter.
    """

    name = "tree_extend"

    def infer(self, tree: State, parents: Tensor, tokens: Tensor, scores: Tensor, *, source: int = 0) -> Type:
        tree_size(tree)
        if not isinstance(parents, Tensor) or parents.rank != 1 or parents.dtype != "i32":
            raise TypeMismatch(f"the parents are i32[m], not {parents!r}")
        expect(tokens, parents, "the tokens")
        expect(scores, Tensor("f32", parents.shape), "the scores")
        return Tuple((tree, parents))

    def evaluate(self, ctx: Any, tree: Any, parents: Any, tokens: Any, scores: Any, *, source: int) -> Any:
        nodes = []
        for parent, token, score in zip(parents, tokens, scores, strict=True):
            tree, node = tree.add(int(parent), int(token), float(score), source)
            nodes.append(node)
        return tree, np.array(nodes, np.int32)


class TreeMerge(ProgramOp):
    """`tree_merge(a, b)`: a with the nodes of b that it lacks and has room for; both have the same root."""

    name = "tree_merge"

    def infer(self, a: State, b: State) -> Type:
        tree_size(a), tree_size(b)
        return a

    def evaluate(self, ctx: Any, a: Any, b: Any) -> Any:
        if a.tokens[0] != b.tokens[0]:
            raise StemmaError(f"tree_merge: the roots are the tokens {a.tokens[0]} and {b.tokens[0]}.")
        place = {0: 0}
        for i in range(1, len(b.tokens)):
            a, place[i] = a.add(place[b.parents[i]], b.tokens[i], b.scores[i], b.sources[i])
        return a


class TreeNodes(ProgramOp):
    """`tree_nodes(tree) -> (count i32(), tokens i32[size], parents i32[size])`: its nodes, then -1."""

    name = "tree_nodes"

    def infer(self, tree: State) -> Type:
        each = Tensor("i32", (tree_size(tree),))
        return Tuple((I32, each, each))

    def evaluate(self, ctx: Any, tree: Any) -> Any:
        def padded(values: tuple[int, ...]) -> Array:
            return np.array([*values, *[-1] * (tree.size - len(values))], np.int32)

        return np.int32(len(tree.tokens)), padded(tree.tokens), padded(tree.parents)


class Expand(ProgramOp):
    """`expand(sequences of 1, tree, fresh=) -> (sequences, logits f32[fresh, vocab], hidden f32[fresh, width])`.

    Runs the nodes of the tree that these sequences have not run yet, as continuations: node i after the path from the root to it.
    The rows are those of the first `fresh` new nodes in their order, then 0. The root is the next token of the sequence; histories
    do not change. The tree of a later `expand` must be the earlier one, grown.
    """

    name = "expand"

    def infer(self, sequences: State, tree: State, *, fresh: int) -> Type:
        sequences_type(sequences, 1)
        if not 1 <= fresh <= tree_size(tree):
            raise TypeMismatch(f"fresh={fresh} is not between 1 and the size of the tree, {tree_size(tree)}")
        return outputs_type(sequences, fresh)

    def evaluate(self, ctx: Any, sequences: Any, tree: Any, *, fresh: int) -> Any:
        if sequences.visited:
            raise StemmaError("expand: a path of the tree was already followed. Settle it first.")
        ran = sequences.ran if sequences.tree is not None else 0
        if sequences.tree is not None and tree.tokens[: len(sequences.tree.tokens)] != sequences.tree.tokens:
            raise StemmaError("expand: the tree is not the one of the last expand, grown. Settle it first.")
        rows = [sequences.model(sequences.base + tuple(tree.tokens[j] for j in tree.path(i))) for i in range(ran, len(tree.tokens))]
        logits, hidden = stack_rows(rows, sequences.model, fresh)
        return replace(sequences, tree=tree, ran=len(tree.tokens)), logits, hidden


class HasChild(ProgramOp):
    """`has_child(sequences of 1, token i32[1]) -> bool()`: whether the expanded tree goes on with that token."""

    name = "has_child"

    def infer(self, sequences: State, token: Tensor) -> Type:
        sequences_type(sequences, 1)
        expect(token, Tensor("i32", (1,)), "the token")
        return BOOL

    def evaluate(self, ctx: Any, sequences: Any, token: Any) -> Any:
        return np.bool_(_child(sequences, int(token[0])) >= 0)


def _child(sequences: Any, token: int) -> int:
    if sequences.tree is None:
        return -1
    node = sequences.tree.child(sequences.visited[-1] if sequences.visited else -1, token)
    return int(node) if node < sequences.ran else -1


class Follow(ProgramOp):
    """`follow(sequences of 1, token i32[1])`: what `step` gives, read from the expanded tree. The token must be a child."""

    name = "follow"

    def infer(self, sequences: State, token: Tensor) -> Type:
        sequences_type(sequences, 1)
        expect(token, Tensor("i32", (1,)), "the token")
        return outputs_type(sequences, 1)

    def evaluate(self, ctx: Any, sequences: Any, token: Any) -> Any:
        node = _child(sequences, int(token[0]))
        if node < 0:
            raise StemmaError(f"follow: the tree does not go on with the token {int(token[0])}.")
        history = (*sequences.histories[0], int(token[0]))
        logits, hidden = stack_rows([sequences.model(history)], sequences.model, 1)
        return replace(sequences, histories=(history,), visited=(*sequences.visited, node)), logits, hidden


class Settle(ProgramOp):
    """`settle(sequences of 1)`: keeps the path that was followed, as if it had been stepped, and forgets the rest of the tree."""

    name = "settle"

    def infer(self, sequences: State) -> Type:
        sequences_type(sequences, 1)
        return sequences

    def evaluate(self, ctx: Any, sequences: Any) -> Any:
        return SequencesValue(sequences.model, sequences.histories)


class FollowedPath(ProgramOp):
    """`followed_path(sequences of 1, size=) -> i32[size]`: the nodes followed so far, root first, then -1."""

    name = "followed_path"

    def infer(self, sequences: State, *, size: int) -> Type:
        sequences_type(sequences, 1)
        return Tensor("i32", (size,))

    def evaluate(self, ctx: Any, sequences: Any, *, size: int) -> Any:
        path = sequences.visited[:size]
        return np.array([*path, *[-1] * (size - len(path))], np.int32)


class NodeTopK(ProgramOp):
    """`node_top_k(sequences of 1, k=, size=) -> (values f32[size, k], tokens i32[size, k])`: the likeliest tokens after each node.

    Of each node that was expanded, in order; then -inf and -1. Reads no more rows than there are nodes.
    """

    name = "node_top_k"

    def infer(self, sequences: State, *, k: int, size: int) -> Type:
        sequences_type(sequences, 1)
        if k < 1 or size < 1:
            raise TypeMismatch(f"node_top_k takes k >= 1 and size >= 1, not {k} and {size}")
        return Tuple((Tensor("f32", (size, k)), Tensor("i32", (size, k))))

    def evaluate(self, ctx: Any, sequences: Any, *, k: int, size: int) -> Any:
        values, tokens = np.full((size, k), -np.inf, np.float32), np.full((size, k), -1, np.int32)
        for i in range(min(sequences.ran if sequences.tree is not None else 0, size)):
            path = tuple(sequences.tree.tokens[j] for j in sequences.tree.path(i))
            logits = sequences.model(sequences.base + path)[0]
            order = np.argsort(-logits, kind="stable")[:k]
            values[i, : len(order)], tokens[i, : len(order)] = logits[order], order
        return values, tokens


tree, tree_extend, tree_merge, tree_nodes = Tree(), TreeExtend(), TreeMerge(), TreeNodes()
expand, has_child, follow, settle, followed_path = Expand(), HasChild(), Follow(), Settle(), FollowedPath()
node_top_k = NodeTopK()
