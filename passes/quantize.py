"""Weight quantization, round to nearest, and rounding of activations: the lossy passes every model can take.

linear(x, w)  ->  linear(x, quantize(w, "int4_g64"))         Quantize
linear(x, w)  ->  linear(quantize(x, "q8_g64"), w)           RoundActivations
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Format, Function, Module, Node, PassError, TypeMismatch, constant_nodes, dtype, format_of, ops
from stemma.passes.base import Label, Pass, PassContext

GROUPS = (32, 64, 128)
"""Columns that may share a scale: those that kernels are made for. int2 also has 256."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Store weights of linears and embeddings in fewer bits, rounded to nearest (see `stemma.ir.quantize_array`).

    bits: 8, 4, 3, 2, or 1 with lookup. group: columns of a row that share a scale, 0 for the whole row (8 bits); None is 0 for 8
    bits and 64 for fewer. symmetric: a scale only, else also a zero point (4, 3 and 2 bits). lookup: kernels that look sums up in
    tables instead of multiplying (T-MAC). format: an element type by name, such as "ternary_g64" or "q4_k", in place of all of
    these. A tied embedding stays tied; `embeddings=False` leaves embeddings and what is tied to them alone.
    """

    bits: int = 4
    group: int | None = None
    symmetric: bool = True
    lookup: bool = False
    format: str = ""
    embeddings: bool = True
    name: ClassVar[str] = "quantize"
    label: ClassVar[Label] = "lossy"

    def validate(self) -> None:
        self._format()

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with quantized weights; PassError for options without a format, and rows that the format does not take."""
        chosen = self._format()
        return module.map(lambda f: self._function(f, chosen))

    def _format(self) -> Format:
        """The element type that the options mean."""
        if self.format:
            plain = Quantize(format=self.format, embeddings=self.embeddings)
            if extra := [f"{k}={v}" for k, v in self.options().items() if v != plain.options()[k]]:
                raise PassError(f"quantize: format={self.format} says all of it; leave out {', '.join(extra)}.")
            try:
                return format_of(self.format)
            except TypeMismatch as error:
                raise PassError(f"quantize: format={self.format!r} is not available. {error}") from None
        group = self.group if self.group is not None else 0 if self.bits == 8 else 64
        kinds = {
            (8, True, False): "int8", **{(b, True, False): f"int{b}" for b in (4, 3, 2)},
            **{(b, False, False): f"uint{b}" for b in (4, 3, 2)}, **{(b, True, True): f"lut{b}" for b in (4, 3, 2, 1)},
        }  # fmt: skip
        kind = kinds.get((self.bits, self.symmetric, self.lookup))
        if kind is None:
            raise PassError(
                f"quantize: bits={self.bits}, symmetric={self.symmetric}, lookup={self.lookup} is not available; "
                "use 8, 4, 3 or 2 bits, of those 4, 3 and 2 also with symmetric=false, or 4, 3, 2 or 1 with lookup=true."
            )
        groups = (*((0,) if kind == "int8" else ()), *GROUPS, *((256,) if kind == "int2" else ()))
        if group not in groups:
            raise PassError(f"quantize: {kind} has no kernel for group={group}; use one of {', '.join(map(str, groups))}.")
        return format_of(f"{kind}_g{group}" if group else kind)

    def _function(self, function: Function, chosen: Format) -> Function:
        constant = constant_nodes(function)
        embedded = {n.inputs[0] for n in function.nodes if n.op.name == "embedding"}

        def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
            index = {"linear": 1, "embedding": 0}.get(node.op.name)
            if index is None or node.inputs[index] not in constant or dtype(node.inputs[index].dtype).kind != "float":
                return node.rebuild(*inputs)
            if node.inputs[index] in embedded and not self.embeddings:
                return node.rebuild(*inputs)
            weight = _quantized(inputs[index], chosen, node)
            return node.rebuild(*inputs[:index], weight, *inputs[index + 1 :])

        return function.rewrite(replace)


def _quantized(weight: Node, chosen: Format, user: Node) -> Node:
    columns = weight.shape[1]
    if isinstance(columns, int) and (reason := chosen.refusal(columns)):
        where = f" (at {user.origin.line})" if user.origin.line else ""
        raise PassError(
            f"quantize: a weight {weight.type!r}{where} does not fit. {reason} Choose a group that divides every row, or bits=8."
        )
    wide = weight if weight.dtype == "f32" else ops.cast(weight, dtype="f32")
    return ops.quantize(wide, dtype=chosen.name)


@dataclass(frozen=True)
class RoundActivations(Pass):
    """Round the inputs of linears while running, so that narrow products can be used: bf16, or int8 by groups.

    bf16 is used with float weights, int8 with quantized weights: `q8_gN` with the group that the weight's format names (its own
    group up to 128, 64 for weights scaled by channel, 32 for GGUF's super-blocks, whose sub-blocks of 16 are summed as whole
    numbers); a linear whose weight does not fit keeps f32 inputs.
    """

    dtype: str = "int8"
    name: ClassVar[str] = "round_activations"
    label: ClassVar[Label] = "lossy"

    def validate(self) -> None:
        if self.dtype not in ("int8", "bf16"):
            raise PassError(f"round_activations: dtype={self.dtype!r} is not available; use int8 or bf16.")

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with rounded inputs of linears."""
        self.validate()
        return module.map(lambda f: f.rewrite(self._replace))

    def _replace(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.op.name != "linear" or inputs[0].dtype != "f32":
            return node.rebuild(*inputs)
        weight = dtype(inputs[1].dtype)
        if self.dtype == "bf16" and weight.name == "bf16":
            return ops.linear(ops.cast(inputs[0], dtype="bf16"), *inputs[1:])
        columns = inputs[0].shape[-1]
        if self.dtype == "int8" and isinstance(weight, Format) and isinstance(columns, int) and not weight.refusal(columns):
            group = weight.activation_group
            if columns % group == 0:
                return ops.linear(ops.quantize(inputs[0], dtype=f"q8_g{group}"), *inputs[1:])
        return node.rebuild(*inputs)
