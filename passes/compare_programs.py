"""Whether a pass changed what a decoding program does: both forms run on made-up models with the reference interpreter."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from stemma.ir import Array, Function, Module, State, Tensor, World, interpret, size, walk
from stemma.ir.ops.program import OutputValue, ReferenceModel
from stemma.ir.ops.tables import empty
from stemma.ir.types import numpy_dtype

PROMPTS = ((1,), (2, 0, 1, 3, 0, 1))
TEMPERATURES = (0.0, 0.8)
NEW_TOKENS = 12


def changed_answers(before: Module, after: Module) -> tuple[int, int, str]:
    """Of the programs that both modules have with other bodies: how many answers differ, of how many, and the first such program.

    Programs that call Python functions are left out.
    """
    programs = [n for n in before.properties.get("programs", ()) if n in after.properties.get("programs", ())]
    defaults = {name: dict(pairs) for name, pairs in before.properties.get("program_defaults", ())}
    differing, total, first = 0, 0, ""
    for name in programs:
        old, new = before[name], after[name]
        if old is new or any(n.op.name == "host" for f in (old, new) for n in walk(f)):
            continue
        for prompt in PROMPTS:
            for temperature in TEMPERATURES if "temperature" in defaults.get(name, {}) else TEMPERATURES[:1]:
                given = {**defaults.get(name, {}), "temperature": temperature, "max_new_tokens": NEW_TOKENS}
                wanted, got = (_run(f, m, prompt, given) for f, m in ((old, before), (new, after)))
                same = wanted["output"] == got["output"] and all(
                    np.array_equal(wanted[k], got[k]) for k, r in zip(old.result_names, old.results, strict=True)
                    if isinstance(r.type, Tensor)
                )  # fmt: skip
                differing, total, first = differing + (not same), total + 1, first or ("" if same else name)
    return differing, total, first


def _run(function: Function, module: Module, prompt: tuple[int, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for param in function.params:
        name, kind = param.attrs["name"], param.type
        if isinstance(kind, State):
            inputs[name] = OutputValue() if kind.kind == "output" else empty(kind.kind, kind.args)  # type: ignore[arg-type]
        elif isinstance(kind, Tensor) and any(isinstance(s, size.Size) for s in kind.shape):
            inputs[name] = np.resize(np.array(prompt), (len(prompt),) * kind.rank).astype(numpy_dtype(kind.dtype))
        elif isinstance(kind, Tensor):
            inputs[name] = np.full([int(str(s)) for s in kind.shape], given.get(name, 0)).astype(numpy_dtype(kind.dtype))
    return interpret(function, inputs, float_type=np.float32, world=_world(module))


def _world(module: Module) -> World:
    """Models whose logits depend on every token before, with a few likely tokens; functions that give seeded numbers."""
    models = {name: _model(name, vocab, width) for name, vocab, width, _, _ in module.properties.get("models", ())}
    return World(models, compiled={f.name: _compiled(f) for f in module if f.name not in module.properties.get("programs", ())})


def _model(name: str, vocab: int, width: int) -> ReferenceModel:
    def compute(tokens: tuple[Any, ...]) -> tuple[Array, Array]:
        rng = np.random.default_rng(zlib.crc32(repr((name, tokens[-3:])).encode()))
        logits = rng.standard_normal(vocab).astype(np.float32)
        logits[:4] += 6.0  # prompts are made of these, so that drafters have something to find
        return logits, rng.standard_normal(width).astype(np.float32)

    return ReferenceModel(compute, vocab, width)


def _compiled(function: Function) -> Any:
    def run(*inputs: Array) -> Array:
        sizes = {d.name: len(inputs[0]) for d in function.dims()}
        shape = [size.evaluate(s, sizes) for s in function.results[0].shape]
        rng = np.random.default_rng(zlib.crc32(b"".join(np.ascontiguousarray(i).tobytes() for i in inputs)))
        return rng.standard_normal(shape).astype(np.float32)

    return run
