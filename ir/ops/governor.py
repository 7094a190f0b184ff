"""The governor of speculation: how many nodes are worth a call of the model, by what was measured.

Type of the value: State["governor", size, sources]; `size` is the most nodes that a tree may have, root included.

It measures how often drafted tokens are accepted, by drafter, depth, and rank among siblings (or the drafter's probability, when
that is below 1), and how long calls take. What it decides changes how long decoding takes, never what is decoded. In this reference
a call of n rows takes 1 + n / 16, drafting nothing, and speculation never pauses; the machine measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import Array
from stemma.ir.ops.program import I32, ProgramOp, TreeValue, sequences_type, tree_size
from stemma.ir.types import State, Type

DEPTHS, BUCKETS, RANKS = 8, 32, 16
EXPLORE = 16
"""Every so many turns twice as many nodes stay, so that estimates of those that are left out do not go stale."""
PLAIN = 64
"""Every so many turns the root is alone, so that the seconds of a plain call are known."""


def bucket(rank: int, score: float) -> int:
    """The class of a node among those of its depth: its rank when the drafter is certain (score 1), else half powers of two."""
    if score >= 1:
        return min(rank, RANKS - 1)
    if not score > 0:
        return BUCKETS - 1
    mantissa, exponent = math.frexp(score)
    return RANKS + min(-2 * exponent + (mantissa < math.sqrt(0.5)), BUCKETS - RANKS - 1)


def prior(place: int) -> float:
    """The acceptance that is expected of a class before anything was measured: rather too high than too low."""
    return 0.8 / (1 + place) if place < RANKS else 0.9 * 2.0 ** (-(place - RANKS) / 2)


@dataclass(frozen=True)
class GovernorValue:
    """Acceptance [sources, DEPTHS, BUCKETS] and how often each was tried; turns so far."""

    size: int
    sources: int
    accepted: Array = field(default_factory=lambda: np.zeros(0))
    tried: Array = field(default_factory=lambda: np.zeros(0))
    turns: int = 0

    def __post_init__(self) -> None:
        if not self.accepted.size:
            shape = (self.sources, DEPTHS, BUCKETS)
            object.__setattr__(self, "accepted", np.broadcast_to([prior(b) for b in range(BUCKETS)], shape).copy())
            object.__setattr__(self, "tried", np.zeros(shape, np.int64))

    def place(self, tree: TreeValue, node: int) -> tuple[int, int, int]:
        """Where a node's acceptance is kept."""
        parent, source = tree.parents[node], tree.sources[node]
        rank = sum(tree.parents[i] == parent and tree.sources[i] == source for i in range(1, node))
        depth = len(tree.path(node)) - 1
        return min(source, self.sources - 1), min(depth, DEPTHS) - 1, bucket(rank, tree.scores[node])

    def scores(self, tree: TreeValue) -> list[float]:
        """The chance that each node is reached; the root is."""
        found = [1.0]
        for node in range(1, len(tree.tokens)):
            found.append(found[tree.parents[node]] * float(self.accepted[self.place(tree, node)]))
        return found


def seconds(rows: int) -> float:
    """The reference's duration of a call."""
    return 1 + rows / 16


def governor_size(type: Type) -> int:
    """The size in a governor's type; TypeMismatch for another type."""
    if not isinstance(type, State) or type.kind != "governor":
        raise TypeMismatch(f"{type!r} is not a governor")
    return int(type.args[0])


class Plan(ProgramOp):
    """`plan(governor, size=) -> i32()`: how many nodes to draft at most, root included; 1 while speculation does not pay.

    The machine compares limits by what turns under them brought and cost, and tries others for a few turns now and then: less
    often while drafting nothing is best.
    """

    name = "plan"

    def infer(self, governor: State, *, size: int) -> Type:
        governor_size(governor)
        if size < 1:
            raise TypeMismatch(f"a tree of {size} nodes has no room for its root")
        return I32

    def evaluate(self, ctx: Any, governor: Any, *, size: int) -> Any:
        return np.int32(min(size, governor.size))


class Prune(ProgramOp):
    """`prune(governor, tree) -> tree`: the nodes that are expected to bring the most tokens per second.

    The score of a node is the product of the measured acceptance along its path; the n best nodes stay, for the n with the largest
    (1 + their scores) / (seconds of a call with n + 1 rows + seconds of drafting). They keep their order, and their parents stay.
    """

    name = "prune"

    def infer(self, governor: State, tree: State) -> Type:
        governor_size(governor)
        tree_size(tree)
        return tree

    def evaluate(self, ctx: Any, governor: Any, tree: Any) -> Any:
        scores = governor.scores(tree)
        best = sorted(range(1, len(scores)), key=lambda i: (-scores[i], i))[: governor.size - 1]
        count, rate, total = 0, 1 / seconds(1), 1.0
        for n, node in enumerate(best, 1):
            total += scores[node]
            if total / seconds(n + 1) > rate:
                count, rate = n, total / seconds(n + 1)
        if governor.turns % EXPLORE == EXPLORE - 1:
            count = min(len(best), 2 * count + 2)
        elif governor.turns % PLAIN == PLAIN // 2:
            count = 0
        return subset(tree, sorted(best[:count]))


def subset(tree: TreeValue, nodes: list[int]) -> TreeValue:
    """The root and these nodes, whose parents are among them, in their order."""
    kept = [0, *nodes]
    place = {-1: -1} | {node: i for i, node in enumerate(kept)}
    return replace(
        tree, tokens=tuple(tree.tokens[i] for i in kept), parents=tuple(place[tree.parents[i]] for i in kept),
        scores=tuple(tree.scores[i] for i in kept), sources=tuple(tree.sources[i] for i in kept),
    )  # fmt: skip


class Learn(ProgramOp):
    """`learn(governor, sequences of 1) -> governor`: takes in a turn, before `settle` forgets its tree.

    The children of followed nodes were tried; the one that was followed next was accepted. Averages are exponential.
    """

    name = "learn"

    def infer(self, governor: State, sequences: State) -> Type:
        governor_size(governor)
        sequences_type(sequences, 1)
        return governor

    def evaluate(self, ctx: Any, governor: Any, sequences: Any) -> Any:
        accepted, tried = governor.accepted.copy(), governor.tried.copy()
        for i, node in enumerate(sequences.visited):
            following = sequences.visited[i + 1] if i + 1 < len(sequences.visited) else -1
            for child in range(node + 1, sequences.ran):
                if sequences.tree.parents[child] == node:
                    place = governor.place(sequences.tree, child)
                    accepted[place] += ((child == following) - accepted[place]) / (min(tried[place], 60) + 4)
                    tried[place] += 1
        return replace(governor, accepted=accepted, tried=tried, turns=governor.turns + 1)


plan, prune, learn = Plan(), Prune(), Learn()
