"""Shapes of fixed trees: which ranks of guesses a tree has room for."""

from __future__ import annotations

import heapq
import math
from functools import lru_cache

Level = tuple[tuple[int, int], ...]
"""The nodes of a level, each as (place of its parent in the level before, rank among the guesses after the parent)."""

RECYCLING = (8, 21, 25, 15, 8, 3)
RANKS = (0.6, 0.12, 0.06, 0.03, 0.02, 0.015, 0.01, 0.008)
"""Typical acceptance of guesses by rank."""


def cost(path: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """What nodes of the published tree are ordered by: the sum of sqrt(rank + 1) along the path, ties to smaller ranks."""
    return sum((rank + 1) ** 0.5 for rank in path), path


@lru_cache
def published(nodes: int = sum(RECYCLING), k: int = 8) -> tuple[Level, ...]:
    """The tree of Token Recycling: 80 nodes below the root, in levels of 8, 21, 25, 15, 8 and 3; of those the `nodes` likeliest.

    Which nodes a level has is RECONSTRUCTED: of all paths of ranks with a parent in the tree, those of the smallest cost.
    """
    levels: list[list[tuple[int, ...]]] = [[()]]
    for count in RECYCLING:
        levels.append(sorted(((*path, rank) for path in levels[-1] for rank in range(k)), key=cost)[:count])
    return _levels(sorted((path for level in levels[1:] for path in level), key=lambda path: (-chance(path), path))[:nodes])


def chance(path: tuple[int, ...]) -> float:
    """The typical acceptance of a path of ranks; ranks beyond the known ones are like the last."""
    return math.prod(RANKS[min(rank, len(RANKS) - 1)] for rank in path)


def in_order(levels: tuple[Level, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The nodes of a tree by falling chance: number of the parent (0: the root; the first node is 1), and rank."""
    paths: list[tuple[int, ...]] = []
    before: list[tuple[int, ...]] = [()]
    for level in levels:
        before = [(*before[place], rank) for place, rank in level]
        paths += before
    paths.sort(key=lambda path: (-chance(path), path))
    numbers = {(): 0} | {path: i for i, path in enumerate(paths, 1)}
    return tuple(numbers[path[:-1]] for path in paths), tuple(path[-1] for path in paths)


def _levels(paths: list[tuple[int, ...]]) -> tuple[Level, ...]:
    """The levels of a tree from the paths of its nodes."""
    found: list[Level] = []
    before: list[tuple[int, ...]] = [()]
    while here := sorted(path for path in paths if len(path) == len(found) + 1):
        found.append(tuple((before.index(path[:-1]), path[-1]) for path in here))
        before = here
    return tuple(found)


@lru_cache
def likeliest(nodes: int, acceptance: tuple[float, ...], depth: int) -> tuple[Level, ...]:
    """The tree of `nodes` nodes below the root with the most accepted tokens to be expected.

    acceptance: the probability that the guess of each rank is right, if its parent is. For these the best tree is that of the
    likeliest paths, which is what the dynamic programme of Sequoia (Chen et al. 2024, arXiv:2402.12374) finds for one budget.
    """
    chosen: list[tuple[int, ...]] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(-acceptance[0], (0,))]
    while heap and len(chosen) < nodes:
        value, path = heapq.heappop(heap)
        chosen.append(path)
        if path[-1] + 1 < len(acceptance):
            heapq.heappush(heap, (value / acceptance[path[-1]] * acceptance[path[-1] + 1], (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (value * acceptance[0], (*path, 0)))
    return _levels(chosen)
