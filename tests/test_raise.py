"""Raising: chains of arithmetic as models write them become the operations of the IR; real models reduce to a short list."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from stemma.frontend.hf import load_checkpoint, trace_checkpoint
from stemma.ir import Array, Module, Node, Tensor, dim, interpret, ops
from stemma.passes import PassContext, run_pipeline
from stemma.passes.properties import PROPERTIES
from stemma.passes.raising import RAISING
from stemma.passes.selftest import difference
from stemma.passes.simplify_weights import weight
from tests.helpers import example, module, roundtrip
from tests.models import ARCHITECTURES, CAUSAL, make_checkpoint

B, T = dim("batch", 1, 64), dim("tokens", 1, 64)
X = ops.param(name="x", type=Tensor("f32", (B, T, 8)))
W = weight("w", "f32[8]")


def raised(node: Node) -> Node:
    """The result of all raising passes, whose value has been compared with the interpreter after each."""
    outcome = run_pipeline(module(y=node), RAISING, verify_each=True)
    return roundtrip(outcome.module)["forward"].results[0]


def mean(x: Node, divide: bool = False) -> Node:
    total = ops.reduce_sum(x, axes=(2,), keepdims=True)
    return total / 8.0 if divide else total * 0.125


@pytest.mark.quick
def test_rms_norm_however_it_is_written() -> None:
    llama = ops.mul(W, X * ops.rsqrt(mean(ops.pow(X, 2.0)) + 1e-6))
    t5 = (X / ops.sqrt(mean(X * X, divide=True) + 1e-6)) * W
    assert raised(llama) is raised(t5) is ops.rms_norm(X, W, eps=1e-6)
    gemma = ops.rms_norm(X, W + 1.0, eps=1e-6)
    assert raised(X * ops.rsqrt(mean(X * X) + 1e-6) * (W + 1.0)) is gemma
    assert raised(X * ops.rsqrt(mean(X * X) + 1e-6)) is ops.rms_norm(X, eps=1e-6)


@pytest.mark.quick
def test_what_is_no_rms_norm_stays() -> None:
    for other in (X * ops.rsqrt(ops.reduce_sum(X * X, axes=(2,), keepdims=True) * 0.25 + 1e-6),
                  X * ops.rsqrt(ops.reduce_sum(X * X, axes=(1,), keepdims=True) * 0.125 + 1e-6),
                  X * ops.rsqrt(mean(X * ops.tanh(X)) + 1e-6)):  # fmt: skip
        assert raised(other) is other


@pytest.mark.quick
def test_layer_norm() -> None:
    centred = X - mean(X)
    chain = centred * ops.rsqrt(mean(centred * centred) + 1e-5)
    assert raised(chain * W + weight("b", "f32[8]")) is ops.layer_norm(X, W, weight("b", "f32[8]"), eps=1e-5)
    assert raised(chain) is ops.layer_norm(X, eps=1e-5)


@pytest.mark.quick
def test_activations_and_gated_products() -> None:
    up = example("up", "f32[n, 4]")
    gate = example("gate", "f32[n, 4]")
    cubed = gate + ops.pow(gate, 3.0) * 0.044715
    gelu_new = 0.5 * gate * (1.0 + ops.tanh(cubed * np.sqrt(2 / np.pi).item()))
    assert raised(gelu_new) is ops.gelu(gate, approximate="tanh")
    assert raised(gelu_new * up) is ops.gated(gate, up, activation="gelu_tanh")
    assert raised(gate * 0.5 * (1.0 + ops.erf(gate / np.sqrt(2).item()))) is ops.gelu(gate)
    assert raised(gate * ops.sigmoid(1.702 * gate)) is ops.gelu(gate, approximate="sigmoid")
    assert raised(up * (gate * ops.sigmoid(gate))) is ops.gated(gate, up, activation="silu")
    rounded = 0.5 * gate * (1.0 + ops.tanh(cubed * 0.79788456))  # not sqrt(2/pi): another function
    assert "tanh" in [n.op.name for n in module(y=raised(rounded))["forward"].nodes]


def rotate_half(x: Node) -> Node:
    last, half = x.tensor.rank - 1, x.shape[-1] // 2
    low, high = (ops.slice(x, axis=last, start=s, stop=s + half) for s in (0, half))
    return ops.concat(ops.neg(high), low, axis=last)


@pytest.mark.quick
def test_rotary_embeddings_whole_and_partial() -> None:
    q = ops.param(name="q", type=Tensor("f32", (B, 2, T, 8)))
    cos, sin = (ops.param(name=n, type=Tensor("f32", (1, 1, T, 8))) for n in ("cos", "sin"))
    assert raised(q * cos + rotate_half(q) * sin) is ops.rope(q, cos, sin)
    assert raised(sin * rotate_half(q) + cos * q) is ops.rope(q, cos, sin)
    longer = ops.param(name="q", type=Tensor("f32", (B, 2, T, 12)))
    part = ops.slice(longer, axis=3, start=0, stop=8)
    rest = ops.slice(longer, axis=3, start=8, stop=12)
    turned = ops.concat(part * cos + rotate_half(part) * sin, rest, axis=3)
    assert raised(turned) is ops.concat(ops.rope(part, cos, sin), rest, axis=3)
    other = q * cos - rotate_half(q) * sin
    assert raised(other) is other


def eager(softcap: float | None, groups: int, scale_first: bool = False) -> tuple[Node, Node]:
    """Attention as eager implementations write it, and what it must become."""
    q, k, v = (ops.param(name=n, type=Tensor("f32", (B, h, T, 8))) for n, h in (("q", 2 * groups), ("k", 2), ("v", 2)))

    def repeated(x: Node) -> Node:
        apart = ops.broadcast_to(ops.reshape(x, shape=(B, 2, 1, T, 8)), shape=(B, 2, groups, T, 8))
        return x if groups == 1 else ops.reshape(apart, shape=(B, 2 * groups, T, 8))

    transposed = ops.transpose(repeated(k), axes=(0, 1, 3, 2))
    scores = ops.matmul(q * 0.25, transposed) if scale_first else ops.matmul(q, transposed) / 4.0
    if softcap is not None:
        scores = ops.tanh(scores / softcap) * softcap
    rows, columns = ops.reshape(ops.iota(size=T), shape=(T, 1)), ops.reshape(ops.iota(size=T), shape=(1, T))
    visible = ops.logical_and(ops.le(columns, rows), ops.gt(columns, rows - 5))
    lowest, zero = (ops.constant(value=value, dtype="f32") for value in (-3.4028234663852886e38, 0.0))
    scores = ops.where(visible, scores, lowest) if scale_first else scores + ops.where(visible, zero, lowest)
    expected = ops.attention(q, k, v, causal=True, window=5, scale=0.25, softcap=softcap)
    return ops.matmul(ops.softmax(scores, axis=3), repeated(v)), expected


@pytest.mark.quick
@pytest.mark.parametrize("softcap", [None, 50.0, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale_first", [False, True])
def test_explicit_attention(softcap: float | None, groups: int, scale_first: bool) -> None:
    chain, expected = eager(softcap, groups, scale_first)
    assert raised(chain) is expected


# What every language model must reduce to, besides leaves, and the small computation of rotary tables and positions.
MODEL = {"linear", "embedding", "attention", "rope", "rms_norm", "layer_norm", "gated", "gelu", "add", "reshape", "transpose"}
TABLES = {"cast", "iota", "mul", "cos", "sin", "concat"}
EXTRA = {
    "gemma2": {"div", "tanh"},  # the soft cap of the logits
    "phi3": {"slice"},  # of the joined projections
    "gpt2": {"slice"},
    "bert": {"slice", "take_along", "broadcast_to", "tanh"},  # token types, pooler
    "vit": {"conv", "broadcast_to", "slice"},  # patches, class token
}
LEAVES = {"param", "weight", "constant"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Module, Module, PassContext]:
    """An architecture's name, its traced module, the raised one, and the context with its weights."""
    folder = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param), "bf16")
    before, weights = trace_checkpoint(load_checkpoint(folder))
    context = PassContext(weights=weights)
    return request.param, roundtrip(before), roundtrip(run_pipeline(before, RAISING, context).module), context


def test_real_models_reduce_to_a_short_list_with_the_same_results(traced: tuple[str, Module, Module, PassContext]) -> None:
    name, before, after, context = traced
    found = Counter(n.op.name for n in after["forward"].nodes)
    assert set(found) <= MODEL | TABLES | LEAVES | EXTRA.get(name, set())
    assert found["attention"] == 2 and found["rms_norm"] + found["layer_norm"] >= 5
    if name in CAUSAL:
        assert PROPERTIES["causal"](after) is None
        assert found["gated"] + found["gelu"] == 2
    if name not in ("gpt2", "bert", "vit"):
        assert found["rope"] == 4 and found["cos"] == found["sin"] == found["iota"] == 1
    inputs = arguments(before)
    results = [interpret(m["forward"], inputs, context.weights) for m in (before, after)]
    for result in results[0]:
        assert difference(results[0][result], results[1][result]) < 1e-12


def test_linears_and_embeddings_read_the_stored_type(traced: tuple[str, Module, Module, PassContext]) -> None:
    for node in traced[2]["forward"].nodes:
        if node.op.name in ("linear", "embedding"):
            assert node.inputs[0 if node.op.name == "embedding" else 1].dtype == "bf16"


def test_windows_caps_and_groups_of_real_models(traced: tuple[str, Module, Module, PassContext]) -> None:
    name, _, after, _ = traced
    attention = [n for n in after["forward"].nodes if n.op.name == "attention"]
    windows = {"mistral": [8, 8], "gemma2": [8, None]}.get(name, [None, None])
    assert [n.attrs["window"] for n in attention] == windows
    assert all((n.attrs["softcap"] is not None) == (name == "gemma2") for n in attention)
    assert {n.inputs[1].shape[1] for n in attention} == {4 if name in ("gpt2", "bert", "vit") else 2}
    assert all(len(n.inputs) == 3 and n.attrs["causal"] == (name in CAUSAL) for n in attention)


def arguments(start: Module) -> dict[str, Array]:
    """Two rows of 13 tokens, or two images."""
    rng = np.random.default_rng(0)
    found: dict[str, Array] = {}
    for p in start["forward"].params:
        shape = tuple(s if isinstance(s, int) else {"batch": 2, "tokens": 13}[str(s)] for s in p.shape)
        found[p.attrs["name"]] = rng.standard_normal(shape) if p.tensor.is_float else rng.integers(0, 250, shape)
    return found
