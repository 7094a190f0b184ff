"""The tracer of decoding programs: what a traced program means, and errors at the user's line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest

from stemma import program as p
from stemma.ir import Function, Module, State, World, interpret, parse_module, print_module, verify, walk
from stemma.ir.ops.program import OutputValue, ReferenceModel

pytestmark = pytest.mark.quick
VOCAB, WIDTH = 11, 3
SPECS = {"model": p.ModelSpec(VOCAB, WIDTH, (4,), 64), "draft": p.ModelSpec(VOCAB, 0, (4,), 64)}


def reference(seed: int, width: int) -> ReferenceModel:
    def compute(tokens: tuple[Any, ...]) -> tuple[Any, Any]:
        rng = np.random.default_rng([seed, len(tokens), *tokens[-3:]])
        return rng.standard_normal(VOCAB).astype(np.float32) * 3, rng.standard_normal(width).astype(np.float32)

    return ReferenceModel(compute, VOCAB, width)


MODELS = {"model": reference(1, WIDTH), "draft": reference(2, 0)}


def run(program: p.Program, *arguments: Any, host: Any = None, fixed: Any = None, **options: Any) -> dict[str, Any]:
    """Trace, verify, print and parse, interpret."""
    traced = p.trace(program, SPECS, **(fixed or {}))
    module = Module([traced.function], {"programs": (program.name,)})
    verify(module)
    assert parse_module(print_module(module)) is module
    names = [q.attrs["name"] for q in traced.function.params]
    given = {**dict(zip(names, arguments)), **traced.defaults, **options, "output": OutputValue()}
    world = World(models=MODELS, host=host or {})
    return interpret(traced.function, given, float_type=np.float32, world=world)


def tokens(program: p.Program, *arguments: Any, **options: Any) -> list[int]:
    return list(run(program, *arguments, **options)["output"].tokens)


# ---- what a traced program means --------------------------------------------------------------------------------------


def test_the_greedy_loop() -> None:
    @p.program
    def greedy(model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 6) -> None:
        text = model.start(prompt[:-1])

        def body(token: p.Value) -> Any:
            token = text.step(token).argmax()
            p.emit(token)
            return (p.emitted() < max_new_tokens) & ~model.is_end(token[0]), token

        p.loop(body, prompt[-1:])

    history: list[int] = [3, 1]
    expected: list[int] = []
    while len(expected) < 6 and 4 not in expected:
        expected.append(int(np.argmax(MODELS["model"](tuple(history))[0])))
        history.append(expected[-1])
    assert tokens(greedy, [3, 1]) == expected
    assert tokens(greedy, [3, 1], max_new_tokens=2) == expected[:2]
    assert tokens(greedy, [3, 1], fixed={"max_new_tokens": 3}) == expected[:3]
    function = p.trace(greedy, SPECS).function
    assert [q.attrs["name"] for q in function.params] == ["prompt", "max_new_tokens", "output"]
    lines = {n.op.name: n.origin.line for n in walk(function)}
    start = inspect.getsourcelines(greedy.run)[1]
    assert lines["start"] == f"test_trace.py:{start + 2} in greedy" and lines["step"].endswith(f":{start + 5} in body")


def test_values_work_as_numpy_arrays_do() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
    i = np.array([2, 0], np.int32)

    def check(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return compute

    cases = [
        check(lambda x, i: x[1:, ::2]), check(lambda x, i: x[-1, None, :-2]), check(lambda x, i: x[..., -2]),
        check(lambda x, i: x[i]), check(lambda x, i: x[:, i]), check(lambda x, i: x[i[0]]), check(lambda x, i: x[:2, i[1]]),
        check(lambda x, i: (2 - x) * 3 / (x + 0.5)), check(lambda x, i: -abs(x) ** 2), check(lambda x, i: i // 2 + 7 % (i + 1)),
        check(lambda x, i: (x > 0) & ~(x >= 3) | (x == -5)), check(lambda x, i: x.sum(1)), check(lambda x, i: x.max()),
        check(lambda x, i: x.min(-1)), check(lambda x, i: (x > 5).any(1)), check(lambda x, i: (x > -3).all()),
        check(lambda x, i: x.argmax(0)), check(lambda x, i: x.argmin()), check(lambda x, i: x.cumsum(1)),
        check(lambda x, i: x.reshape(2, 6).transpose()), check(lambda x, i: x @ x.reshape(4, 3)),
        check(lambda x, i: True & (x != 0)),
    ]  # fmt: skip

    @p.program
    def compute(x: Annotated[p.Value, p.Array("f32", 3, 4)], i: Annotated[p.Value, p.Array("i32", 2)]) -> dict[str, p.Value]:
        return {f"r{n}": case(x, i) for n, case in enumerate(cases)}

    found = run(compute, x, i)
    for n, case in enumerate(cases):
        expected = case(x, i)
        if n == 17:  # argmin of values is of the last axis
            expected = x.argmin(-1)
        np.testing.assert_allclose(found[f"r{n}"], expected, rtol=1e-6)


def test_functions_of_values() -> None:
    x = np.array([[1.0, -np.inf, 3.0], [0.5, 0.25, -1.0]], np.float32)

    @p.program
    def compute(x: Annotated[p.Value, p.Array("f32", 2, 3)], n: Annotated[p.Value, p.Array("i32", "rows")]) -> dict[str, p.Value]:
        values, indices = p.top_k(x, 2)
        return {
            "logp": p.log_softmax(x), "soft": p.softmax(x), "sum": p.logsumexp(x), "entropy": p.entropy(x),
            "values": values, "indices": indices,
            "where": p.where(x > 0, 1, 2.5), "stack": p.stack(n[0], n[-1], 7), "concat": p.concat(x, [[1.0, 2.0, 3.0]]),
            "put": x.put(1, [9.0, 8.0, 7.0]), "puts": x.put([2, 0], -1.0, axis=1), "along": p.take_along(x, indices),
            "array": p.array([[1, 2], [3, 4]]), "full": p.full((2, 2), 0.5), "count": p.arange(n.shape[0]) + p.as_value(n.shape[0]),
            "noise": p.noise(3, 1, n, 5), "flags": p.array([True, False], "bool"), "clip": p.minimum(p.maximum(x, 0.0), 1.0),
        }  # fmt: skip

    found = run(compute, x, np.array([4, 5, 6, 9], np.int32))
    finite = np.where(np.isinf(x), -1e30, x)
    soft = np.exp(finite) / np.exp(finite).sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(found["logp"], np.log(soft), rtol=1e-5)
    np.testing.assert_allclose(found["soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(found["sum"], np.log(np.exp(finite).sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], [-(r[r > 0] * np.log(r[r > 0])).sum() for r in soft], rtol=1e-5)
    assert found["indices"].tolist() == [[2, 0], [0, 1]] and found["values"].tolist() == [[3.0, 1.0], [0.5, 0.25]]
    assert found["where"].tolist() == [[1.0, 2.5, 1.0], [1.0, 1.0, 2.5]] and found["stack"].tolist() == [4, 9, 7]
    assert found["concat"].shape == (3, 3) and found["put"][1].tolist() == [9.0, 8.0, 7.0]
    assert (
        found["puts"].tolist() == [[-1.0, -np.inf, -1.0], [-1.0, 0.25, -1.0]]
        and found["along"].tolist() == found["values"].tolist()
    )
    assert found["array"].tolist() == [[1, 2], [3, 4]] and found["full"].tolist() == [[0.5, 0.5]] * 2
    assert found["count"].tolist() == [4, 5, 6, 7] and found["flags"].tolist() == [True, False]
    assert found["noise"].shape == (4, 5) and found["clip"].tolist() == [[1.0, 0.0, 1.0], [0.5, 0.25, 0.0]]


def test_sequences_are_changed_in_place_and_forked() -> None:
    @p.program
    def forks(model: p.Model, draft: p.Model, prompt: p.Tokens) -> dict[str, p.Value]:
        text = model.start(prompt)
        logits = text.step(5)
        beams = text.fork([0, 0, 0])
        beams.step([1, 2, -1])
        beams.keep([1, 1, 0])
        other = draft.start(prompt[:0])
        other.sync(text)
        return {
            "logits": logits, "hidden": text.hidden, "beams": beams.history(0, 5), "text": text.history(1, 3),
            "other": other.length(), "counts": beams.counts(1), "fed": other.feed([7, 8]), "after": other.length(),
        }  # fmt: skip

    found = run(forks, [9, 6])
    row, hidden = MODELS["model"]((9, 6, 5))
    assert (found["logits"][0] == row).all() and (found["hidden"][0] == hidden).all()
    assert found["beams"].tolist() == [[9, 6, 5, 2, -1], [9, 6, 5, 2, -1], [9, 6, 5, 1, -1]]
    assert found["text"].tolist() == [[6, 5, -1]] and found["other"] == [3] and found["after"] == [5]
    assert found["counts"][2].tolist() == [0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert (found["fed"][1] == MODELS["draft"]((9, 6, 5, 7, 8))[0]).all()


def test_regions_carry_what_they_use_and_change() -> None:
    @p.program
    def nested(model: p.Model, prompt: p.Tokens, *, times: int = 3, heat: float = 2.0) -> dict[str, p.Value]:
        text = model.start(prompt)
        offset = prompt[0] + 1

        def outer(i: p.Value, total: p.Value) -> Any:
            def inner(j: p.Value, x: p.Value) -> Any:
                return j + 1 < times, j + 1, x + offset.float() * heat

            _, x = p.loop(inner, 0, total)

            def even() -> Any:
                text.step(i)
                return x

            def odd() -> Any:
                p.emit(i)
                return 0.5

            return i + 1 < 4, i + 1, p.cond(i % 2 == 0, even, odd)

        count, total = p.loop(outer, 0, 0.0)
        p.emit(count)
        return {"total": total, "text": text.history(0, 6)}

    found = run(nested, [2, 9], times=2)
    assert found["output"].tokens == (1, 3, 4) and found["text"].tolist() == [[2, 9, 0, 2, -1, -1]]
    assert found["total"] == 0.5
    assert run(nested, [2], times=2, heat=1.0)["text"].tolist() == [[2, 0, 2, -1, -1, -1]]


def test_loops_and_branches_carry_sequences_as_values() -> None:
    @p.program
    def swap(model: p.Model, prompt: p.Tokens) -> dict[str, p.Value]:
        def body(a: p.Sequences, b: p.Sequences, i: p.Value) -> Any:
            a.step(i)
            picked = p.cond(i > 1, lambda: a.copy(), lambda: b.copy())
            return i < 2, b, picked, i + 1

        a, b, _ = p.loop(body, model.start(prompt), model.start(prompt[:1]), 0)
        return {"a": a.history(0, 6), "b": b.history(0, 6)}

    # turn 0: a = P 0, b = p -> (p, p); turn 1: a = p 1 -> (p, p); turn 2: a = p 2 -> (p, p 2)
    found = run(swap, [8, 7])
    assert found["a"].tolist() == [[8, -1, -1, -1, -1, -1]] and found["b"].tolist() == [[8, 2, -1, -1, -1, -1]]


def test_host_functions_trees_and_kept_values() -> None:
    @p.program
    def drafted(
        model: p.Model, prompt: p.Tokens, seen: Annotated[p.Value, p.Kept("i32", 2)], *, limit: int = 3
    ) -> dict[str, p.Value]:
        text = model.start(prompt[:-1])
        tree = p.tree(prompt[-1:], limit, 4)
        nodes = tree.extend([0, 0], [1, 2], [1.0, 1.0])
        other = p.tree(prompt[-1:], 4, 4)
        other.extend([0], [9], [0.5], source=1)
        tree.merge(other)
        logits = text.expand(tree, 4)
        text.follow(prompt[-1:])
        has = text.has_child(2)
        text.follow(2)
        path = text.path(3)
        text.settle()
        count, drafts, _ = tree.nodes()
        p.emit(p.host("best", logits, type=("i32", (2,))))
        p.finish()
        return {"nodes": nodes, "has": has, "path": path, "count": count, "drafts": drafts, "seen": seen + nodes}

    found = run(drafted, [1, 5], np.array([10, 20]), host={"best": lambda x: np.array([x.shape[0], -1])})
    assert found["output"].tokens == (4,) and found["nodes"].tolist() == [1, 2] and found["has"] and found["count"] == 3
    assert found["path"].tolist() == [0, 2, -1] and found["drafts"].tolist() == [5, 1, 2, -1] and found["seen"].tolist() == [11, 22]
    function = p.trace(drafted, SPECS).function
    assert function.result_names[-1] == "seen" and function.params[1].attrs["name"] == "seen"
    assert function.results[0].type == State("closed")


def test_options_have_types_and_defaults_and_can_be_fixed() -> None:
    @p.program
    def many(
        prompt: p.Tokens, *, a: int = 2, b: float = 1, c: bool = True, d: p.Long = 1 << 40, e: p.Fixed[int] = 3, f: int,
    ) -> dict[str, p.Value]:  # fmt: skip
        return {f"r{i}": p.as_value(a) + i for i in range(e)} | {
            "b": p.as_value(b),
            "c": p.as_value(c),
            "d": p.as_value(d),
            "f": p.as_value(f),
        }

    traced = p.trace(many, {})
    assert traced.defaults == {"a": 2, "b": 1.0, "c": True, "d": 1 << 40} and isinstance(traced.defaults["b"], float)
    assert [repr(q.type) for q in traced.function.params[1:-1]] == ["i32[()]", "f32[()]", "bool[()]", "i64[()]", "i32[()]"]
    one = many.fix("one", e=1, a=5)
    assert one.name == "one" and p.trace(one, {}).function.result_names == ("output", "r0", "b", "c", "d", "f")
    assert run(one, [1], f=9)["r0"] == 5 and p.trace(one, {}, e=2).defaults == {"b": 1.0, "c": True, "d": 1 << 40}


def test_programs_are_parts_of_programs() -> None:
    @p.program
    def twice(model: p.Model, prompt: p.Tokens) -> None:
        p.PROGRAMS["generate"](model, prompt, max_new_tokens=2, ignore_eos=True)
        p.PROGRAMS["generate"](model, prompt, max_new_tokens=4, ignore_eos=True)

    first = tokens(p.PROGRAMS["generate"], [1, 2], max_new_tokens=2, ignore_eos=True)
    assert tokens(twice, [1, 2]) == first * 2


def test_tracing_twice_gives_the_same_function() -> None:
    first, second = (p.trace(p.PROGRAMS["generate"], SPECS).function for _ in range(2))
    assert isinstance(first, Function) and first is second


# ---- errors -----------------------------------------------------------------------------------------------------------


def wrong() -> dict[str, tuple[Any, int, str]]:
    """Programs that cannot be traced: (program, line of the mistake after `def`, message)."""

    def silent(model: p.Model, prompt: p.Tokens) -> None:
        model.start(prompt)

    def late(prompt: p.Tokens) -> None:
        p.finish()
        p.emit(prompt)

    def forking(model: p.Model, prompt: p.Tokens) -> None:
        text = model.start(prompt)

        def body() -> Any:
            text.keep([0, 0])
            return text.length()[0] < 9

        p.loop(body)

    def growing(prompt: p.Tokens) -> None:
        def body(x: p.Value) -> Any:
            return x[0] < 9, p.concat(x, x)

        p.loop(body, prompt[:1])

    def mixed(model: p.Model, draft: p.Model, prompt: p.Tokens) -> None:
        a, b = model.start(prompt), draft.start(prompt)
        p.cond(prompt[0] > 1, lambda: a, lambda: b)

    def mixed_select(model: p.Model, draft: p.Model, prompt: p.Tokens) -> None:
        a, b = model.start(prompt), draft.start(prompt)
        a.step(1)
        b.fork([0, 0]).sync(a)

    def branching(prompt: p.Tokens) -> None:
        if prompt[0] > 1:
            p.emit(prompt)

    def both(prompt: p.Tokens) -> None:
        p.emit(p.where(prompt[0] > 1 and prompt[0] < 5, 1, 2))

    def unrolled(prompt: p.Tokens) -> None:
        for token in prompt:
            p.emit(token)

    def counted(prompt: p.Tokens) -> None:
        p.emit(list(range(prompt[0])))

    def measured(prompt: p.Tokens) -> None:
        p.emit(prompt[: len(prompt) // 2])

    def sliced(prompt: p.Tokens) -> None:
        p.emit(prompt[prompt[0] :])

    def typed(prompt: p.Tokens) -> None:
        p.emit(prompt * 0.5)

    def divided(prompt: p.Tokens) -> None:
        p.emit(prompt / 2)

    def escaping(prompt: p.Tokens) -> None:
        inside = []

        def body(x: p.Value) -> Any:
            inside.append(x + 1)
            return x < 9, x

        p.loop(body, prompt[0])
        p.emit(inside[0])

    def closing(prompt: p.Tokens) -> None:
        def body(x: p.Value) -> Any:
            p.finish()
            return x < 9, x

        p.loop(body, prompt[0])

    def forgetful(prompt: p.Tokens) -> None:
        p.loop(lambda x: x < 9, prompt[0])

    def unsure(prompt: p.Tokens) -> None:
        p.loop(lambda x: (x, x), prompt[0])

    def uneven(prompt: p.Tokens) -> None:
        p.cond(prompt[0] > 1, lambda: (1, 2), lambda: 1)

    def idle(prompt: p.Tokens) -> None:
        p.cond(prompt[0] > 1, lambda: None, lambda: None)

    def strange(model: p.Model, prompt: p.Tokens) -> None:
        p.emit(model.start(prompt))

    def unset(model: p.Model, prompt: p.Tokens) -> None:
        text = model.start(prompt)
        p.emit(p.select(text.step(1), text, heat=1.0))

    def annotated(prompt: p.Tokens, *, name: str = "x") -> None:
        p.emit(prompt)

    def bare(prompt: p.Tokens, count: int) -> None:
        p.emit(prompt)

    def missing(prompt: p.Tokens, other: p.Model) -> None:
        p.emit(prompt)

    def returned(prompt: p.Tokens) -> Any:
        return prompt

    def hidden(model: p.Model, prompt: p.Tokens) -> Any:
        return {"h": model.start(prompt).hidden}

    cases: list[tuple[Any, int, str]] = [
        (silent, 0, "never emits and returns nothing"), (late, 2, "emitted after the end"), (forking, 7, "forks without bound"),
        (growing, 4, "'?i32.2.|the body returns is i32\\[2\\]"), (mixed, 2, "of the model 'model', that of the other of 'draft'"),
        (mixed_select, 3, "1 sequences where 2 is expected"), (branching, 1, "Python `if`"), (both, 1, "& \\| ~"),
        (unrolled, 1, "Use p.loop"), (counted, 1, "known only when the program runs"), (measured, 1, "the length of this value"),
        (sliced, 1, "a slice needs bounds"), (typed, 1, "0.5 meets i32"), (divided, 1, "needs float elements"),
        (escaping, 8, "used outside of it"), (closing, 5, "Finish after it"), (forgetful, 1, "it returns 1 things"),
        (unsure, 1, "must be one bool, not i32"), (uneven, 1, "return 2 and 1 things"),
        (idle, 1, "return nothing and change nothing"),
        (strange, 1, "is not a value of the program"), (unset, 2, "no setting heat"), (annotated, 0, "'name' is annotated"),
        (bare, 0, "'count' is annotated"), (missing, 0, "needs the model 'other'; given: model, draft"),
        (returned, 0, "a dictionary of arrays"), (hidden, 1, "no step before"),
    ]  # fmt: skip
    return {run.__name__: (run, line, message) for run, line, message in cases}


@pytest.mark.parametrize("name", wrong())
def test_mistakes_are_told_at_the_users_line(name: str) -> None:
    run, line, message = wrong()[name]
    with pytest.raises(p.TraceError, match=message) as error:
        p.trace(p.program(run), SPECS)
    number = run.__code__.co_firstlineno + line
    assert f"test_trace.py:{number} in " in str(error.value)


def test_programs_are_traced_before_they_run() -> None:
    with pytest.raises(p.TraceError, match="only inside a program that is being traced"):
        p.emit([1])
    with pytest.raises(p.TraceError, match="has no option heat"):
        p.trace(p.PROGRAMS["generate"], SPECS, heat=1)
