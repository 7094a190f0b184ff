"""Epilogues of matrix products: elementwise IR operations as C++ statements over a vector of 16 columns of one row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from stemma.backends.base import Refusal
from stemma.ir import Function, Node

_UNARY = {
    "neg": "-{0}", "abs": "vabs({0})", "exp": "st_exp({0})", "log": "st_log({0})", "sqrt": "vsqrt({0})", "tanh": "st_tanh({0})",
    "rsqrt": "splat16(1.0f) / vsqrt({0})", "reciprocal": "splat16(1.0f) / {0}", "erf": "st_erf({0})",
    "sigmoid": "st_sigmoid({0})", "silu": "st_silu({0})",
}  # fmt: skip
_BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "maximum": "vmax({0}, {1})",
    "minimum": "vmin({0}, {1})",
}  # fmt: skip
_GELU = {"none": "st_gelu({0})", "tanh": "st_gelu_tanh({0})", "sigmoid": "{0} * st_sigmoid({0} * 1.702f)"}
_GATED = {"silu": "st_silu({0}) * {1}", "gelu": "st_gelu({0}) * {1}", "gelu_tanh": "st_gelu_tanh({0}) * {1}"}


@dataclass
class Made:
    """Statements of an epilogue, its extra C++ parameters and the body inputs they read."""

    statements: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    operations: int = 0
    output: str = "f32"
    pair: bool = False


class Epilogue:
    """Builds the epilogue of one body around its linear `anchor`."""

    def __init__(self, body: Function, anchor: Node, at: Mapping[Node, int]) -> None:
        self.body, self.anchor, self.at = body, anchor, at
        self.made = Made()
        self.columns = anchor.shape[-1]
        self.names: dict[Node, str] = {}

    def build(self, bias: Node | None) -> Made | Refusal:
        """The epilogue, or why there is none. `bias` is added first, as linear's definition says."""
        skip = {*self.body.params, self.anchor, *self._before(self.anchor)}
        todo = [n for n in self.body.nodes if n not in skip and n.op.name != "constant"]
        if refusal := self._halves(todo):
            return refusal
        if bias is not None:
            if bias not in self.at:
                return Refusal("the bias must come from outside the kernel")
            parameter = self._parameter(bias)
            self.made.statements.append(f"acc = acc + load16({parameter} + n);")
            if self.made.pair:
                self.made.statements.append(f"acc2 = acc2 + load16({parameter} + N + n);")
        for node in todo:
            if node in self.names:
                continue
            text = self._operation(node)
            if isinstance(text, Refusal):
                return text
            if text == "":
                continue
            name = f"e{self.made.operations}"
            self.made.statements.append(f"v16f {name} = {text};")
            self.names[node] = name
            self.made.operations += 1
        name = self.names[self.body.results[0]]
        if name != "acc":
            self.made.statements.append(f"acc = {name};")
        return self.made

    def _before(self, node: Node) -> list[Node]:
        """The views between the input and the linear."""
        found = []
        x = node.inputs[0]
        while x.inputs:
            found.append(x)
            x = x.inputs[0]
        return found

    def _halves(self, todo: list[Node]) -> Refusal | None:
        """Recognise the two halves of a joined gate and up projection."""
        self.names[self.anchor] = "acc"
        slices = [n for n in todo if n.op.name == "slice"]
        if not slices:
            return None
        last, half = self.anchor.tensor.rank - 1, self.columns // 2
        found = {n.attrs["start"]: n for n in slices}
        whole = all(
            n.inputs[0] is self.anchor and n.attrs["axis"] == last and n.attrs["step"] == 1
            and n.attrs["stop"] - n.attrs["start"] == half for n in slices
        )  # fmt: skip
        readers = [n for n in todo if self.anchor in n.inputs and n not in slices]
        if not whole or found.keys() != {0, half} or not isinstance(half, int) or half % 16 or readers:
            return Refusal("slices of a matrix product are claimed only as the two halves of a gated pair, multiples of 16 wide")
        self.names[found[0]], self.names[found[half]] = "acc", "acc2"
        del self.names[self.anchor]
        self.columns = half
        self.made.pair = True
        return None

    def _operation(self, node: Node) -> str | Refusal:
        name = node.op.name
        result = node is self.body.results[0]
        if name == "cast" and result and node.dtype == "bf16" and node.inputs[0] in self.names and self.columns % 2 == 0:
            self.made.output = "bf16"
            self.names[node] = self.names[node.inputs[0]]
            return ""
        if name == "reshape" and node.inputs[0] in self.names and (result or node.shape[-1:] == (self.columns,)):
            self.names[node] = self.names[node.inputs[0]]
            return ""
        if node.shape[-1:] != (self.columns,) or node.dtype != "f32":
            return Refusal(f"{name} of {node.type!r} does not keep the shape of the product")
        if name == "gelu":
            form = _GELU[node.attrs["approximate"]]
        elif name == "gated":
            form = _GATED[node.attrs["activation"]]
        elif name in _UNARY or name in _BINARY:
            form = _UNARY.get(name) or _BINARY[name]
        else:
            return Refusal(f"{name} has no form in an epilogue")
        operands = [self._operand(i, node) for i in node.inputs]
        for operand in operands:
            if isinstance(operand, Refusal):
                return operand
        return form.format(*operands)

    def _operand(self, node: Node, user: Node) -> str | Refusal:
        if node in self.names:
            return self.names[node]
        if node.op.name == "constant":
            value = float(node.attrs["value"])
            if not math.isfinite(value):
                return Refusal("an infinite constant has no form in an epilogue")
            return f"splat16({value!r}f)"
        if node not in self.at or node.dtype != "f32":
            return Refusal(f"{node!r} is no f32 input of the kernel")
        elements = node.tensor.elements
        if node.tensor == user.tensor or (elements == user.tensor.elements):
            return f"load16({self._parameter(node)} + m * N + n)"
        if elements == self.columns and node.shape[-1:] == (self.columns,):
            return f"load16({self._parameter(node)} + n)"
        if elements == 1:
            return f"splat16({self._parameter(node)}[0])"
        return Refusal(f"an operand {node.type!r} is neither one value, one per column, nor one per element")

    def _parameter(self, node: Node) -> str:
        index = self.at[node]
        if index not in self.made.inputs:
            self.made.inputs.append(index)
            self.made.extras.append(f"const float* p{len(self.made.inputs) - 1}")
        return f"p{self.made.inputs.index(index)}"
