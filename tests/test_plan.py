"""The buffer planner: no two live values overlap, for any lifetimes and sizes; in-place updates keep the old readers right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.backends.registry import get
from stemma.codegen.build import program
from stemma.codegen.plan import ALIGNMENT, Lifetime, plan
from stemma.codegen.schedule import Launch, Schedule
from stemma.ir import Function, Module, Node, SizeLike, Tensor, dim, ops, size

A, B = dim("a", 1, 300), dim("b", 0, 40)
SIZES: list[SizeLike] = [4, 100, A * 4, B * 64, A * B * 4, A * 8 + 12, size.maximum(A, B * 3) * 4, size.floordiv(A + 7, 8), 0]

lifetimes = st.lists(
    st.tuples(st.sampled_from(SIZES), st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=25
).map(lambda items: [Lifetime(f"t{i}", s, first, first + n) for i, (s, first, n) in enumerate(items)])  # fmt: skip
dims = st.fixed_dictionaries({"a": st.integers(1, 300), "b": st.integers(0, 40)})


def check_disjoint(values: list[Lifetime], made: object, sizes: dict[str, int]) -> None:
    """Live ranges of memory of values that share a stage are disjoint, aligned and inside the arena."""
    offsets, total = made.offsets(sizes)  # type: ignore[attr-defined]
    slots = made.slot_of  # type: ignore[attr-defined]
    ranges = {v.name: (offsets[slots[v.name]], offsets[slots[v.name]] + size.evaluate(v.bytes, sizes)) for v in values}
    for v in values:
        assert ranges[v.name][0] % ALIGNMENT == 0 and ranges[v.name][1] <= total
    for i, v in enumerate(values):
        for w in values[:i]:
            if v.first <= w.last and w.first <= v.last:
                (s, e), (t, f) = ranges[v.name], ranges[w.name]
                assert e <= t or f <= s, f"{v} and {w} overlap at {ranges[v.name]} and {ranges[w.name]}"


@pytest.mark.quick
@settings(max_examples=200, deadline=None)
@given(values=lifetimes, sizes=dims)
def test_live_values_never_overlap(values: list[Lifetime], sizes: dict[str, int]) -> None:
    made = plan(values)
    nonempty = [v for v in values if size.evaluate(v.bytes, sizes) > 0]
    check_disjoint(nonempty, made, sizes)


@pytest.mark.quick
def test_equal_sizes_share_one_slot() -> None:
    made = plan([Lifetime("x", A * 4, 0, 1), Lifetime("y", A * 4, 1, 2), Lifetime("z", A * 4, 2, 3)])
    assert len(made.slots) == 2 and made.slot_of["x"] == made.slot_of["z"] != made.slot_of["y"]


@pytest.mark.quick
def test_a_smaller_value_takes_a_larger_slot_and_incomparable_ones_take_the_maximum() -> None:
    made = plan([Lifetime("big", A * 8, 0, 0), Lifetime("small", A * 4, 1, 1), Lifetime("other", B * 64, 2, 2)])
    assert made.slots == (size.maximum(A * 8, B * 64),)


def operations() -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """Programs of a few instructions over earlier values: elementwise, a transpose, a wide product, an update in place."""
    names = st.sampled_from(["add", "mul", "exp", "scatter", "softmax", "transpose", "reduce_sum"])
    return st.lists(st.tuples(names, st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=14)


def graph(instructions: list[tuple[str, int, int]]) -> Function:
    """A function of x, y [a, 8] and a state s [a, 8] from random instructions; several results, the state updated if possible."""
    tensor = Tensor("f32", (A, 8))
    x, y, state = (ops.param(name=n, type=tensor) for n in ("x", "y", "s"))
    indices = ops.param(name="indices", type=Tensor("i32", (3,)))
    values: list[Node] = [x, y, state]
    for name, i, j in instructions:
        p, q = values[i % len(values)], values[j % len(values)]
        if name == "scatter":
            values.append(ops.scatter(p, indices, ops.slice(q, axis=0, start=0, stop=1) + ops.broadcast_to(
                ops.constant(value=1.0, dtype="f32"), shape=(3, 8)), axis=0))  # fmt: skip
        elif name == "softmax":
            values.append(ops.softmax(p, axis=1))
        elif name == "transpose":
            values.append(ops.transpose(ops.transpose(p, axes=(1, 0)) * 2.0, axes=(1, 0)))
        elif name == "reduce_sum":
            values.append(p + ops.reduce_sum(q, axes=(1,), keepdims=True))
        elif name == "exp":
            values.append(ops.tanh(p))
        else:
            values.append(ops.OPS[name](p, q))
    return Function("f", [x, y, state, indices], {"out": values[-1], "mid": values[len(values) // 2], "s": values[-2]})


def check_order(schedule: Schedule) -> None:
    """Every launch runs in a later stage than what it depends on; old versions are read before they are overwritten."""
    place = {launch: i for i, launch in enumerate(schedule.launches)}

    def before(first: Launch, then: Launch) -> None:
        assert place[first] < place[then] and first.stage < then.stage

    for launch in schedule.launches:
        for version in launch.reads:
            if version.writer is not None:
                before(version.writer, launch)
        for version in launch.writes:
            for reader in version.follows.readers if version.follows else []:
                if reader is not launch:
                    before(reader, launch)


def check_liveness(schedule: Schedule) -> None:
    """The lifetimes that were planned cover every stage in which a buffer is used, computed here from the launches alone."""
    used: dict[str, list[int]] = {}
    for launch in schedule.launches:
        for _, buffer in launch.arguments:
            if buffer is not None and buffer.kind == "arena":
                used.setdefault(buffer.name, []).append(launch.stage)
    planned = {v.name: v for v in schedule.plan.lifetimes}
    assert used.keys() == planned.keys()
    for name, stages in used.items():
        assert planned[name].first <= min(stages) and planned[name].last >= max(stages)


@settings(max_examples=60, deadline=None)
@given(instructions=operations(), a=st.integers(3, 300))
def test_random_programs_are_ordered_and_planned(instructions: list[tuple[str, int, int]], a: int) -> None:
    for backend in ("cpu", "null"):
        (schedule,) = program(Module([graph(instructions)]), get(backend)).schedules
        check_order(schedule)
        check_liveness(schedule)
        check_disjoint(list(schedule.plan.lifetimes), schedule.plan, {"a": a})


@pytest.mark.quick
def test_memory_is_reused() -> None:
    x = ops.param(name="x", type=Tensor("f32", (A, 8)))
    value = x
    for _ in range(4):
        value = ops.softmax(value, axis=1)
    (schedule,) = program(Module([Function("f", [x], {"y": value})]), get("cpu")).schedules
    _, arena = schedule.plan.offsets({"a": 10})
    values = schedule.plan.lifetimes
    assert arena < sum(size.evaluate(v.bytes, {"a": 10}) for v in values) and len(values) >= 3


@pytest.mark.quick
def test_a_cache_write_needs_no_copy_and_waits_for_readers_of_the_old_cache() -> None:
    cache = ops.param(name="cache", type=Tensor("f32", (2, A, 8)))
    rows = ops.param(name="rows", type=Tensor("f32", (2, 3, 8)))
    indices = ops.param(name="indices", type=Tensor("i32", (3,)))
    new = ops.scatter(cache, indices, rows, axis=1)
    (schedule,) = program(
        Module([Function("f", [rows, indices, cache], {"y": ops.tanh(new), "old": ops.exp(cache), "cache": new})]), get("cpu")
    ).schedules
    check_order(schedule)
    assert [x.op for x in schedule.launches if x.kernel is None] == []  # no copies
    assert sorted(x.op for x in schedule.launches) == ["exp", "scatter", "tanh"]


@pytest.mark.quick
def test_an_update_of_a_plain_input_works_on_a_copy() -> None:
    x = ops.param(name="x", type=Tensor("f32", (A, 8)))
    rows = ops.param(name="rows", type=Tensor("f32", (3, 8)))
    indices = ops.param(name="indices", type=Tensor("i32", (3,)))
    function = Function("f", [x, rows, indices], {"y": ops.scatter(x, indices, rows, axis=0)})
    (schedule,) = program(Module([function]), get("cpu")).schedules
    assert [x.op for x in schedule.launches] == ["copy", "scatter"]
