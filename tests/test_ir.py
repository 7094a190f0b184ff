"""The IR's own laws: size arithmetic, interning, the text form, the verifier, regions, the reference interpreter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import (
    OPS,
    Function,
    Module,
    Node,
    ParseError,
    Size,
    SizeLike,
    StemmaError,
    Tensor,
    TypeMismatch,
    VerifyError,
    dim,
    dtype,
    interpret,
    ops,
    parse_module,
    print_module,
    quantize_array,
    size,
    stamp,
    verify,
)  # fmt: skip
from tests.programs import tiny_lm

pytestmark = pytest.mark.quick
A, B = dim("a", 1, 9), dim("b", 2, 7)

sizes: st.SearchStrategy[SizeLike] = st.recursive(
    st.one_of(st.integers(-4, 4), st.sampled_from([A, B])),
    lambda inner: st.one_of(
        st.tuples(inner, inner, st.sampled_from(["+", "-", "*", "min", "max"])).map(lambda t: combine(*t)),
        st.tuples(inner, st.integers(1, 5)).map(lambda t: size.floordiv(*t)),
    ),
    max_leaves=6,
)


def combine(a: SizeLike, b: SizeLike, kind: str) -> SizeLike:
    match kind:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "min":
            return size.minimum(a, b)
    return size.maximum(a, b)


@settings(max_examples=300, deadline=None)
@given(x=sizes, y=sizes, kind=st.sampled_from(["+", "-", "*", "min", "max"]), a=st.integers(1, 9), b=st.integers(2, 7))
def test_size_arithmetic_is_arithmetic(x: SizeLike, y: SizeLike, kind: str, a: int, b: int) -> None:
    """Evaluation commutes with every operation, stays within the bounds, and survives the text form as the same object."""
    env = {"a": a, "b": b}
    whole = combine(x, y, kind)
    u, v = size.evaluate(x, env), size.evaluate(y, env)
    assert size.evaluate(whole, env) == combine(u, v, kind)
    low, high = size.bounds(whole)
    assert low <= size.evaluate(whole, env) <= high
    back = size.parse(str(whole), {"a": A, "b": B})
    assert back is whole or (isinstance(whole, int) and back == whole)


@settings(max_examples=200, deadline=None)
@given(x=sizes, y=sizes, z=sizes)
def test_size_laws_hold_by_identity(x: SizeLike, y: SizeLike, z: SizeLike) -> None:
    """Rings laws give the very same object; exact division undoes a product."""

    def same(p: SizeLike, q: SizeLike) -> bool:
        return p is q or (isinstance(p, int) and p == q)

    assert same(x + y, y + x) and same(x * y, y * x)
    assert same((x + y) + z, x + (y + z)) and same(x * (y + z), x * y + x * z)
    assert same(x - x, 0) and same(size.floordiv(x * A * 3, A * 3), x)


def test_equal_structure_is_one_object() -> None:
    """Interning tells 1, 1.0 and True apart, and 0.0 from -0.0."""
    x = ops.param(name="x", type=Tensor("f32", (A, 4)))
    assert x + 1.0 is x + 1.0 and ops.param(name="x", type=Tensor("f32", (A, 4))) is x
    kinds = [ops.constant(value=v, dtype="f32") for v in (1, 1.0, True, 0.0, -0.0)]
    assert len(set(kinds)) == 5
    with pytest.raises(AttributeError, match="frozen"):
        x.type = Tensor("f32", ())


def roundtrip(*functions: Function, **properties: object) -> str:
    module = Module(functions, properties)
    text = print_module(module)
    assert parse_module(text) is module
    verify(module)
    return text


def test_text_of_awkward_things() -> None:
    """Special floats, nested regions, tuples, sizes as attributes, names that look like the printer's."""
    x = ops.param(name="v0", type=Tensor("f32", (A, 4)))
    p = ops.param(name="p", type=x.type)
    inner = Function("", [p], {"r": ops.silu(p)})
    body = Function("", [p], {"r": ops.fused(p, body=inner), "s": ops.reduce_sum(p, axes=(1,))})
    both = ops.fused(x, body=body)
    y = ops.where(ops.lt(ops.get(both, index=0), float("inf")), x, ops.constant(value=float("-inf"), dtype="f32"))
    y = y * float("nan")
    sizes = ops.size_value(size=size.maximum(A * 2 - 3, size.floordiv(B + 1, 2)))
    text = roundtrip(
        Function("f", [x], {"y": y, "s": ops.get(both, index=1), "n": sizes}),
        note='quotes " and \\',
        nested=((1, 2.5), ()),
        none=None,
    )
    assert "inf" in text and "nan" in text


def test_text_errors_name_the_line() -> None:
    """Damaged text is a ParseError with the line, never anything else, and nothing in it runs."""
    module, _ = tiny_lm()
    text = print_module(module)
    for bad, message in (
        ("", "first line"),
        (text.replace("rms_norm(", "unknown_op(", 1), "Line"),
        (text.replace("axes=(0, 2, 1, 3)", "axes=(0, 2, 1, 1)", 1), "permutation"),
        (text[: len(text) // 2], "valid Python|Line|return"),
        (text + "\nimport os\n", "Line"),
        (text.replace("eps=1e-05", "eps=__import__('os')", 1), "cannot be read"),
    ):
        with pytest.raises(ParseError, match=message):
            parse_module(bad)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 3000), byte=st.characters(min_codepoint=32, max_codepoint=126))
def test_any_damage_to_the_text_is_a_parse_error_or_a_module(cut: int, byte: str) -> None:
    text = print_module(tiny_lm(layers=1)[0])
    damaged = text[: cut % len(text)] + byte + text[cut % len(text) + 1 :]
    try:
        parse_module(damaged)
    except ParseError:
        pass


def test_verifier_shows_the_place() -> None:
    """A node made outside the rules is found, shown with its neighbours and the user's line."""
    x = ops.param(name="x", type=Tensor("f32", (A, 4)))
    with stamp(line="model.py:7 in forward"):
        y = ops.silu(x * 1.25)
    wrong = Node.__new__(Node)
    for slot in ("op", "inputs", "attrs", "origin"):
        object.__setattr__(wrong, slot, getattr(y, slot))
    object.__setattr__(wrong, "type", Tensor("f32", (A, 5)))
    with pytest.raises(VerifyError, match=r"(?s)silu.*model.py:7.*mul\("):
        verify(Module([Function("f", [x], {"y": wrong})]))
    with pytest.raises(VerifyError, match="'x' is not declared"):
        verify(Module([Function("f", [], {"y": y})]))
    loose = ops.loop(x, body=Function("", [x], {"again": ops.constant(value=False, dtype="bool"), "x": x}))
    verify(Module([Function("f", [x], {"y": ops.get(loose, index=0)})]))


def test_type_errors_are_plain() -> None:
    """Wrong inputs and attributes name the operation, the types and the user's line."""
    x = ops.param(name="x", type=Tensor("f32", (A, 4)))
    n = ops.param(name="n", type=Tensor("i32", (A,)))
    with stamp(line="net.py:3"), pytest.raises(TypeMismatch, match=r"add\(f32\[a, 4\], i32\[a\]\).*cast.*net.py:3"):
        ops.add(x, n)
    for call, message in (
        (lambda: ops.reshape(x, shape=(A, 5)), "cannot become"),
        (lambda: ops.softmax(x, axis=-1), "outside"),
        (lambda: ops.softmax(x), "missing"),
        (lambda: ops.softmax(x, axis=1, colour=2), "unknown"),
        (lambda: ops.slice(x, axis=1, start=0, stop=5), "does not fit"),
        (lambda: ops.add(x, "3"), "not a node"),
        (lambda: dtype("int5_g7"), "no element type"),
    ):
        with pytest.raises(TypeMismatch, match=message):
            call()


def test_regions_run() -> None:
    """loop counts, cond chooses; both print, parse and verify."""
    n = ops.param(name="n", type=Tensor("i64", ()))
    total = ops.param(name="total", type=Tensor("i64", ()))
    body = Function("", [n, total], {"again": ops.gt(n, 1), "n": n - 1, "total": total + n})
    looped = ops.loop(n, ops.constant(value=0, dtype="i64"), body=body)
    even = ops.cond(ops.eq(ops.mod(n, ops.constant(value=2, dtype="i64")), 0), n, then=Function("", [n], {"r": n}),
                    otherwise=Function("", [n], {"r": -n}))  # fmt: skip
    function = Function("f", [n], {"sum": ops.get(looped, index=1), "signed": even})
    roundtrip(function)
    for value in (1, 4, 7):
        result = interpret(function, [np.array(value)])
        assert int(result["sum"]) == value * (value + 1) // 2
        assert int(result["signed"]) == (value if value % 2 == 0 else -value)


def test_interpreter_checks_its_inputs() -> None:
    """Sizes out of range, disagreeing or missing inputs are errors that name the input."""
    module, weights = tiny_lm(layers=1)
    forward = module["forward"]
    for bad in ({}, {"input_ids": np.zeros((2, 3), int), "more": np.zeros(1)}, {"input_ids": np.zeros((65, 1), int)}):
        with pytest.raises(StemmaError, match="input_ids"):
            interpret(forward, bad, weights)
    with pytest.raises(StemmaError, match="no weights"):
        interpret(forward, {"input_ids": np.zeros((1, 3), int)})


def test_every_op_documents_itself_and_costs() -> None:
    """Each operation has a docstring; the cost of a real graph is positive and grows with the sizes."""
    assert all((op.__doc__ or "").strip() for op in OPS.values())
    module, _ = tiny_lm()
    total: SizeLike = 0
    for node in module["forward"].nodes:
        total = total + node.op.cost(node).flops
    assert isinstance(total, Size)
    small, large = (size.evaluate(total, {"batch": 1, "tokens": t}) for t in (8, 16))
    assert 0 < small < large < 4 * small


@given(x=st.floats(-6, 6))
@settings(max_examples=200, deadline=None)
def test_erf_to_double_precision(x: float) -> None:
    value = OPS["erf"].evaluate(None, np.array([x]))[0]
    assert math.isclose(value, math.erf(x), rel_tol=1e-12, abs_tol=1e-13)


def decomposed(node: Node) -> Node:
    assert node.op.decompose is not None
    return node.op.decompose(*node.inputs, **node.attrs)


def test_decompositions_mean_the_same() -> None:
    """Every composite in a small model equals its decomposition in float64."""
    x = ops.param(name="x", type=Tensor("f32", (A, 6, 8)))
    w = ops.param(name="w", type=Tensor("f32", (8,)))
    q = ops.param(name="q", type=Tensor("f32", (1, 4, A, 8)))
    k = ops.param(name="k", type=Tensor("f32", (1, 2, A, 8)))
    cases = [ops.gelu(x, approximate=a) for a in ("none", "tanh", "sigmoid")]
    cases += [ops.gated(x, x * 2.0, activation=a) for a in ("silu", "gelu", "gelu_tanh")]
    cases += [
        ops.silu(x),
        ops.softmax(x, axis=1),
        ops.rms_norm(x, w, eps=1e-6),
        ops.layer_norm(x, w, w, eps=1e-6),
        ops.rope(x, x, x),
    ]
    for window, softcap, causal in ((None, None, True), (2, 3.0, True), (2, None, False)):
        cases.append(ops.attention(q, k, k, causal=causal, window=window, scale=0.3, softcap=softcap))
    named = [(f"{i}{side}", n) for i, c in enumerate(cases) for side, n in (("a", c), ("b", decomposed(c)))]
    rng = np.random.default_rng(0)
    result = interpret(
        Function("f", [x, w, q, k], named), [rng.standard_normal(s) for s in ((5, 6, 8), (8,), (1, 4, 5, 8), (1, 2, 5, 8))]
    )
    for i, case in enumerate(cases):
        np.testing.assert_allclose(result[f"{i}a"], result[f"{i}b"], rtol=1e-12, atol=1e-13, err_msg=case.op.name)


def test_quantized_linear_uses_dequantized_values() -> None:
    """A linear over quantized weights and activations is the product of their values."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal((5, 64)).astype(np.float32)
    node = ops.linear(ops.quantize(ops.param(name="x", type=Tensor("f32", (3, 64))), dtype="q8_g32"),
                      ops.quantize(ops.weight(name="w", type=Tensor("f32", (5, 64))), dtype="int4_g32"))  # fmt: skip
    result = interpret(Function("f", [ops.param(name="x", type=Tensor("f32", (3, 64)))], {"y": node}), [x], {"w": w})["y"]
    a, b = quantize_array(x, "q8_g32").dequantize(), quantize_array(w, "int4_g32").dequantize()
    np.testing.assert_allclose(result, a.astype(float) @ b.T.astype(float), rtol=1e-12)
