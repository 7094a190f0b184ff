"""The CPU backend: C++ kernels by templates where one fits, generated from the kernel-level IR otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stemma.backends.base import Backend, Claim, Inputs, Kernel, Limits, Refusal
from stemma.backends.cpu import claims
from stemma.backends.cpu.dialect import CPU
from stemma.backends.cpu.formats import ACTIVATIONS, linear_bytes
from stemma.backends.cpu.formats import rows as by_rows
from stemma.backends.cpu.render_templates import render
from stemma.backends.cpu.toolchain import CpuToolchain
from stemma.ir import CompileError, Function, Node, Tensor, ops


class CpuBackend(Backend):
    """x86-64 in three instruction-set variants; any other processor by the portable one."""

    name = "cpu"
    limits = Limits(vector_bytes=64)
    dtypes = frozenset({"f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool", *ACTIVATIONS})
    hot = frozenset({"linear", "embedding", "attention", "cached_attention", "rms_norm", "layer_norm", *claims.NEURONS})
    dialect = CPU
    device = "stemma.backends.cpu.device"
    toolchain = CpuToolchain()

    def claim(self, body: Function, inputs: Inputs) -> Claim | Refusal:
        """The first template that fits; the refusal of the one whose anchor op the body has."""
        refusal = None
        for matcher in claims.MATCHERS:
            answer = matcher(body, inputs)
            if isinstance(answer, Claim):
                return answer
            refusal = refusal or answer
        names = ", ".join(dict.fromkeys(n.op.name for n in body.nodes if "leaf" not in n.op.tags))
        return refusal or Refusal(f"no template computes {names}")

    def legalize(self, node: Node) -> Node | None:
        """The same value in a form that a template takes: i32 ids, f32 copies of f16 weights, masks as additive f32."""
        name = node.op.name
        if name == "embedding" and node.inputs[1].dtype != "i32":
            return ops.embedding(node.inputs[0], _narrow(node.inputs[1]))
        if name in ("embedding", "linear", "linear_at", "linear_from"):
            at = 0 if name == "embedding" else 1
            if node.inputs[at].dtype in ("f16", "f64"):
                parts = list(node.inputs)
                parts[at] = ops.cast(parts[at], dtype="f32")
                return node.op(*parts, **node.attrs)
        if name == "attention" and len(node.inputs) > 3 and node.inputs[3].dtype == "bool":
            low = ops.constant(value=float("-inf"), dtype="f32")
            mask = ops.where(node.inputs[3], ops.constant(value=0.0, dtype="f32"), low)
            return node.op(*node.inputs[:3], mask, **node.attrs)
        return None

    def render(self, kernel: Kernel) -> str:
        """The text of one template instantiation."""
        options = dict(kernel.options)
        return render(f"{kernel.template}.hpp.j2", name=kernel.name, **options)

    def host(self, *, title: str, kernels: Sequence[str], functions: Sequence[Mapping[str, Any]]) -> str:
        """Vectors, conversions, mathematics, the team of threads and the sampler; then kernels, launch lists and the ABI."""
        support = (
            render("support.hpp.j2") + CPU.preamble + render("sampling.hpp.j2") + render("top_k.hpp.j2") + render("probe.hpp.j2")
        )
        return render("host.cpp.j2", title=title, support=support, kernels=kernels, functions=functions)

    def layout_bytes(self, layout: str, tensor: Tensor) -> int:
        """Bytes of a packed weight: panels of 64 outputs ("panel", "pair") or plain rows ("rows")."""
        if layout in ("panel", "pair"):
            outputs, columns = map(int, tensor.shape)  # type: ignore[arg-type]
            return linear_bytes(outputs, columns, tensor.dtype)
        if layout == "rows" and tensor.dtype in by_rows.NAMES and tensor.rank == 2:
            outputs, columns = map(int, tensor.shape)  # type: ignore[arg-type]
            return outputs * by_rows.row_bytes(columns, tensor.dtype)
        if layout == "rows" and isinstance(tensor.bytes, int):
            return tensor.bytes
        raise CompileError(f"The backend cpu has no weight layout {layout!r} for {tensor!r}.")


def _narrow(ids: Node) -> Node:
    """i32 ids; when they were widened from i32 before, the narrow ones themselves."""
    if ids.op.name == "cast" and ids.inputs[0].dtype == "i32":
        return ids.inputs[0]
    if ids.op.name == "reshape":
        return ops.reshape(_narrow(ids.inputs[0]), shape=ids.shape)
    if ids.op.name == "fused" and all(n.op.name in ("param", "cast", "reshape") for n in ids.attrs["body"].nodes):
        (inner,) = ids.attrs["body"].inline(*ids.inputs)
        return _narrow(inner)
    return ops.cast(ids, dtype="i32")
