"""Programs, models and modules that the tests of speculation share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stemma.frontend.programs.generate import generate
from stemma.ir import Array, Function, Module, State, Tensor, World, interpret, parse_module, print_module, verify
from stemma.ir.ops.program import OutputValue, ReferenceModel
from stemma.ir.ops.tables import empty
from stemma.ir.ops.tree import Expand
from stemma.ir.trace import ModelSpec, Program, trace
from stemma.passes import ModelInfo, PassContext
from stemma.passes.speculate import Speculate

VOCAB, WIDTH, HEADS = 6, 4, 4
SPEC = ModelSpec(VOCAB, WIDTH, (0,), 200)


def models(seed: int, likeness: float = 0.3) -> dict[str, ReferenceModel]:
    """A model whose logits depend mostly on the last token, and two that are like it: they guess well, not always."""
    weights = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)) * 2

    def like(salt: int, width: int) -> ReferenceModel:
        def compute(tokens: tuple[Any, ...]) -> tuple[Array, Array]:
            rng = np.random.default_rng([seed, salt, *tokens])
            logits = weights[tokens[-1]] + likeness * rng.standard_normal(VOCAB)
            return logits.astype(np.float32), rng.standard_normal(width).astype(np.float32)

        return ReferenceModel(compute, VOCAB, width)

    return {"model": like(1, WIDTH), "draft": like(2, 0), "early": like(3, 0)}


def heads(seed: int) -> dict[str, Any]:
    """Compiled functions of Medusa and Hydra heads."""
    rng = np.random.default_rng(seed)
    each, table = rng.standard_normal((WIDTH, HEADS, VOCAB)), rng.standard_normal((VOCAB, VOCAB))

    def hydra(number: int) -> Any:
        return lambda hidden, path: (hidden @ each[:, number] + table[path[:, -1]]).astype(np.float32)

    found = {f"hydra_{i}": hydra(i) for i in range(HEADS)}
    return found | {"medusa": lambda hidden: np.einsum("nw,whv->nhv", hidden, each).astype(np.float32)}


def context() -> PassContext:
    info = ModelInfo(VOCAB, 0, 200, (0,))
    return PassContext(models={"model": ModelInfo(VOCAB, WIDTH, 200, (0,)), "draft": info, "early": info})


def traced(*programs: Program) -> Module:
    """A module of programs with the defaults of their options."""
    found = [trace(program, {"model": SPEC}) for program in programs]
    defaults = tuple((t.function.name, tuple(t.defaults.items())) for t in found)
    names = tuple(t.function.name for t in found)
    return Module([t.function for t in found], {"programs": names, "program_defaults": defaults})


def speculated(program: Program = generate, **options: Any) -> Module:
    """The program speculated, after the checks that every module must pass."""
    module = Speculate(**options).run(traced(program), context())
    verify(module)
    assert parse_module(print_module(module)) is module
    return module


def beginning(function: Function) -> dict[str, Any]:
    """What persistent parameters are at first."""
    found: dict[str, Any] = {}
    for param in function.params:
        name, type = param.attrs["name"], param.type
        if isinstance(type, State) and type.kind != "output":
            found[name] = empty(type.kind, tuple(int(a) for a in type.args))
        elif isinstance(type, Tensor) and name in function.result_names:
            found[name] = np.zeros([int(str(s)) for s in type.shape], {"f32": np.float32, "i32": np.int32}[type.dtype])
    return found


def run(module: Module, name: str, world: World, kept: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    """The results of a program on the interpreter. kept: persistent values, which are updated."""
    defaults = dict(dict(module.properties["program_defaults"]).get(name, ()))
    kept = {} if kept is None else kept
    start = beginning(module[name]) | kept
    result = interpret(module[name], {**defaults, **inputs, **start, "output": OutputValue()}, float_type=np.float32, world=world)
    kept |= {key: result[key] for key in start}
    return {key: value for key, value in result.items() if key not in start}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether results are equal to the bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) if isinstance(a[k], np.ndarray) else a[k] == b[k] for k in a)


def accepted_length(module: Any, world: World, **options: Any) -> float:
    """Tokens per call of the model."""
    calls = []

    def counted(self: Any, ctx: Any, sequences: Any, tree: Any, *, fresh: int) -> Any:
        if sequences.model is world.models["model"]:
            calls.append(len(tree.tokens))
        return expand(self, ctx, sequences, tree, fresh=fresh)

    expand = Expand.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Expand, "evaluate", counted)
        tokens = run(module, "generate", world, **options)["output"].tokens
    return len(tokens) / len(calls)
