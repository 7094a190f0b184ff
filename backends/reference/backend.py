"""The reference backend: runs a module by the interpreter. What every other backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stemma.backends.base import Backend, Claim, Inputs, Kernel, Limits, Refusal
from stemma.backends.cpu.dialect import CPU
from stemma.ir import Array, CompileError, Function, Module, interpret

EVERY = frozenset({"f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"})


class Interpreted:
    """A module and its weights; each call interprets a function in `float_type`."""

    def __init__(self, module: Module, weights: Any, float_type: type = np.float64) -> None:
        self.module, self.weights, self.float_type = module, weights, float_type

    def call(self, function: str, inputs: Mapping[str, Array], sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
        """Results by name; `sizes` gives dimensions that no input shows."""
        return interpret(self.module[function], inputs, self.weights, sizes=sizes, float_type=self.float_type)


class ReferenceBackend(Backend):
    """Claims nothing, generates nothing, runs everything slowly."""

    name = "reference"
    limits = Limits(vector_bytes=8)
    dtypes = EVERY
    dialect = CPU

    def claim(self, body: Function, inputs: Inputs) -> Claim | Refusal:
        """Always a refusal: the interpreter needs no kernels."""
        return Refusal("the reference backend interprets")

    def render(self, kernel: Kernel) -> str:
        """CompileError: there is no template."""
        raise CompileError(f"The reference backend renders no kernels, so not {kernel.name}.")

    def host(self, *, title: str, kernels: Sequence[str], functions: Sequence[Mapping[str, Any]]) -> str:
        """CompileError: there is no source."""
        raise CompileError("The reference backend renders no source; use it by stemma.codegen.execute.")

    def executable(self, module: Module, weights: Any) -> Interpreted:
        """The module, interpreted in float64."""
        return Interpreted(module, weights)
