"""The governor of speculation: how many nodes are worth a call of the model, by what was measured.

Type of the value: State["governor", size, sources]; `size` is the most nodes that a tree may have, root included.

It measures how long calls take and how often drafted tokens are accepted: by drafter, depth, how many others agree, how many
drafted tokens the last tree brought (texts repeat themselves by stretches), and rank among siblings (or the drafter's probability,
when that is below 1). What it decides changes how long decoding takes, never what is decoded. In this reference a call of n rows
takes 1 + n / 16, drafting nothing, and speculation never pauses; the machine measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import Array
from stemma.ir.ops.program import BOOL, I32, ProgramOp, TreeValue, sequences_type, tree_size
from stemma.ir.types import State, Type

DEPTHS, AGREED, RECENT, BUCKETS, RANKS, HALVES = 8, 3, 4, 32, 16, 8
EXPLORE = 32
"""Every so many turns one more node stays, so that estimates of those that are left out do not go stale."""


def halves(x: float) -> int:
    """Twice the number of times that x, at most 1/2, is halved from there; 0 .. HALVES - 1."""
    mantissa, exponent = math.frexp(x)
    return min(max(-2 * exponent + (mantissa < math.sqrt(0.5)) - 2, 0), HALVES - 1)


def bucket(rank: int, score: float) -> int:
    """The class of a node among those of its depth: its rank when the drafter is certain (score 1), else half powers of two of what
    is missing to 1 or, below 1/2, of the score."""
    if score >= 1:
        return min(rank, RANKS - 1)
    if not score > 0:
        return BUCKETS - 1
    return RANKS + (halves(1 - score) if score >= 0.5 else HALVES + halves(score))


def prior(place: int) -> float:
    """The acceptance that is expected of a class before anything was measured: rather too high than too low."""
    if place < RANKS:
        return 0.8 / (1 + place)
    part: float = 2.0 ** (-((place - RANKS) % HALVES + 2) / 2)
    return 0.9 * (part if place >= RANKS + HALVES else 1 - part)


@dataclass(frozen=True)
class GovernorValue:
    """Acceptance [sources, DEPTHS, AGREED, RECENT, BUCKETS] and how often each was tried; turns so far.

    recent: drafted tokens that the last turn accepted, at most RECENT - 1; 1 when none was drafted.
    """

    size: int
    sources: int
    accepted: Array = field(default_factory=lambda: np.zeros(0))
    tried: Array = field(default_factory=lambda: np.zeros(0))
    turns: int = 0
    recent: int = 1

    def __post_init__(self) -> None:
        if not self.accepted.size:
            shape = (self.sources, DEPTHS, AGREED, RECENT, BUCKETS)
            object.__setattr__(self, "accepted", np.broadcast_to([prior(b) for b in range(BUCKETS)], shape).copy())
            object.__setattr__(self, "tried", np.zeros(shape, np.int64))

    def place(self, tree: TreeValue, node: int) -> tuple[int, ...]:
        """Where a node's acceptance is kept."""
        parent, source = tree.parents[node], tree.sources[node]
        rank = sum(tree.parents[i] == parent and tree.sources[i] == source for i in range(1, node))
        depth = len(tree.path(node)) - 1
        agreed = min(tree.agreed[node], AGREED - 1)
        return min(source, self.sources - 1), min(depth, DEPTHS) - 1, agreed, self.recent, bucket(rank, tree.scores[node])

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
    """`plan(governor, size=) -> i32()`: how many nodes to draft at most, root included.

    1: the root alone, and drafters may learn from it. 0: a turn of the plain loop, as no drafter brings what it costs. Drafters are
    asked again after pauses, which grow up to `LONGEST` turns while they bring too little.
    """

    name = "plan"

    def infer(self, governor: State, *, size: int) -> Type:
        governor_size(governor)
        if size < 1:
            raise TypeMismatch(f"a tree of {size} nodes has no room for its root")
        return I32

    def evaluate(self, ctx: Any, governor: Any, *, size: int) -> Any:
        return np.int32(min(size, governor.size))


class Ask(ProgramOp):
    """`ask(governor, tree, source=, slow=) -> i32()`: how many nodes the drafter of that number may draft, root included; 0: none.

    Measured by drafter and by how certain the tree is of its next token: how much better drafting makes the tree, in expected
    tokens, against the seconds that it takes. A drafter whose every node takes time (`slow`) drafts no more nodes than bring more
    than they cost, by what its first, second, ... node brought. The reference shares out what the tree has room for.
    """

    name = "ask"

    def infer(self, governor: State, tree: State, *, source: int, slow: bool) -> Type:
        _check_source(governor, source)
        tree_size(tree)
        return I32

    def evaluate(self, ctx: Any, governor: Any, tree: Any, *, source: int, slow: bool) -> Any:
        return np.int32(tree.limit // governor.sources)


class Attend(ProgramOp):
    """`attend(governor, source=) -> bool()`: whether the drafter of that number should learn from the turn: when it was asked, and
    every `SPARSELY` turns."""

    name = "attend"

    def infer(self, governor: State, *, source: int) -> Type:
        _check_source(governor, source)
        return BOOL

    def evaluate(self, ctx: Any, governor: Any, *, source: int) -> Any:
        return np.bool_(True)


def _check_source(governor: State, source: int) -> None:
    governor_size(governor)
    if not 0 <= source < int(governor.args[1]):
        raise TypeMismatch(f"the governor has {governor.args[1]} drafters, and was asked for number {source}")


class Prune(ProgramOp):
    """`prune(governor, tree) -> tree`: the nodes that are expected to bring more than they cost.

    The score of a node is the product of the measured acceptance along its path; the n best nodes stay, for the n with the largest
    sum of scores - rate * (seconds of a call with n + 1 rows - those of one row), where rate is the tokens per second that decoding
    makes at present (here: that plain decoding makes). They keep their order, and their parents stay.
    """

    name = "prune"

    def infer(self, governor: State, tree: State) -> Type:
        governor_size(governor)
        tree_size(tree)
        return tree

    def evaluate(self, ctx: Any, governor: Any, tree: Any) -> Any:
        scores = governor.scores(tree)
        best = sorted(range(1, len(scores)), key=lambda i: (-scores[i], i))[: governor.size - 1]
        count, most, total = 0, 0.0, 0.0
        for n, node in enumerate(best, 1):
            total += scores[node]
            if total - (seconds(n + 1) / seconds(1) - 1) > most:
                count, most = n, total - (seconds(n + 1) / seconds(1) - 1)
        if governor.turns % EXPLORE == EXPLORE - 1:
            count = min(len(best), count + 1)
        return subset(tree, sorted(best[:count]))


def subset(tree: TreeValue, nodes: list[int]) -> TreeValue:
    """The root and these nodes, whose parents are among them, in their order."""
    kept = [0, *nodes]
    place = {-1: -1} | {node: i for i, node in enumerate(kept)}
    return replace(
        tree, tokens=tuple(tree.tokens[i] for i in kept), parents=tuple(place[tree.parents[i]] for i in kept),
        scores=tuple(tree.scores[i] for i in kept), sources=tuple(tree.sources[i] for i in kept),
        agreed=tuple(tree.agreed[i] for i in kept),
    )  # fmt: skip


class Learn(ProgramOp):
    """`learn(governor, sequences of 1) -> governor`: takes in a turn, before `settle` forgets its tree, if it had one.

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
        drafted = sequences.tree is not None and sequences.ran > 1
        recent = min(max(len(sequences.visited) - 1, 0), RECENT - 1) if drafted else 1
        return replace(governor, accepted=accepted, tried=tried, turns=governor.turns + 1, recent=recent)


plan, ask, attend, prune, learn = Plan(), Ask(), Attend(), Prune(), Learn()
