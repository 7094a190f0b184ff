"""The walk over a model on calibration text, and what keeps its results."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stemma.calibration import Calibration
from stemma.compiler import compile
from stemma.frontend.hf import load_checkpoint
from stemma.ir import Array, CheckpointError, Module, Node, PassError, StemmaError, Tensor, WeightStore, interpret, verify
from stemma.passes import calibrate
from stemma.passes.base import PassContext
from stemma.passes.calibrate import Site, linear_sites, replace_weights, rounded, walk
from stemma.passes.gptq import Gptq
from stemma.passes.quantize import Quantize
from stemma.passes.two_four import TwoFour
from stemma.passes.workspace import Workspace
from tests.programs import tiny_lm

RNG = np.random.default_rng(5)
TEXT = tuple(RNG.integers(0, 50, n) for n in (64, 64, 40))
MODELS = Path(__file__).parent.parent / "examples" / "models"


def store(weights: Mapping[str, Array]) -> WeightStore:
    result = WeightStore()
    for name, value in weights.items():
        result.add(name, Tensor("f32", value.shape), partial(np.asarray, value), partial(np.asarray, value))
    return result


def context(weights: Mapping[str, Array], text: tuple[Array, ...] = TEXT, **more: Any) -> PassContext:
    return PassContext(weights=store(weights), calibration=text, **more)


def new_weights(changed: Any, given: PassContext) -> dict[str, bytes]:
    """The bytes of every weight that the pass made, by name."""
    names = sorted(n for n in changed.weights() if ":gptq" in n)
    return {n: b"".join(np.ascontiguousarray(p).tobytes() for p in given.weights(n).parts.values()) for n in names}


def test_the_walk_is_the_interpreter() -> None:
    """Every site once and in order, its inputs those of the interpreter; results are the same bits."""
    module, weights = tiny_lm()
    forward, visited = module["forward"], list[Node]()

    def visit(site: Site) -> dict[Node, Node]:
        visited.extend(site.weights)
        assert [x.shape for x in site.inputs] == [(128, site.columns), (40, site.columns)]
        return {}

    found = walk(forward, TEXT, store(weights), visit)
    for batch, logits in zip((np.stack(TEXT[:2]), TEXT[2][None]), found, strict=True):
        expected = interpret(forward, {"input_ids": batch}, store(weights), float_type=np.float32)["logits"]
        np.testing.assert_array_equal(logits, expected)
    assert visited == [n.inputs[1] for _, nodes in linear_sites(forward) for n in nodes]


def test_later_layers_see_what_was_chosen() -> None:
    """With weights replaced on the way, the walk computes what the rewritten function does."""
    module, weights = tiny_lm()
    forward, chosen = module["forward"], dict[Node, Node]()

    def visit(site: Site) -> dict[Node, Node]:
        new = {w: rounded(w, "int4_g32") for w in site.weights}
        chosen.update(new)
        return new

    logits = walk(forward, TEXT[:1], store(weights), visit)[0]
    changed = replace_weights(forward, {w: new for w, new in chosen.items() if w.attrs["name"] != "embedding"})
    head = changed.results[0].rebuild(changed.results[0].inputs[0], chosen[forward.results[0].inputs[1]])
    changed = changed.with_results([("logits", head)])
    np.testing.assert_array_equal(logits, interpret(changed, [TEXT[0][None]], store(weights), float_type=np.float32)["logits"])


def test_a_calibrated_model() -> None:
    """Linears have new weights, a tied embedding stays tied or is left alone, the module verifies."""
    module, weights = tiny_lm()
    changed = Gptq(format="int4_g32").run(module, context(weights))
    verify(changed)
    forward = changed["forward"]
    assert {n.inputs[1].dtype for n in forward.nodes if n.op.name == "linear"} == {"int4_g32"}
    assert forward.results[0].inputs[1] is next(n.inputs[0] for n in forward.nodes if n.op.name == "embedding")
    kept = Gptq(format="int4_g32", embeddings=False).run(module, context(weights))["forward"]
    assert kept.results[0].inputs[1].op.name == "weight" and kept.results[0].inputs[1].dtype == "f32"


def test_weights_that_were_rounded_get_better_codes() -> None:
    """After a preset, or compress, each weight keeps the format that it was given; another pass says that nothing is left."""
    module, weights = tiny_lm()
    given = context(weights)
    first = next(n.inputs[1] for n in module["forward"].nodes if n.op.name == "linear")
    mixed = module.replace(replace_weights(module["forward"], {first: rounded(first, "uint3_g32")}))
    mixed = Quantize(bits=4, group=32).run(mixed, given)
    changed = Gptq().run(mixed, given)
    verify(changed)
    formats = [[n.inputs[1].dtype for n in m["forward"].nodes if n.op.name == "linear"] for m in (mixed, changed)]
    assert formats[0] == formats[1] and set(formats[1]) == {"uint3_g32", "int4_g32"}
    before, after, again = (interpret(m["forward"], [TEXT[0][None]], given.weights)["logits"] for m in (module, mixed, changed))
    assert np.square(again - before).sum() < np.square(after - before).sum()
    assert TwoFour().run(mixed, given) is mixed and "no weights of linears" in given.notes[-1]


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """A run that is interrupted and started again gives the bytes of one that is not, and does not repeat what was done."""
    module, weights = tiny_lm()
    (tmp_path / "model.safetensors").write_bytes(b"the checkpoint")
    plain = context(weights)
    expected = new_weights(Gptq(format="int4_g32").run(module, plain), plain)
    seen: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 7:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"workspace": tmp_path / "work", "source": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        Gptq(format="int4_g32").run(module, context(weights, report=stop, **settings))
    again = context(weights, report=lambda stage, done, total: seen.append(done), **settings)
    assert new_weights(Gptq(format="int4_g32").run(module, again), again) == expected
    assert len(seen) == 7 + 1 + len(expected) - 6 and "6 of 14" in again.notes[-1]
    third = context(weights, report=lambda *_: pytest.fail("nothing is left to do"), **settings)
    assert new_weights(Gptq(format="int4_g32").run(module, third), third) == expected
    other = context(weights, **settings)
    Gptq(format="int4_g32", damp=0.02).run(module, other)
    assert not other.notes and len(list((tmp_path / "work").iterdir())) == 2  # another option: nothing is taken over


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "receipt"])
def test_damaged_workspace(tmp_path: Path, damage: str) -> None:
    """A result that is not whole is made again."""
    module, weights = tiny_lm(layers=1)
    (tmp_path / "model.safetensors").write_bytes(b"the checkpoint")
    settings: dict[str, Any] = {"workspace": tmp_path / "work", "source": tmp_path}
    first = context(weights, **settings)
    expected = new_weights(Gptq(format="int4_g32").run(module, first), first)
    path = sorted((tmp_path / "work").rglob("*.json" if damage == "receipt" else "*.codes.npy"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "truncate" else content)
    made: list[int] = []
    again = context(weights, report=lambda stage, done, total: made.append(done), **settings)
    assert new_weights(Gptq(format="int4_g32").run(module, again), again) == expected
    assert made == [0, 1000]  # one weight


def test_a_workspace_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file")
    with pytest.raises(PassError, match="cannot write"):
        Workspace(tmp_path / "work", "0" * 64)


def test_bad_input() -> None:
    """Too little text, none, a group that does not divide, NaN in a weight or in what the model computes: clear errors."""
    module, weights = tiny_lm()
    for text in ((), (np.arange(20),)):
        with pytest.raises(PassError, match=rf"gptq was given {sum(map(len, text))} tokens of text .* needs 128"):
            Gptq(format="int4_g32").run(module, context(weights, text))
    with pytest.raises(PassError, match="embedding does not fit.* no multiple of the group 48"):
        Gptq(format="int4_g48").run(module, context(weights))
    with pytest.raises(PassError, match="no uniform codes"):
        Gptq(format="q8_g32").run(module, context(weights))
    with pytest.raises(PassError, match="damp=3"):
        Gptq(format="int4_g32", damp=3).run(module, context(weights))
    for name, error, match in (("0.gate", CheckpointError, "NaN"), ("0.norm", PassError, "not finite")):
        bad = weights | {name: weights[name].copy()}
        bad[name][..., 1] = np.nan if name == "0.gate" else np.float32(3e38)
        with pytest.raises(error, match=match), np.errstate(all="ignore"):
            Gptq(format="int4_g32").run(module, context(bad))


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are made when they are read: the peak is within 1.5 times the largest layer in float32, plus activations."""
    hidden, inner, tokens = 256, 1024, 256
    module, weights = tiny_lm(layers=2, hidden=hidden, heads=8, kv_heads=4, width=32, inner=inner)
    shapes = {name: value.shape for name, value in weights.items()}
    layer = sum(v.nbytes for n, v in weights.items() if n.startswith("0."))
    lazy = WeightStore()
    del weights

    class Made:
        def __init__(self, name: str) -> None:
            self.shape = shapes[name]

        def __getitem__(self, rows: slice) -> Array:
            count = len(range(self.shape[0])[rows])
            return np.random.default_rng(rows.start).standard_normal((count, *self.shape[1:])).astype(np.float32) * 0.1

    for name, shape in shapes.items():
        made = Made(name)
        lazy.add(name, Tensor("f32", shape), lambda made=made: made[0 : made.shape[0]], lambda made=made: made)  # type: ignore[misc]
    monkeypatch.setattr(calibrate, "ROW_ELEMENTS", layer // 4 // 16)
    text = tuple(np.random.default_rng(1).integers(0, 50, (tokens // 128, 128)))
    tracemalloc.start()
    Gptq(format="int4_g32").run(module, PassContext(weights=lazy, calibration=text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    activations = 4 * tokens * (3 * hidden + 3 * inner) + 4 * tokens * 128 * 8 * 3  # the stream, a gated MLP's; scores of attention
    assert peak < 1.5 * layer + activations, (peak / layer, activations / layer)


def test_text_to_measure_is_not_calibrated_on() -> None:
    """The documents of both are disjoint; a short text is shared out, with a note; an empty one is an error."""
    checkpoint, notes = load_checkpoint(MODELS / "draft"), list[str]()
    measured, samples = Calibration(None, 600).split(checkpoint, 4096, notes)
    whole = np.concatenate(Calibration(None, 856).documents(checkpoint, 4096, notes))
    np.testing.assert_array_equal(np.concatenate([*measured, *samples]), whole)
    assert [len(d) for d in samples] == [512, 88] and not notes
    measured, samples = Calibration("import os\n" * 40).split(checkpoint, 4096, notes)
    assert sum(map(len, measured)) * 3 <= sum(map(len, samples)) and "instead of 8192" in notes[0]
    with pytest.raises(StemmaError, match="too few tokens"):
        Calibration("").split(checkpoint, 4096, notes)


def test_an_interrupted_compile_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was calibrated is kept beside the output until a compile succeeds."""

    def build(module: Module, weights: WeightStore, output: Path, **settings: Any) -> SimpleNamespace:
        output.write_bytes(b"an artifact")
        return SimpleNamespace(bytes=11)

    monkeypatch.setattr("stemma.codegen.build.build", build)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("measuring"):
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"passes": ["gptq"], "calibration_tokens": 200, "variants": ["native"], "programs": []}
    output = tmp_path / "m.stemma"
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        compile(MODELS / "draft", output, progress=stop, **settings)
    assert [p.name for p in tmp_path.iterdir()] == [".m.stemma.calibration"]
    stages: set[str] = set()
    report = compile(MODELS / "draft", output, progress=lambda stage, done, total: stages.add(stage), **settings)
    assert not any(s.startswith("calibrating") for s in stages) and report.loss is not None and report.loss["kl"] < 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["m.stemma"]
