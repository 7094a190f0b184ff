"""Models that stop early, draft heads, and several models in one module."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stemma.ir import (
    Array,
    Function,
    Module,
    PassError,
    StemmaError,
    Tensor,
    WeightStore,
    interpret,
    merge_models,
    ops,
    verify,
    walk,
)
from stemma.passes.base import PassContext
from stemma.passes.early_exit import EarlyExit, early_exit, residual_stream
from stemma.passes.fuse import Fuse, JoinLinears
from stemma.passes.heads import Heads
from stemma.passes.incremental import Incremental
from stemma.passes.quantize import Quantize, RoundActivations
from stemma.sources import Source, further_models
from tests.programs import tiny_lm

pytestmark = pytest.mark.quick
WIDTH, VOCAB, HEADS = 32, 50, 3


def test_the_first_layers_and_the_head() -> None:
    """Cutting three layers after two gives the very graph of two; each layer has two places in the residual stream."""
    whole = tiny_lm(layers=3)[0]["forward"]
    cut = early_exit(whole, 2, "forward")
    assert cut is tiny_lm(layers=2)[0]["forward"] and len(residual_stream(whole)) == 6


def test_beside_the_whole_model() -> None:
    """The pass adds a function that shares the weights, also quantized ones; it becomes a step of its own."""
    module, _ = tiny_lm(layers=3)
    module = RoundActivations().run(Quantize(bits=8).run(module, PassContext()), PassContext())
    both = EarlyExit(layers=1, model="first").run(module, PassContext())
    assert both["forward"] is module["forward"] and both.weights().keys() == module.weights().keys()
    step = Incremental(hidden=True, mix=2).run(both, PassContext())
    verify(step)
    assert [f.name for f in step] == ["step", "first_step"] and "hidden" not in step["first_step"].result_names
    assert len(step["first_step"].params) == 6 + 2 and len(step["step"].params) == 7 + 6
    fused = Fuse().run(JoinLinears().run(step, PassContext()), PassContext())
    expressions = [{n for n in walk(f) if n.op.name == "quantize" and n.dtype == "int8"} for f in fused]
    assert expressions[1] < expressions[0]  # the same nodes, so packed once


@pytest.mark.parametrize("layers", [0, 2, -1])
def test_layers_that_are_not_there(layers: int) -> None:
    with pytest.raises(PassError, match=f"layers={layers} is not between 1 and 1; the model has 2"):
        EarlyExit(layers=layers).run(tiny_lm()[0], PassContext())


def test_a_name_that_is_taken() -> None:
    module = EarlyExit().run(tiny_lm()[0], PassContext())
    with pytest.raises(PassError, match="there is a model 'early' already"):
        EarlyExit().run(module, PassContext())


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def random_heads(width: int) -> tuple[WeightStore, dict[str, Array]]:
    """Random weights of heads of both kinds."""
    rng = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(HEADS):
        shapes |= {f"medusa.{i}.weight": (width, width), f"medusa.{i}.bias": (width,)}
        shapes |= {f"hydra.{i}.in.weight": (width, width * (i + 2)), f"hydra.{i}.in.bias": (width,)}
        shapes |= {f"hydra.{i}.block.weight": (width, width), f"hydra.{i}.block.bias": (width,)}
    values = {name: rng.standard_normal(shape) * 0.2 for name, shape in shapes.items()}
    store = WeightStore()
    for name, value in values.items():
        store.add(name, Tensor("f32", value.shape), partial(values.__getitem__, name))
    return store, values


@pytest.fixture
def trained() -> tuple[WeightStore, dict[str, Array]]:
    return random_heads(WIDTH)


def test_medusa(trained: tuple[WeightStore, dict[str, Array]]) -> None:
    store, w = trained
    module, weights = tiny_lm()
    made = Heads("medusa").run(module, PassContext(weights=store))["medusa"]
    hidden = np.random.default_rng(1).standard_normal((2, WIDTH))
    logits = interpret(made, {"hidden": hidden}, w | weights)["logits"]
    assert logits.shape == (2, HEADS, VOCAB)
    for i in range(HEADS):
        state = hidden + silu(hidden @ w[f"medusa.{i}.weight"].T + w[f"medusa.{i}.bias"])
        np.testing.assert_allclose(logits[:, i], state @ weights["embedding"].T, rtol=1e-10)


def test_hydra(trained: tuple[WeightStore, dict[str, Array]]) -> None:
    """Head i reads the hidden state and the embeddings of i + 1 tokens."""
    store, w = trained
    module, weights = tiny_lm()
    made = Heads("hydra").run(module, PassContext(weights=store))
    rng = np.random.default_rng(2)
    for i in range(HEADS):
        hidden, path = rng.standard_normal((2, WIDTH)), rng.integers(0, VOCAB, (2, i + 1))
        logits = interpret(made[f"hydra_{i}"], {"hidden": hidden, "path": path}, w | weights)["logits"]
        x = np.concatenate([hidden, weights["embedding"][path].reshape(2, -1)], axis=1)
        y = hidden + silu(x @ w[f"hydra.{i}.in.weight"].T + w[f"hydra.{i}.in.bias"])
        state = y + silu(y @ w[f"hydra.{i}.block.weight"].T + w[f"hydra.{i}.block.bias"])
        np.testing.assert_allclose(logits, state @ weights["embedding"].T, rtol=1e-10)


def test_heads_use_the_quantized_output_head() -> None:
    """The model's own quantized embedding and rounding, so that nothing is packed twice."""
    plain = tiny_lm(hidden=64, width=16)[0]
    module = RoundActivations().run(Quantize(bits=8).run(plain, PassContext()), PassContext())
    made = Heads("medusa").run(module, PassContext(weights=random_heads(64)[0]))["medusa"]
    head = made.results[0]
    assert head.op.name == "linear" and head.inputs[1] in module["forward"].nodes and head.inputs[0].dtype == "q8_g64"


def test_heads_that_are_missing_or_of_another_model(trained: tuple[WeightStore, dict[str, Array]]) -> None:
    with pytest.raises(PassError, match=r"no weight 'medusa.0.weight'. Name the folder"):
        Heads("medusa").run(tiny_lm()[0], PassContext())
    with pytest.raises(PassError, match=r"has the shape \(32, 32\); this model needs \(16, 16\)"):
        Heads("medusa").run(tiny_lm(hidden=16, width=4)[0], PassContext(weights=trained[0]))
    few = WeightStore()
    few.add("medusa.0.weight", Tensor("f32", (WIDTH, WIDTH)), lambda: np.zeros((WIDTH, WIDTH)))
    with pytest.raises(PassError, match=r"'medusa.0.bias' is missing"):
        Heads("medusa").run(tiny_lm()[0], PassContext(weights=few))


def doubled(name: str) -> tuple[Module, WeightStore]:
    """f(x) = w * x, computed in a fused region."""
    x, w = ops.param(name="x", type=Tensor("f32", (3,))), ops.weight(name="w", type=Tensor("f32", (3,)))
    store = WeightStore()
    store.add("w", w.tensor, lambda: np.full(3, float(len(name)), np.float32), raw=lambda: name)
    body = Function("", [inner := ops.param(name="a", type=Tensor("f32", (3,)))], {"y": inner * w})
    return Module([Function("step", [x], {"y": ops.fused(x, body=body)})], {"name": name}), store


def test_merging() -> None:
    """Functions and weights get the name of their model, also those inside regions; the main model keeps its own."""
    module, weights = merge_models({"model": doubled("ab"), "draft": doubled("abc"), "b2": doubled("abcd")})
    verify(module)
    assert [f.name for f in module] == ["step", "draft_step", "b2_step"] and module.properties["name"] == "ab"
    assert set(module.weights()) == set(weights) == {"w", "draft.w", "b2.w"} and weights.raw("draft.w") == "abc"
    for name, factor in (("step", 2), ("draft_step", 3), ("b2_step", 4)):
        assert interpret(module[name], {"x": np.ones(3)}, weights)["y"].tolist() == [factor] * 3


def test_merging_names_that_clash() -> None:
    module, weights = doubled("a")
    weights.add("draft.w", Tensor("f32", (1,)), lambda: np.zeros(1))
    with pytest.raises(StemmaError, match="Two weights are called 'draft.w'"):
        merge_models({"model": (module, weights), "draft": doubled("b")})


def test_names_of_further_models() -> None:
    """A mapping or a list, with presets or without."""
    made = further_models({"draft": "a", "judge": Source("judge", Path("b"), "small")})
    assert made == further_models(["draft=a", Source("judge", Path("b"), "small")])
    assert further_models(["x=a,b,preset=exact"]) == (Source("x", Path("a,b"), "exact"),)
    for name in ("medusa", "a_step", "Draft", "1"):
        with pytest.raises(StemmaError, match="cannot be called"):
            further_models({name: "a"})
