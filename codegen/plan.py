"""The buffer planner: places temporary values in one arena by their lifetimes.

A lifetime is an interval of *stages*: launches of one stage run without a barrier between them, so values that are live in a
common stage never share memory. Sizes are symbolic; the plan is made once, and offsets are computed from the actual sizes at each
call, so every size in range works. Values share a slot by linear scan (Poletto and Sarkar 1999); a slot is as large as its largest
value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stemma.ir import SizeLike, size

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A value that needs memory: `bytes` from stage `first` (written) to stage `last` (read for the last time), both included."""

    name: str
    bytes: SizeLike
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Slots of an arena: the byte size of each (before alignment), and the slot of each value."""

    slots: tuple[SizeLike, ...]
    slot_of: Mapping[str, int]
    lifetimes: tuple[Lifetime, ...]

    def offsets(self, sizes: Mapping[str, int]) -> tuple[list[int], int]:
        """Byte offset of each slot and the size of the arena, for the given sizes: what the emitted code computes."""
        offsets, total = [], 0
        for slot in self.slots:
            offsets.append(total)
            total += -(-size.evaluate(slot, sizes) // ALIGNMENT) * ALIGNMENT
        return offsets, total


def plan(lifetimes: Sequence[Lifetime]) -> Plan:
    """Assign each value a slot that no other value uses in any of its stages."""
    slots: list[SizeLike] = []
    busy_until: list[int] = []
    slot_of: dict[str, int] = {}
    for value in sorted(lifetimes, key=lambda v: (v.first, -_typical(v.bytes), v.name)):
        free = [i for i, last in enumerate(busy_until) if last < value.first]
        chosen = _choose(value.bytes, free, slots)
        if chosen is None:
            chosen = len(slots)
            slots.append(value.bytes)
            busy_until.append(value.last)
        slots[chosen] = size.maximum(slots[chosen], value.bytes)
        busy_until[chosen] = value.last
        slot_of[value.name] = chosen
    return Plan(tuple(slots), slot_of, tuple(lifetimes))


def _choose(needed: SizeLike, free: Iterable[int], slots: Sequence[SizeLike]) -> int | None:
    """The free slot that wastes least: a slot of equal size, else the smallest that is provably large enough, else the largest."""
    fitting: list[int] = []
    others: list[int] = []
    for i in free:
        if slots[i] == needed:
            return i
        (fitting if size.bounds(slots[i] - needed)[0] >= 0 else others).append(i)
    if fitting:
        return min(fitting, key=lambda i: (_typical(slots[i]), i))
    return max(others, key=lambda i: (_typical(slots[i]), -i), default=None)


def _typical(value: SizeLike) -> int:
    """A rough magnitude to compare sizes that no bound orders: every dimension at the lower of its limit and 512."""
    return size.evaluate(value, {d.name: max(d.lo, min(d.hi, 512)) for d in size.dims(value)})
