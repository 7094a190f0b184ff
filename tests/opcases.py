"""The cases of the op suite: for each operation a body with symbolic sizes, its inputs, and the error it may make.

A bound is a number of units of 2**-23 (one unit in the last place of a float near 1), and what it is relative to: each value,
or the largest magnitude of the result ("norm", for sums whose terms cancel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stemma.ir import Array, Function, Node, Quantized, Tensor, dim, dtype, ops, quantize_array, size
from stemma.ir.types import round_bf16, widen_bf16

N, M = dim("n", 1, 64), dim("m", 1, 64)
SIZES = ({"n": 1, "m": 1}, {"n": 5, "m": 3}, {"n": 7, "m": 33})
Make = Callable[[np.random.Generator, tuple[int, ...], Mapping[str, int]], Any]


@dataclass(frozen=True)
class Bound:
    """Largest error in units of 2**-23, relative to "each" value or to the "norm" of the result."""

    units: float
    to: str = "each"


EXACT = Bound(0)
HALF = Bound(0.501)  # one correctly rounded operation

BOUNDS: Mapping[str, Bound] = {
    # one rounding
    "add": HALF, "sub": HALF, "mul": HALF, "div": HALF, "sqrt": HALF, "reciprocal": HALF,
    "rsqrt": Bound(1.01),  # two roundings
    # the polynomials of math.hpp.j2, with their stated bounds; sin, cos and pow are the C library's
    "exp": Bound(2), "log": Bound(2), "tanh": Bound(3), "erf": Bound(4), "sigmoid": Bound(4), "sin": Bound(1), "cos": Bound(1),
    "pow": Bound(2),
    "silu": Bound(5),  # sigmoid and a product
    "gelu": Bound(6, "norm"), "gated": Bound(6, "norm"),  # erf + 1 and tanh + 1 cancel for negative x
    "softmax": Bound(12),  # exp (2), rounding of x - max (|x - max| < 8: 4), the sum, the quotient
    "rms_norm": Bound(6, "norm"), "layer_norm": Bound(8, "norm"),
    "rope": Bound(2, "norm"),  # two products and a sum
    # sums of up to 64 terms: at most 4 in a lane and 4 in the tree, or 64 in order for cumsum and the short ones
    "reduce_sum": Bound(6), "matmul": Bound(8, "norm"), "linear": Bound(8, "norm"), "conv": Bound(16, "norm"),
    "cumsum": Bound(16), "linear_at": Bound(16, "norm"), "linear_from": Bound(16, "norm"),
    "attention": Bound(16, "norm"), "cached_attention": Bound(16, "norm"), "fused": Bound(12, "norm"),
}  # fmt: skip
"""Operations that are not named here move or compare values and must be exact."""

UNGENERATED: Mapping[str, str] = {
    "param": "a leaf", "weight": "a leaf: generated kernels read weights as parameters", "get": "part of a region",
    "loop": "a region of the program level", "cond": "a region of the program level",
    "top_neurons": "a selection: no loop nest says it",
    "quantize": "packed layouts belong to the templates", "dequantize": "packed layouts belong to the templates",
}  # fmt: skip
"""Operations that no generated kernel computes, and why; they have cases for the reference backend."""


@dataclass(frozen=True)
class Case:
    """A body, makers of its inputs by name, and sizes to run it at."""

    op: str
    label: str
    body: Function
    make: Mapping[str, Make]
    sizes: Sequence[Mapping[str, int]] = SIZES
    bound: Bound = EXACT
    rows: bool = False  # whether row i of the result depends on row i of the inputs alone (all lead with n)
    weights: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}_{self.label}" if self.label else self.op

    def inputs(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Arrays for the parameters; bf16 values as widened floats."""
        rng = np.random.default_rng(sum(map(ord, self.name)) + sum(sizes.values()))
        made = {}
        for p in self.body.params:
            shape = tuple(size.evaluate(s, sizes) for s in p.shape)
            made[p.attrs["name"]] = self.make[p.attrs["name"]](rng, shape, sizes)
        return made


def normal(rng: np.random.Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.normal(size=shape).astype(np.float32)


def uniform(low: float, high: float) -> Make:
    return lambda rng, shape, sizes: rng.uniform(low, high, size=shape).astype(np.float32)


def integers(low: int, high: int) -> Make:
    return lambda rng, shape, sizes: rng.integers(low, high + 1, size=shape)


def nonzero(rng: np.random.Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return np.asarray(rng.integers(1, 9, size=shape) * rng.choice([-1, 1], size=shape))


def quarters(rng: np.random.Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    """Multiples of 1/4 that are not 0: quotients and remainders by them are exact."""
    return np.asarray(nonzero(rng, shape, sizes) / 4, np.float32)


def booleans(rng: np.random.Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.integers(0, 2, size=shape).astype(bool)


def halves(rng: np.random.Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    """Values of bf16."""
    return widen_bf16(round_bf16(rng.normal(size=shape)))


def below(limit: Any) -> Make:
    """Indices below a size."""
    return lambda rng, shape, sizes: rng.integers(0, size.evaluate(limit, sizes), size=shape)


def default(name: str) -> Make:
    """How inputs of an element type are made."""
    if name == "bf16":
        return halves
    kind = dtype(name).kind
    if kind == "quantized":
        return lambda rng, shape, sizes: quantize_array(rng.normal(size=shape), name)
    return {"float": normal, "bool": booleans, "int": integers(0, 9) if name == "u8" else integers(-9, 9)}[kind]


CASES: list[Case] = []


def case(
    op: str,
    label: str,
    build: Callable[..., Node | tuple[Node, ...]],
    *inputs: Tensor,
    make: Mapping[int, Make] | None = None,
    **rest: Any,
) -> None:
    """Add a case: inputs are parameters x0, x1, ...; `build` makes the result from them. A tuple result has several."""
    params = [ops.param(name=f"x{i}", type=t) for i, t in enumerate(inputs)]
    made = build(*params)
    results = made if isinstance(made, tuple) else (made,)
    makers = {f"x{i}": (make or {}).get(i, default(t.dtype)) for i, t in enumerate(inputs)}
    rest.setdefault("bound", BOUNDS.get(op, EXACT))
    CASES.append(Case(op, label, Function("", params, {f"r{i}": r for i, r in enumerate(results)}), makers, **rest))


def f32(*shape: Any) -> Tensor:
    return Tensor("f32", shape)


NM = f32(N, M)
POSITIVE = uniform(0.1, 4.0)

# -- elementwise
UNARY: Mapping[str, Make] = {
    "neg": normal, "abs": normal, "sign": normal, "exp": uniform(-20, 20), "log": POSITIVE, "sqrt": POSITIVE, "rsqrt": POSITIVE,
    "reciprocal": POSITIVE, "sin": uniform(-9, 9), "cos": uniform(-9, 9), "tanh": uniform(-4, 4), "erf": uniform(-3, 3),
    "sigmoid": uniform(-9, 9), "floor": uniform(-9, 9), "ceil": uniform(-9, 9), "round": quarters, "silu": uniform(-9, 9),
}  # fmt: skip
for _name, _make in UNARY.items():
    case(_name, "", ops.OPS[_name], NM, make={0: _make}, rows=True)
case("log", "edge", ops.log, f32(3), make={0: lambda rng, shape, sizes: np.array([0.0, 1.0, np.inf], np.float32)}, sizes=({},))
for _name in ("neg", "abs", "sign"):
    case(_name, "i64", ops.OPS[_name], Tensor("i64", (N, M)))
case("logical_not", "", ops.logical_not, Tensor("bool", (N, M)))
for _name in ("add", "sub", "mul", "maximum", "minimum"):
    case(_name, "", ops.OPS[_name], NM, f32(M), rows=False)
    case(_name, "i32", ops.OPS[_name], Tensor("i32", (N, 1)), Tensor("i32", (N, M)))
case("add", "scalar", lambda x: x + 1.5, f32())
case("add", "bf16", ops.add, Tensor("bf16", (N, M)), Tensor("bf16", (N, M)), bound=Bound(2**15))  # one rounding to 8 bits
case("add", "u8", ops.add, Tensor("u8", (N, M)), Tensor("u8", (N, M)), make={0: integers(0, 255), 1: integers(0, 255)})
case("div", "", ops.div, NM, NM, make={1: POSITIVE})
case("pow", "", ops.pow, NM, f32(), make={0: POSITIVE, 1: uniform(-2, 3)})
case("pow", "square", lambda x: ops.pow(x, ops.constant(value=2.0, dtype="f32")), NM)
for _name in ("floordiv", "mod"):
    case(
        _name,
        "",
        ops.OPS[_name],
        NM,
        NM,
        make={0: quarters, 1: lambda r, s, z: 2.0 ** r.integers(-2, 4, size=s).astype(np.float32)},
    )
    case(_name, "i64", ops.OPS[_name], Tensor("i64", (N, M)), Tensor("i64", (N, M)), make={0: integers(-99, 99), 1: nonzero})
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    case(_name, "", ops.OPS[_name], Tensor("i64", (N, M)), Tensor("i64", (M,)))
    case(_name, "f32", ops.OPS[_name], NM, NM, make={0: quarters, 1: quarters})
for _name in ("logical_and", "logical_or"):
    case(_name, "", ops.OPS[_name], Tensor("bool", (N, M)), Tensor("bool", (N, 1)))
case("where", "", ops.where, Tensor("bool", (N, M)), NM, f32(N, 1))
case("where", "mask", lambda c, x: ops.where(c, x, ops.constant(value=float("-inf"), dtype="f32")), Tensor("bool", (N, M)), NM)
for _approximate in ("none", "tanh", "sigmoid"):
    case("gelu", _approximate, lambda x, a=_approximate: ops.gelu(x, approximate=a), NM, rows=True)
for _activation in ("silu", "gelu", "gelu_tanh"):
    case("gated", _activation, lambda g, u, a=_activation: ops.gated(g, u, activation=a), NM, NM, rows=True)
for _source, _target in (("f32", "bf16"), ("f32", "f16"), ("f32", "i32"), ("i64", "f32"), ("bool", "f32"), ("i32", "bool"),
                         ("bf16", "f32"), ("i64", "u8"), ("f32", "i64"), ("i32", "i64")):  # fmt: skip
    case("cast", f"{_source}_{_target}", lambda x, t=_target: ops.cast(x, dtype=t), Tensor(_source, (N, M)))
case("cast", "chosen", lambda c, x: ops.cast(ops.where(c, x, ops.constant(value=0, dtype="i64")), dtype="bool"),
     Tensor("bool", (N, M)), Tensor("i64", (N, M)))  # fmt: skip
case("cast", "summed", lambda x, y: ops.reduce_sum(ops.cast(ops.lt(x, y), dtype="i32") - 2, axes=(1,)), NM, NM)

# -- leaves
case(
    "constant", "", lambda x: x + ops.broadcast_to(ops.constant(value=0.1, dtype="f32"), shape=(N, M)), NM, bound=Bound(1, "norm")
)  # 0.1 itself rounds
case("constant", "inf", lambda x: ops.maximum(x, ops.constant(value=float("-inf"), dtype="f32")), NM)
case("size_value", "", lambda x: x + ops.size_value(size=N * 2 + M, dtype="f32"), NM, bound=HALF)
case("iota", "", lambda x: ops.mul(x, ops.iota(size=M, dtype="f32")), NM, bound=HALF)
case("iota", "i64", lambda: ops.iota(size=N * M), sizes=SIZES)

# -- views and movers
case("reshape", "flat", lambda x: ops.reshape(x, shape=(N * M,)), NM)
case("reshape", "split", lambda x: ops.reshape(x, shape=(N, 2, 3, M)), f32(N, 6, M))
case("reshape", "mixed", lambda x: ops.reshape(x, shape=(2 * N, 3 * M)), f32(N, 6, M))
case("reshape", "units", lambda x: ops.reshape(x, shape=(1, N, 1, M, 1)), NM)
case("transpose", "", lambda x: ops.transpose(x, axes=(2, 0, 1)), f32(N, 3, M))
case("transpose", "heads", lambda x: ops.reshape(ops.transpose(ops.reshape(x, shape=(N, 4, M)), axes=(1, 0, 2)), shape=(4, N * M)),
     f32(N, 4 * M))  # fmt: skip
case("broadcast_to", "", lambda x: ops.broadcast_to(x, shape=(2, N, 3, M)), f32(N, 1, M))
case("slice", "", lambda x: ops.slice(x, axis=1, start=1, stop=1 + M), f32(N, 2 + M))
case("slice", "step", lambda x: ops.slice(x, axis=1, start=1, stop=M + 7, step=3), f32(N, M + 8))
case("concat", "", lambda x, y, z: ops.concat(x, y, z, axis=1), f32(N, M), f32(N, 1), f32(N, 2 * M))
case("concat", "nested", lambda x, y: ops.concat(ops.concat(x, y, axis=1) * 2.0, ops.neg(x), axis=1), NM, NM)
case("concat", "reduced", lambda x, y: ops.reduce_max(ops.concat(x, y, axis=1), axes=(1,)), NM, f32(N, 5))
case("pad", "", lambda x: ops.pad(x, low=(1, 0), high=(0, 2), value=7.0), NM)
case(
    "pad", "inside", lambda x: ops.reduce_sum(ops.pad(x, low=(0, 2), high=(0, 1), value=1.0), axes=(1,)), NM, bound=Bound(6, "norm")
)
case("take", "", lambda x, i: ops.take(x, i, axis=1), f32(N, M, 2), Tensor("i32", (3, N)), make={1: below(M)})
case("take", "computed", lambda x, i: ops.take(x, i + 1, axis=0), f32(M + 1, 3), Tensor("i64", (N,)), make={1: below(M)})
case("take_along", "", lambda x, i: ops.take_along(x, i, axis=1), f32(N, M), Tensor("i64", (N, 4)), make={1: below(M)})
case("take_along", "broadcast", lambda x, i: ops.take_along(x, i, axis=0), NM, Tensor("i64", (2, 1)), make={1: below(N)})


def distinct(rng: np.random.Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    """Indices with a repetition at the end: the last write wins."""
    return np.concatenate([rng.permutation(sizes["m"] + 2)[: shape[0] - 1], [0]])


case(
    "scatter",
    "",
    lambda x, i, u: ops.scatter(x, i, u, axis=1),
    f32(2, M + 2, 3),
    Tensor("i32", (M,)),
    f32(2, M, 3),
    make={1: distinct},
)
case(
    "scatter",
    "first",
    lambda x, i, u: ops.scatter(x, i, u, axis=0),
    f32(M + 2, N),
    Tensor("i64", (M,)),
    f32(M, N),
    make={1: distinct},
)
case("scatter", "bf16", lambda x, i, u: ops.scatter(x, i, ops.cast(u, dtype="bf16"), axis=0), Tensor("bf16", (M + 2, 3)),
     Tensor("i32", (M,)), f32(M, 3), make={1: distinct})  # fmt: skip
case("scatter", "copy", lambda x, i, u: (ops.scatter(x, i, u, axis=0), ops.neg(x)), f32(M + 2, 3), Tensor("i32", (M,)), f32(M, 3),
     make={1: distinct})  # fmt: skip
case("scatter", "read", lambda x, i, u: ops.reduce_max(ops.scatter(x, i, u, axis=0), axes=(0,)), f32(M + 2, 3),
     Tensor("i32", (M,)), f32(M, 3), make={1: distinct})  # fmt: skip

# -- reductions
for _name in ("reduce_sum", "reduce_max", "reduce_min"):
    _makers: dict[int, Make] = {0: uniform(0.5, 2)} if _name == "reduce_sum" else {}
    case(_name, "last", lambda x, f=ops.OPS[_name]: f(x, axes=(1,)), NM, make=_makers, rows=True)
    case(_name, "first", lambda x, f=ops.OPS[_name]: f(x, axes=(0,), keepdims=True), NM, make=_makers)
    case(_name, "two", lambda x, f=ops.OPS[_name]: f(x, axes=(0, 2)), f32(N, 3, M), make=_makers)
    case(_name, "i64", lambda x, f=ops.OPS[_name]: f(x, axes=(1,)), Tensor("i64", (N, M)))
    case(_name, "all", lambda x, f=ops.OPS[_name]: x - f(x, axes=(0, 1)), NM, make=_makers, bound=Bound(16, "norm"))
case("argmax", "", lambda x: ops.argmax(x, axis=1), NM)
case("argmax", "ties", lambda x: ops.argmax(x, axis=0, keepdims=True), Tensor("i64", (N, M)))
case("cumsum", "", lambda x: ops.cumsum(x, axis=1), NM, make={0: uniform(0.5, 2)}, rows=True)
case("cumsum", "i64", lambda x: ops.cumsum(x, axis=0), Tensor("i64", (N, M)))
case("softmax", "last", lambda x: ops.softmax(x, axis=1), NM, rows=True)
case("softmax", "first", lambda x: ops.softmax(x, axis=0), NM)
case("rms_norm", "", lambda x, w: ops.rms_norm(x, w, eps=1e-5), f32(N, 48), f32(48))
case("rms_norm", "plain", lambda x: ops.rms_norm(x, eps=1e-5), f32(N, 3, 7), rows=True)
case("layer_norm", "", lambda x, w, b: ops.layer_norm(x, w, b, eps=1e-5), f32(N, 33), f32(33), f32(33))
case("layer_norm", "plain", lambda x: ops.layer_norm(x, eps=1e-5), f32(N, 20), rows=True)

# -- composites and products
case("rope", "", ops.rope, f32(N, 3, 8), f32(N, 1, 8), f32(N, 1, 8), rows=True)


def _rotated(x: Node, positions: Node, frequencies: Node) -> Node:
    angles = ops.mul(ops.cast(ops.reshape(positions, shape=(N, 1)), dtype="f32"), frequencies)
    return ops.rope(x, *(ops.reshape(f(angles), shape=(N, 1, 8)) for f in (ops.cos, ops.sin)))


# angles up to 9 * 3 round by 2**-20, eight units
case("rope", "computed", _rotated, f32(N, 3, 8), Tensor("i32", (N,)), f32(8), bound=Bound(40, "norm"))
case("matmul", "", ops.matmul, f32(2, N, 24), f32(24, M))
case("matmul", "batched", ops.matmul, f32(2, 1, N, 5), f32(3, 5, M))
case("linear", "", ops.linear, f32(N, 40), f32(M, 40))
case("linear", "bias", ops.linear, f32(2, N, 17), f32(M, 17), f32(M))
case("linear", "bf16", ops.linear, f32(N, 40), Tensor("bf16", (M, 40)))
case("linear", "vector", ops.linear, f32(20), f32(M, 20))
case("linear", "normed", lambda x, w: ops.linear(ops.rms_norm(x, eps=1e-5), w), f32(N, 32), f32(M, 32), bound=Bound(16, "norm"))
case("conv", "", lambda x, w, b: ops.conv(x, w, b, stride=(1, 2), padding=(1, 0), dilation=(1, 1)), f32(2, 3, N + 2, M + 2),
     f32(4, 3, 3, 2), f32(4))  # fmt: skip
case(
    "conv",
    "groups",
    lambda x, w: ops.conv(x, w, stride=(2,), padding=(2,), dilation=(2,), groups=2),
    f32(N, 4, M + 4),
    f32(6, 2, 3),
)
case("top_neurons", "", lambda x: ops.top_neurons(x, count=3), f32(N, 9))
case("linear_at", "", ops.linear_at, f32(N, 6), f32(7, 6), Tensor("i32", (N, 3)), make={2: below(7)})
case("linear_from", "", ops.linear_from, f32(N, 3), f32(7, 6), Tensor("i32", (N, 3)), make={2: below(7)})
case("embedding", "", ops.embedding, f32(M, 6), Tensor("i32", (2, N)), make={1: below(M)})
case("embedding", "bf16", ops.embedding, Tensor("bf16", (M, 6)), Tensor("i64", (N,)), make={1: below(M)})


def heads(n: int, width: int = 8, length: Any = M) -> Tensor:
    return f32(N, n, length, width)


SMALL = ({"n": 1, "m": 1}, {"n": 2, "m": 5}, {"n": 3, "m": 17})
case(
    "attention",
    "causal",
    lambda q, k, v: ops.attention(q, k, v, causal=True, scale=0.35),
    heads(4),
    heads(2),
    heads(2),
    sizes=SMALL,
)
case("attention", "window", lambda q, k, v: ops.attention(q, k, v, causal=True, window=3, softcap=5.0, scale=0.35),
     heads(2), heads(2), heads(2, 6), sizes=SMALL)  # fmt: skip
case("attention", "mask", lambda q, k, v, m: ops.attention(q, k, v, m, causal=False, scale=0.35), heads(2), heads(1, 8, 9),
     heads(1, 8, 9), f32(N, 1, 1, 9), sizes=SMALL)  # fmt: skip
case("cached_attention", "", lambda q, k, v, t, s, p: ops.cached_attention(q, k, v, t, s, p, scale=0.35, window=4, softcap=9.0),
     f32(N, 4, 8), f32(2, M + 1, 8), f32(2, M + 1, 8), Tensor("i32", (2, M)), Tensor("i32", (N,)), Tensor("i32", (N,)),
     make={3: below(M + 1), 4: below(2), 5: below(M)}, sizes=SMALL)  # fmt: skip


def _fused(x: Node, r: Node) -> tuple[Node, ...]:
    a, b = (ops.param(name=n, type=NM) for n in ("a", "b"))
    body = Function("", [a, b], {"sum": a + b, "soft": ops.softmax(a + b, axis=1)})
    both = ops.fused(x, r, body=body)
    return ops.get(both, index=0), ops.get(both, index=1)


case("fused", "", _fused, NM, NM, rows=True)
case("get", "", lambda x, r: _fused(x, r)[1], NM, NM, bound=BOUNDS["softmax"])


# -- what only the reference runs
def _loop(x: Node) -> Node:
    a = ops.param(name="a", type=f32())
    body = Function("", [a], {"again": ops.lt(a * 2.0, ops.constant(value=100.0, dtype="f32")), "a": a * 2.0})
    return ops.get(ops.loop(x, body=body), index=0)


def _cond(p: Node, x: Node) -> Node:
    a = ops.param(name="a", type=f32(N))
    return ops.cond(p, x, then=Function("", [a], {"r": a + 1.0}), otherwise=Function("", [a], {"r": ops.neg(a)}))


case("param", "", lambda x: x, NM)
case("weight", "", lambda x: x + ops.weight(name="w", type=f32(3)), f32(N, 3), weights={"w": np.array([1.0, 2, 3], np.float32)},
     bound=HALF)  # fmt: skip
case("loop", "", _loop, f32(), make={0: uniform(1, 2)})
case("cond", "", _cond, Tensor("bool", ()), f32(N), bound=HALF)
case("quantize", "", lambda x: ops.dequantize(ops.quantize(x, dtype="q8_g32")), f32(N, 64), bound=Bound(2**17, "norm"))
case("dequantize", "", ops.dequantize, Tensor("int4_g32", (N, 64)), bound=HALF)

__all__ = ["BOUNDS", "CASES", "UNGENERATED", "Bound", "Case", "Quantized"]
