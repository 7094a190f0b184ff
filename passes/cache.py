"""Keys and values of the cache in fewer bits: a rounding of the plain model that the decode step turns into storage.

attention(q, k, v)  ->  attention(q, dequantize(quantize(k, "int8")), dequantize(quantize(v, "int8")))

The rounding is part of the model, so its loss is measured like any other and every backend can run it. `incremental` sees that what
it caches was rounded, and stores the rounded rows: each of [heads, slots] is a row of codes with its own scales, so sequences fork
and trees are committed as ever. Keys are rounded after their rotary embedding, by token and head, as values are (Liu et al. 2024,
KIVI, also round keys by channel, which needs groups of tokens and so rows that change later).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Function, Module, Node, PassError, ops
from stemma.ir.formats import format_of
from stemma.passes.base import Label, Pass, PassContext

TYPES = ("bf16", "f16", "int8", "int4")


@dataclass(frozen=True)
class Cache(Pass):
    """Store keys and values of the cache as bf16, f16, int8 or int4.

    int8: a scale for each head of each token. int4: codes 0..15 with a scale and a zero point for every `group` numbers of it.
    keys, values: the type of one of them, when it differs from `dtype`; keys lose more by 4 bits than values do.
    """

    dtype: str = "int8"
    keys: str = ""
    values: str = ""
    group: int = 32
    name: ClassVar[str] = "cache"
    label: ClassVar[Label] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"causal"})

    def validate(self) -> None:
        for name in (self.dtype, self.keys or self.dtype, self.values or self.dtype):
            if name not in TYPES:
                raise PassError(f"cache: the type {name!r} is not available; use {', '.join(TYPES)}.")
        if self.group < 8 or self.group % 8:
            raise PassError(f"cache: group={self.group} is no multiple of 8.")

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with rounded keys and values; PassError for an unknown type or a group that does not divide the heads."""
        self.validate()
        return module.map(self._function)

    def _function(self, function: Function) -> Function:
        def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
            if node.op.name != "attention":
                return node.rebuild(*inputs)
            k = self._rounded(inputs[1], self.keys or self.dtype, node)
            v = self._rounded(inputs[2], self.values or self.dtype, node)
            return node.rebuild(inputs[0], k, v, *inputs[3:])

        return function.rewrite(replace)

    def _rounded(self, x: Node, name: str, user: Node) -> Node:
        if name in ("bf16", "f16"):
            return ops.cast(ops.cast(x, dtype=name), dtype=x.dtype)
        stored = "int8" if name == "int8" else f"uint4_g{self.group}"
        width = x.shape[3]
        reason = format_of(stored).refusal(width) if isinstance(width, int) else f"Heads of {width} have no constant width."
        if reason:
            where = f" (at {user.origin.line})" if user.origin.line else ""
            raise PassError(
                f"cache: {x.type!r}{where} cannot be stored as {stored}. {reason} Choose a group that divides the heads, or int8."
            )
        return ops.dequantize(ops.quantize(x, dtype=stored))
