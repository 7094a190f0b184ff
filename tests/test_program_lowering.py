"""Programs as blobs: what the lowering writes does what the IR means, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stemma.codegen.blob import Served
from stemma.codegen.program import Listed, attach, lower_programs, models_of, program_table, programs_of, without_programs
from stemma.ir import (
    CompileError,
    Function,
    Module,
    Node,
    State,
    Tensor,
    World,
    dim,
    interpret,
    ops,
    parse_module,
    print_module,
    stamp,
)
from stemma.ir.ops.program import OutputValue, ReferenceModel
from tests.blob import Reader, Runner

pytestmark = pytest.mark.quick
VOCAB = 7
MODEL = Served("model", VOCAB, 2, (3,), 50)


def tensor(name: str, *shape: int | str, dtype: str = "i32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


STEP = {
    "index": 1,
    "dims": [{"name": n, "lo": 0, "hi": 64} for n in ("rows", "sequences", "context", "outputs", "slots")],
    "inputs": [tensor(n, "rows") for n in ("tokens", "positions", "slots", "sequence")]
    + [tensor("table", "sequences", "context"), tensor("selected", "outputs")],
    "states": [tensor("k", 4, "slots", 8, dtype="bf16"), tensor("v", "slots", 3, dtype="f32")],
    "results": [tensor("logits", "outputs", VOCAB, dtype="f32"), tensor("hidden", "outputs", 2, dtype="f32")],
}  # fmt: skip
SCORE = {"index": 0, "dims": [{"name": "n", "lo": 1, "hi": 9}], "inputs": [tensor("x", "n", 2, dtype="f32")], "states": [],
         "results": [tensor("y", "n", dtype="f32")]}  # fmt: skip


def compute(tokens: tuple[Any, ...]) -> tuple[Any, Any]:
    rng = np.random.default_rng([5, len(tokens), *(t + 1 for t in tokens)])
    return rng.standard_normal(VOCAB).astype(np.float32), rng.standard_normal(2).astype(np.float32)


def world() -> World:
    return World(models={"model": ReferenceModel(compute, VOCAB, 2)}, compiled={"score": lambda x: x.sum(1)})


def param(name: str, type: Any) -> Node:
    return ops.param(name=name, type=type)


def constant(value: float, dtype: str) -> Node:
    return ops.constant(value=value, dtype=dtype)


def generate() -> Listed:
    """A sampling loop that counts, conditionally and through a region, what it emits."""
    n = dim("prompt_length", 1, 50)
    prompt, output = param("prompt", Tensor("i32", (n,))), param("output", State("output"))
    limit, heat = param("max_new_tokens", Tensor("i32", ())), param("temperature", Tensor("f32", ()))
    text = ops.start(ops.slice(prompt, axis=0, start=0, stop=n - 1), model="model", vocab=VOCAB, width=2)
    token, s = param("token", Tensor("i32", (1,))), param("s", text.type)
    stepped = ops.step(s, token)
    after, logits = ops.get(stepped, index=0), ops.get(stepped, index=1)
    settings = [heat, *(constant(v, t) for v, t in ((0, "i32"), (1.0, "f32"), (0.0, "f32"), (1.0, "f32"), (0.0, "f32")))]
    next_token = ops.select(logits, after, *settings, constant(3, "i64"), constant(0, "i64"))
    emitted = ops.emit(output, next_token)
    count, one = param("count", Tensor("i32", ())), param("one", Tensor("i32", ()))
    more = Function("", [one], {"r": one + 1})
    same = Function("", [one], {"r": one})
    even = ops.eq(ops.mod(ops.emitted(emitted), constant(2, "i32")), constant(0, "i32"))
    counted = ops.cond(even, count, then=more, otherwise=same)
    again = ops.logical_and(
        ops.lt(ops.emitted(emitted), limit), ops.logical_not(ops.reduce_max(ops.is_in(next_token, ids=(3,)), axes=(0,)))
    )
    body = Function(
        "", [s, token, output, limit, heat, count],
        {"again": again, "s": after, "token": next_token, "output": emitted, "limit": limit, "heat": heat, "count": counted},
    )  # fmt: skip
    ran = ops.loop(
        text,
        ops.slice(prompt, axis=0, start=n - 1, stop=n),
        output,
        limit,
        heat,
        constant(0, "i32") + constant(0, "i32"),
        body=body,
    )
    state = ops.get(ran, index=0)
    results = {
        "output": ops.get(ran, index=2), "count": ops.get(ran, index=5), "length": ops.length(state),
        "half": ops.reshape(ops.iota(size=2 * (n // 2), dtype="i32"), shape=(2, n // 2)),
        "size": ops.size_value(size=n * 3 - 1, dtype="i32"),
    }  # fmt: skip
    return Listed(Function("generate", [prompt, limit, heat, output], results), {"max_new_tokens": 8, "temperature": 0.0})


def lower(*programs: Listed, functions: Any = None) -> Reader:
    return Reader(lower_programs(programs, [MODEL], functions or {"step": STEP, "score": SCORE}))


def only(results: dict[str, Node], *params: Node) -> Listed:
    return Listed(Function("p", params, results))


@pytest.mark.parametrize("heat", [0.0, 0.9])
@pytest.mark.parametrize("prompt", [[1], [4, 5, 0, 2, 6], [2, 2]])
def test_a_blob_means_what_the_program_means(prompt: list[int], heat: float) -> None:
    listed = generate()
    inputs = {"prompt": prompt, "max_new_tokens": 12, "temperature": heat, "output": OutputValue()}
    expected = interpret(listed.function, inputs, float_type=np.float32, world=world())
    found = Runner(lower(listed), "generate", world())({k: v for k, v in inputs.items() if k != "output"})
    assert found.keys() == expected.keys() and found["output"] == expected["output"] and len(found["output"].tokens) > 1
    for name in found.keys() - {"output"}:
        np.testing.assert_array_equal(found[name], expected[name])


def test_models_functions_and_parameters_are_described() -> None:
    blob = lower(generate())
    (model,) = blob.models
    assert model == {
        "name": "model", "index": 1, "vocab": VOCAB, "width": 2, "mix": 1, "context": 50, "rows": 64, "sizes": [0, 2, 3, 1, 4],
        "buffers": [*((i, 0, 0) for i in range(6)), (6, 4, 16), (6, 1, 12), (7, 0, 0), (8, 0, 0)], "eos": [3],
    }  # fmt: skip
    (function,) = blob.functions
    assert function == {
        "name": "score", "index": 0, "sizes": 1, "inputs": [("f32", [(1, 0), (0, 2)])], "results": [("f32", [(1, 0)])],
    }  # fmt: skip
    program = blob.programs["generate"]
    assert [(p["name"], p["default"], p["persistent"]) for p in program.params] == [
        ("prompt", None, -1), ("max_new_tokens", 8, -1), ("temperature", 0.0, -1), ("output", None, -1),
    ]  # fmt: skip
    assert (
        program.dims == ["prompt_length"]
        and program.params[0]["shape"] == [(1, 0)]
        and program.params[3]["state"] == ("output", [])
    )


def test_values_are_moved_at_their_last_use_and_readers_come_first() -> None:
    """The states of the loop are changed in place: nothing else holds them when the changing operation runs."""
    code = {name: inputs for name, inputs, _, _ in lower(generate()).programs["generate"].blocks[-1].code}
    assert all(r < 0 for r in code["step"]) and all(r < 0 for r in code["emit"][:1])
    s, token = param("s", State("sequences", ("model", 1, VOCAB, 2))), param("token", Tensor("i32", (1,)))
    stepped = ops.step(s, token)
    listed = only({"s": ops.get(stepped, index=0), "after": ops.length(s), "token": token}, s, token)
    names = [(name, inputs) for name, inputs, _, _ in lower(listed).programs["p"].main.code]
    assert names == [("length", [0]), ("step", [-1, 1])]  # the token is a result, so it stays
    again = ops.step(ops.get(stepped, index=0), token)  # the first of several results is moved too
    names = [(name, inputs) for name, inputs, _, _ in lower(only({"s": ops.get(again, index=0)}, s, token)).programs["p"].main.code]
    assert names == [("step", [-1, 1]), ("step", [-3, -2])]


def test_constants_are_folded_and_registers_reused() -> None:
    x = param("x", Tensor("f32", (3,)))
    table = ops.array(values=(1.5, -0.0, 2.0), dtype="f32") * constant(2.0, "f32")
    y = x
    for _ in range(20):
        y = ops.tanh(y) + table
    main = lower(only({"y": y}, x)).programs["p"].main
    (value,) = main.constants.values()
    np.testing.assert_array_equal(value, np.array([3.0, -0.0, 4.0], np.float32))
    assert np.signbit(value[1]) and main.registers <= 4 and {c[0] for c in main.code} == {"tanh", "add"}
    whole = lower(only({"k": table})).programs["p"].main
    assert not whole.code and whole.results == list(whole.constants)


def test_operations_of_models_are_decomposed_where_they_can_be() -> None:
    x = param("x", Tensor("f32", (2, 4)))
    w = ops.array(values=(1.0, 2.0, 0.5, 3.0), dtype="f32")
    listed = only({"y": ops.rms_norm(x, w, eps=1e-6), "z": ops.silu(x)}, x)
    rows = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    found = Runner(lower(listed), "p", World())({"x": rows})
    expected = interpret(listed.function, {"x": rows}, float_type=np.float32)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-6)
    np.testing.assert_allclose(found["z"], expected["z"], rtol=1e-6)


def test_compiled_functions_and_host_functions() -> None:
    n = dim("x_length", 1, 9)
    x = param("x", Tensor("f32", (n, 2)))
    scored = ops.call(x, function="score", type=Tensor("f32", (n,)))
    answer = ops.host(scored, function="best", type=Tensor("i32", ()))
    world_ = World(compiled=world().compiled, host={"best": lambda s: np.int32(np.argmax(s))})
    found = Runner(lower(only({"best": answer, "scores": scored}, x)), "p", world_)({"x": np.eye(3, 2, dtype=np.float32) * 2})
    assert found["best"] == 0 and found["scores"].tolist() == [2.0, 2.0, 0.0]


def test_python_functions_have_one_type_each() -> None:
    x = param("x", Tensor("f32", (2,)))
    types = [Tensor("i32", ()), Tensor("i32", ()), Tensor("f32", (2,))]
    calls = [ops.host(x + float(i), function="judge", type=t) for i, t in enumerate(types)]
    region = Function("", [x], {"r": ops.cast(calls[1], dtype="f32")})
    test = ops.gt(ops.reduce_sum(x, axes=(0,)), constant(0.0, "f32"))
    branch = ops.cond(test, x, then=region, otherwise=region)
    assert program_table(only({"a": calls[0], "b": branch}, x))["host"] == {"judge": "i32[()]"}
    with pytest.raises(CompileError, match="'p' expects .* of the function 'judge'"):
        program_table(only({"a": calls[0], "c": calls[2]}, x))


def test_persistent_parameters_are_those_that_are_results_too() -> None:
    count, output = param("count", Tensor("i64", ())), param("output", State("output"))
    listed = only({"output": output, "count": count + 1}, count, output)
    assert [p["persistent"] for p in lower(listed).programs["p"].params] == [1, -1]


def refused() -> dict[str, tuple[Listed, str]]:
    x, n = param("x", Tensor("f32", (2, 4))), dim("n", 1, 9)
    with stamp(line="mine.py:12 in decode"):
        rows = ops.reshape(x, shape=(1, 2, 4))
        filtered = ops.conv(rows, rows, stride=(1,), padding=(0,), dilation=(1,))
        half = ops.cast(x, dtype="bf16")
        called = ops.call(x, function="other", type=Tensor("f32", (2,)))
        started = ops.length(ops.start(ops.array(values=(1,)), model="draft", vocab=VOCAB))
        sized = ops.iota(size=n, dtype="i32")
    outside = ops.loop(constant(1, "i32"), body=Function("", [c := param("c", Tensor("i32", ()))], {
        "again": ops.lt(c, ops.cast(ops.reduce_sum(x, axes=(0, 1)), dtype="i32")), "c": c}))  # fmt: skip
    shape = param("y", Tensor("f32", (2 * n,)))
    return {
        "model op": (only({"y": filtered}, x), "'p' cannot be lowered: conv \\(mine.py:12 in decode\\) is an operation of models"),
        "type": (only({"y": half}, x), "cast \\(mine.py:12 in decode\\) gives bf16\\[2, 4\\]; programs compute f32"),
        "call": (only({"y": called}, x), "names 'other'; compiled functions: score"),
        "model": (only({"y": started}), "names the model 'draft'; models: model"),
        "size": (only({"y": sized}), "needs the size n, which no parameter of the program has"),
        "region": (only({"y": ops.get(outside, index=0)}, x), "'x' is of another function: it was not carried into the region"),
        "shape": (only({"y": shape}, shape), "'y' has the size 2\\*n; parameters have sizes that are numbers or names"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_programs_may_not_use_is_named_with_its_line(name: str) -> None:
    listed, message = refused()[name]
    with pytest.raises(CompileError, match=message):
        lower(listed)


def test_steps_that_no_machine_can_drive() -> None:
    for change, message in (
        ({"inputs": [tensor("pixels", "rows")]}, "the buffer 'pixels'"),
        ({"dims": [{"name": "depth", "lo": 1, "hi": 2}]}, "the size 'depth'"),
        ({"states": [tensor("k", 4, 8, dtype="f32")]}, "The state 'k' of the model 'model' is not"),
    ):
        with pytest.raises(CompileError, match=message):
            lower(functions={"step": STEP | change})
    with pytest.raises(CompileError, match="'model' of the programs has no compiled function 'step'"):
        lower(functions={"score": SCORE})


def test_programs_are_part_of_a_module() -> None:
    listed = generate()
    x = param("x", Tensor("f32", (2,)))
    plain = Module([Function("score", [x], {"y": x + 1.0})], {"kind": "causal_lm", "vocab": 5, "eos": (2, 4), "context": 9})
    module = attach(attach(plain, [listed]), [Listed(listed.function, {"temperature": 0.5}, "generate_plain")])
    assert parse_module(print_module(module)) is module
    assert programs_of(module) == [Listed(listed.function, {"temperature": 0.5}, "generate_plain")]
    assert [f.name for f in without_programs(module)] == ["score"] and models_of(module) == []
    table = program_table(programs_of(module)[0])
    assert table["params"][0] == {"name": "prompt", "type": "i32[prompt_length]"} and table["plain"] == "generate_plain"
    assert table["params"][2] == {"name": "temperature", "type": "f32[()]", "default": 0.5} and table["results"][0] == "output"
    several = plain.replace(models=(("model", 5, 0, (2,), 9), ("draft", 5, 4, (2,), 9)))
    assert models_of(several) == [Served("model", 5, 0, (2,), 9), Served("draft", 5, 4, (2,), 9)]
    assert [m.function for m in models_of(several)] == ["step", "draft_step"]
