"""Quantization passes and the measurement of what they cost."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import (
    Array,
    Function,
    Module,
    Node,
    PassError,
    Tensor,
    TypeMismatch,
    WeightStore,
    parse_module,
    print_module,
    quantize_array,
    verify,
)
from stemma.passes.base import PassContext
from stemma.passes.measure import Meter, divergence
from stemma.passes.quantize import Quantize, RoundActivations
from stemma.passes.registry import make_pass
from tests.programs import tiny_lm

pytestmark = pytest.mark.quick


def store(weights: dict[str, Array]) -> WeightStore:
    result = WeightStore()
    for name, value in weights.items():
        result.add(name, Tensor("f32", value.shape), partial(np.asarray, value))
    return result


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["int8", "int4_g32", "int4_g64", "q8_g32"]), rows=st.integers(1, 5), groups=st.integers(1, 4),
    scale=st.floats(1e-3, 1e3), seed=st.integers(0, 999),
)  # fmt: skip
def test_rounding_error_is_within_half_a_step(name: str, rows: int, groups: int, scale: float, seed: int) -> None:
    """Every value is off by at most half a step, an f16 scale's rounding and the clipped end of the asymmetric 4-bit range."""
    x = (np.random.default_rng(seed).standard_normal((rows, groups * 64)) * scale).astype(np.float32)
    q = quantize_array(x, name)
    group = 64 * groups if name == "int8" else int(name.split("_g")[1])
    step = np.repeat(np.abs(q.scales), group, axis=1).reshape(x.shape)
    bound = 0.5 + 1e-5 if not name.startswith("int4") else 1.6
    assert np.all(np.abs(q.dequantize() - x) <= bound * step + 1e-12)


def test_zero_and_constant_groups_and_bad_values() -> None:
    """All-zero groups stay zero, constants are exact, NaN and a group that does not divide are errors."""
    x = np.concatenate([np.zeros((1, 64)), np.full((1, 64), -3.0)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(quantize_array(x, "int4_g64").dequantize(), x)
    with pytest.raises(TypeMismatch, match="not finite"):
        quantize_array(np.array([[np.nan] * 64], np.float32), "int4_g64")
    with pytest.raises(TypeMismatch, match="no multiple"):
        quantize_array(np.zeros((1, 65), np.float32), "int4_g64")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_quantized_model_is_measured(bits: int, activations: str | None) -> None:
    """The loss is small for 8 bits, larger for 4, and exactly zero when nothing changed."""
    module, weights = tiny_lm()
    changed: Module = Quantize(bits=bits, group=0 if bits == 8 else 32).run(module, PassContext())
    if activations:
        changed = RoundActivations(dtype=activations).run(changed, PassContext())
    verify(changed)
    assert parse_module(print_module(changed)) is changed
    assert {n.inputs[1].dtype for n in changed["forward"].nodes if n.op.name == "linear"} == {"int8" if bits == 8 else "int4_g32"}
    text = [np.random.default_rng(1).integers(0, 50, 24)]
    meter = Meter(module, store(weights), text)
    loss = meter(changed)
    low, high = (1e-7, 0.02) if bits == 8 else (1e-4, 1.0)
    assert loss.kl is not None and low < loss.kl < high
    assert loss.tokens == 24 and loss.top1 is not None and 0 <= loss.top1 <= 1
    same = meter(module)
    assert (same.kl, same.top1, same.error, same.first_divergence) == (0.0, 1.0, 0.0, None)
    assert same.perplexity_before == same.perplexity_after


def test_tied_embedding_stays_tied() -> None:
    """The embedding and the head read the very same quantized weight."""
    module, _ = tiny_lm()
    changed = Quantize(bits=4, group=32).run(module, PassContext())
    forward = changed["forward"]
    embedded = next(n.inputs[0] for n in forward.nodes if n.op.name == "embedding")
    assert forward.results[0].inputs[1] is embedded and embedded.dtype == "int4_g32"
    kept = Quantize(bits=4, group=32, embeddings=False).run(module, PassContext())["forward"]
    assert kept.results[0].inputs[1].op.name == "weight"


@pytest.mark.parametrize(
    "options, weight, activation",
    [
        (Quantize(group=32), "int4_g32", "q8_g32"),
        (Quantize(bits=8, group=32), "int8_g32", "q8_g32"),
        (Quantize(bits=3, group=32), "int3_g32", "q8_g32"),
        (Quantize(bits=2, group=32, symmetric=False), "uint2_g32", "q8_g32"),
        (Quantize(bits=1, group=32, lookup=True), "lut1_g32", "q8_g32"),
        (Quantize(format="ternary_g32"), "ternary_g32", "q8_g32"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_options_name_a_format(options: Quantize, weight: str, activation: str) -> None:
    """The element types of weights, and of activations that are rounded after."""
    module, _ = tiny_lm()
    changed = RoundActivations().run(options.run(module, PassContext()), PassContext())
    linears = [n for n in changed["forward"].nodes if n.op.name == "linear"]
    assert {n.inputs[1].dtype for n in linears} == {weight}
    assert {n.inputs[0].dtype for n in linears} == {activation}


def test_clear_errors() -> None:
    """A group that does not divide, an unknown width, no calibration text."""
    module, weights = tiny_lm()
    for options, message in (
        (Quantize(bits=4, group=128), "no multiple of the group 128 of int4_g128. Choose a group that divides every row"),
        (Quantize(bits=4, group=48), "no kernel for group=48; use one of 32, 64, 128"),
        (Quantize(bits=4, group=0), "no kernel for group=0"),
        (Quantize(bits=5), "bits=5"),
        (Quantize(bits=8, symmetric=False), "bits=8, symmetric=False, lookup=False is not available"),
        (Quantize(bits=1), "or 4, 3, 2 or 1 with lookup=true"),
        (Quantize(format="q7_k"), "There is no element type 'q7_k'"),
        (Quantize(format="f32"), "f32 is not a quantized element type"),
    ):
        with pytest.raises(PassError, match=message):
            options.run(module, PassContext())
    with pytest.raises(PassError, match="calibration"):
        Meter(module, store(weights), [np.array([3])])


def test_logits_that_are_no_numbers_have_no_loss() -> None:
    """A pass that breaks the model does not get a KL of 0; a logit of -inf, as of a token that is ruled out, is a number."""
    module, weights = tiny_lm()
    meter = Meter(module, store(weights), [np.arange(12)])
    forward = module["forward"]
    (logits,) = forward.results

    def changed(value: Node) -> Module:
        return module.replace(Function("forward", forward.params, {forward.result_names[0]: value}))

    for value in (logits * float("nan"), logits * float("inf")):
        with pytest.raises(PassError, match="After this pass, the model's logits are not finite .* at 12 of 12 calibration tokens"):
            meter(changed(value))
    with pytest.raises(PassError, match="The model's logits are not finite"):
        Meter(changed(logits * float("nan")), store(weights), [np.arange(12)])(module)
    p, q = np.array([np.log(0.5), np.log(0.5), -np.inf]), np.array([np.log(0.25), np.log(0.75), -np.inf])
    assert abs(divergence(p, q) - 0.5 * np.log(0.5 / 0.25) - 0.5 * np.log(0.5 / 0.75)) < 1e-12
    assert divergence(p, np.array([-np.inf, 0.0, -np.inf])) == np.inf


@pytest.mark.parametrize(
    "options", ["format=uint2_g32,lookup=true", "format=int8,bits=3", "format=int4_g32,group=64", "format=int8,symmetric=false"]
)
def test_a_format_and_parts_of_another_contradict(options: str) -> None:
    with pytest.raises(PassError, match="says all of it; leave out (lookup=True|bits=3|group=64|symmetric=False)"):
        make_pass(f"quantize{{{options}}}").validate()
    make_pass("quantize{format=int8,embeddings=false}").validate()


@pytest.mark.parametrize(
    "specification, message",
    [
        ("quantize{bits=5}", "bits=5"),
        ("round_activations{dtype=int3}", "use int8 or bf16"),
        ("cache{dtype=int3}", "use bf16, f16, int8, int4"),
        ("cache{group=9}", "no multiple of 8"),
        ("gptq{format=nu3_o3}", "has no uniform codes"),
        ("gptq{damp=2}", "damp=2.0 is out of range"),
        ("awq{format=int9}", "format='int9' is not available"),
        ("squeezellm{bits=7}", "use 3 or 4 bits"),
        ("squeezellm{damp=-1}", "damp=-1.0"),
        ("gqsa{sparsity=99}", "a sparsity of 20 to 60 percent"),
        ("gqsa{group=7}", "use groups of 16, 32 or 64"),
        ("two_four{group=13}", "use 64 or 128 columns"),
    ],
)
def test_options_that_fit_no_model_are_refused_without_one(specification: str, message: str) -> None:
    with pytest.raises((PassError, TypeMismatch), match=message):
        make_pass(specification).validate()
