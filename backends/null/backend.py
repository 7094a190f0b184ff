"""The null backend: every launch is generated and rendered, as C++ text that nobody compiles. It tests code generation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stemma.backends.base import Backend, Claim, Inputs, Kernel, Limits, Refusal
from stemma.backends.cpu.dialect import CPU
from stemma.ir import CompileError, Function, Tensor


class NullBackend(Backend):
    """Claims nothing, so that every operation goes through lowering and rendering."""

    name = "null"
    limits = Limits(vector_bytes=16)
    dtypes = frozenset({"f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"})
    dialect = CPU

    def claim(self, body: Function, inputs: Inputs) -> Claim | Refusal:
        """Always a refusal."""
        return Refusal("the null backend has no templates")

    def render(self, kernel: Kernel) -> str:
        """CompileError: there is no template."""
        raise CompileError(f"The null backend has no template {kernel.template!r}.")

    def host(self, *, title: str, kernels: Sequence[str], functions: Sequence[Mapping[str, Any]]) -> str:
        """Kernels and launch lists, without support code."""
        lists = [f"// {f['name']}\n" + "\n".join(f["body"]) for f in functions]
        return "\n\n".join([f"// {title}", *kernels, *lists]) + "\n"

    def layout_bytes(self, layout: str, tensor: Tensor) -> int:
        """Plain rows are the only layout."""
        if layout != "rows" or not isinstance(tensor.bytes, int):
            raise CompileError(f"The null backend has no weight layout {layout!r}.")
        return tensor.bytes
