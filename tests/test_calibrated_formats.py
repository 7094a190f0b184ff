"""Calibrated passes besides GPTQ: SqueezeLLM, GQSA, 2:4 and AWQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stemma.ir import Array, Format, PassError, Quantized, Tensor, dtype, interpret, ops, quantize_array, verify
from stemma.ir.formats.group_sparse import GroupSparse
from stemma.passes.awq import Awq
from stemma.passes.base import PassContext
from stemma.passes.calibrate import CalibratedWeights, Site
from stemma.passes.gptq import Gptq
from stemma.passes.gqsa import Gqsa
from stemma.passes.quantize import Quantize
from stemma.passes.registry import make_pass
from stemma.passes.squeezellm import SqueezeLLM
from stemma.passes.two_four import TwoFour
from tests.programs import tiny_lm
from tests.test_calibrate import TEXT, context
from tests.test_gptq import correlated

pytestmark = pytest.mark.quick
PASSES = (
    Gqsa(), Gqsa(sparsity=20, group=16), TwoFour(), SqueezeLLM(), SqueezeLLM(bits=3, outliers=0), SqueezeLLM(compensate=True),
    SqueezeLLM(bits=3, outliers=0, compensate=True), SqueezeLLM(outliers=0.03, compensate=True), Gptq(format="lut1_g64"),
    Gptq(format="lut2_g64"),
)  # fmt: skip


class Given:
    """Rows of an array, as `Rows` gives them."""

    def __init__(self, values: Array) -> None:
        self.root, self.values = None, values

    def block(self, node: Any, start: int, stop: int) -> Array:
        return self.values[start:stop]


def choose(step: CalibratedWeights, w: Array, x: Array) -> Quantized:
    """What a pass makes of one weight [N, K] for inputs [tokens, K]."""
    node = ops.weight(name="w", type=Tensor("f32", w.shape))
    ((_, made),) = step.choose(Site((node,), (), [x]), lambda _: Given(w))  # type: ignore[arg-type,return-value]
    return made


def checked(made: Quantized, rows: int, columns: int) -> None:
    """The parts are those of the format, within its rules."""
    target = dtype(made.dtype)
    assert isinstance(target, Format)
    assert {n: (p.dtype, p.shape) for n, p in made.parts.items()} == {
        n: (np.dtype(t), (rows, *extent)) for n, (t, extent) in target.parts(columns).items()
    }
    if isinstance(target, GroupSparse):
        for start in range(0, rows, target.rows_together):
            kept = made.parts["kept"][start : start + target.rows_together]
            assert (~kept).sum() == target.pruned(len(kept), columns)
        assert not made.codes[~np.repeat(made.parts["kept"], target.group, axis=1)].any()
        assert not made.scales[~made.parts["kept"]].any()
    if made.dtype.endswith("2of4"):
        assert (np.count_nonzero(made.codes.reshape(rows, -1, 4), axis=2) <= 2).all()


@pytest.mark.parametrize("step", PASSES, ids=repr)
def test_outputs_are_closer_than_without_calibration(step: CalibratedWeights) -> None:
    """The error of the outputs is below that of the format's own rounding, which knows nothing of the inputs."""
    rng = np.random.default_rng(7)
    x, w = correlated(rng, 800, 128), rng.standard_normal((40, 128), dtype=np.float32)
    made = choose(step, w, x)
    checked(made, 40, 128)
    nearest = quantize_array(w, made.dtype)
    errors = [np.square(x @ (q.dequantize() - w).T).sum() for q in (made, nearest)]
    assert errors[0] < errors[1], errors


def test_compensation_under_codebooks() -> None:
    """Outputs are closer than with the same codebooks and codes to nearest; outliers' columns are exact, but for f16."""
    rng = np.random.default_rng(4)
    x, w = correlated(rng, 800, 128), rng.standard_normal((40, 128), dtype=np.float32)
    nearest, made = (choose(SqueezeLLM(bits=3, outliers=0.05, compensate=c), w, x) for c in (False, True))
    np.testing.assert_array_equal(nearest.parts["codebook"], made.parts["codebook"])
    errors = [np.square(x @ (q.dequantize() - w).T).sum() for q in (made, nearest)]
    assert errors[0] < 0.7 * errors[1], errors


@pytest.mark.parametrize("step", PASSES, ids=repr)
def test_difficult_values(step: CalibratedWeights) -> None:
    """Constant rows, rows and groups of zeros, inputs that are always zero."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((24, 128), dtype=np.float32)
    w[0], w[1], w[2, :64] = 0, -0.75, 0
    for x in (correlated(rng, 300, 128), np.zeros((300, 128), np.float32)):
        x[:, 64:96] = 0
        made = choose(step, w, x)
        checked(made, 24, 128)
        assert np.isfinite(made.dequantize()).all() and not made.dequantize()[0].any()


def test_embeddings_are_left_alone_by_sparse_passes() -> None:
    """They, and what is tied to them, stay as they are unless it is asked for."""
    module, weights = tiny_lm()
    forward = Gqsa(group=16).run(module, context(weights))["forward"]
    verify(module.replace(forward))
    assert forward.results[0].inputs[1].dtype == "f32"
    assert {n.inputs[1].dtype for n in forward.nodes if n.op.name == "linear"} == {"f32", "int4_g16_s50"}


def outputs(module: Any, given: PassContext) -> Array:
    return np.asarray(interpret(module["forward"], [TEXT[0][None]], given.weights)["logits"])


def loud(weights: dict[str, Array]) -> dict[str, Array]:
    """The weights with some inputs of every linear behind a norm or a gate thirty times as large, as in trained models."""
    found = {n: w.copy() for n, w in weights.items()}
    for name in found:
        if name.endswith("norm") and name != "norm":
            found[name][3::8] *= 30
        if name.endswith(".up"):
            found[name][5::16] *= 30
    return found


def test_awq_scales_change_nothing_but_rounding() -> None:
    """Without rounding the model computes the same; with it, it is closer than without scales."""
    module, weights = tiny_lm(hidden=64, inner=128)
    weights = loud(weights)
    given = context(weights)
    scaled = Awq(format="int4_g32", round=False).run(module, given)
    verify(scaled)
    before = outputs(module, given)
    np.testing.assert_allclose(outputs(scaled, given), before, atol=1e-4 * np.abs(before).max())
    assert "2 of 9 inputs" in given.notes[-1] and sum(":awq" in n for n in scaled.weights()) == 6
    given = context(weights)
    awq = Awq(format="int4_g32").run(module, given)
    verify(awq)
    error = np.square(outputs(awq, given) - before).sum()
    assert error < np.square(outputs(Quantize(bits=4, group=32).run(module, given), given) - before).sum()


def test_awq_then_gptq(tmp_path: Path) -> None:
    """Scaled weights are constants like others; the same passes again take everything from the workspace."""
    (tmp_path / "model.safetensors").write_bytes(b"the checkpoint")
    module, weights = tiny_lm()
    results = []
    for _ in range(2):
        given = context(loud(weights), workspace=tmp_path / "work", source=tmp_path)
        changed = Awq(format="int3_g32", round=False).run(module, given)
        changed = Gptq(format="int3_g32").run(changed, given)
        verify(changed)
        results.append((changed, outputs(changed, given)))
    assert results[0][0] is results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_bad_options() -> None:
    """Options out of range are said before anything is read."""
    module, weights = tiny_lm()
    for text, match in (
        ("squeezellm{bits=5}", "use 3 or 4 bits"), ("squeezellm{outliers=0.5}", "share of outliers"), ("gqsa{bits=2}", "bits=2"),
        ("gqsa{sparsity=90}", "20 to 60 percent"), ("two_four{group=48}", "64 or 128"), ("awq{format=int5_g64}", "no element type"),
        ("two_four", "no multiple of the group 64"), ("gqsa{group=16,damp=2}", "damp=2"), ("awq{format=int4_g24}", "does not fit"),
    ):  # fmt: skip
        with pytest.raises(Exception, match=match) as caught:
            make_pass(text).run(module, context(weights))
        assert type(caught.value).__name__ in ("PassError", "TypeMismatch")
    with pytest.raises(PassError, match="0 tokens"):
        Awq(format="int4_g32").run(module, context(weights, ()))
