"""The incremental pass: a plain causal graph becomes a decode step over a key-value cache.

    forward(ids [batch, tokens]) -> logits [batch, tokens, vocab]
      ->
    step(tokens [rows], positions [rows], slots [rows], sequence [rows], table [sequences, context], selected [outputs],
         k_cache_0 [heads, slots, width], v_cache_0, ...) -> logits [outputs, vocab], (hidden [outputs, width],) k_cache_0, ...

Rows of all sequences are flattened into one axis, so prefill, decoding, batches and token trees are one function. In a causal
language model attention is the only operation that mixes positions; everything else runs on the new rows alone. The pass proves
that from the sizes: an axis whose size mentions `batch` or `tokens` may be carried along, never reduced, sliced or joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from stemma.ir import Function, Module, Node, PassError, Size, SizeLike, Tensor, dim, dtype, ops, size
from stemma.passes.base import Pass, PassContext

CACHE_AXIS = 1  # caches are [heads, slots, width]


@dataclass(frozen=True)
class Incremental(Pass):
    """Derive the decode step of a causal language model.

    rows: the largest number of rows of one call. hidden: give the value that the output head is applied to as a second result.
    context: bound of the columns of the table, which steps in one module share; 0: that of the model. mix: when more than 1, a row
    is a mixture of so many tokens: tokens i32[rows, mix], and weights f32[rows, mix] of their embeddings. Functions NAME_forward
    become NAME_step, without hidden states and mixtures.
    """

    rows: int = 512
    hidden: bool = False
    context: int = 0
    mix: int = 1
    name: ClassVar[str] = "incremental"
    requires: ClassVar[frozenset[str]] = frozenset({"causal"})
    ensures: ClassVar[frozenset[str]] = frozenset({"has_step"})

    def run(self, module: Module, context: PassContext) -> Module:
        """Replace `forward` by `step`; PassError names the operation that mixes positions."""
        columns = self.context or int(module.properties.get("context") or size.UNBOUNDED)

        def changed(function: Function) -> Function:
            if function.name != "forward" and not function.name.endswith("_forward"):
                return function
            name = function.name.removesuffix("forward") + "step"
            main = name == "step"
            return _Step(function, self.rows, columns, self.mix if main else 1).build(name, self.hidden and main)

        return module.map(changed)


class _Step:
    """One derivation; `new` maps nodes of the plain graph to nodes of the step."""

    def __init__(self, forward: Function, max_rows: int, context: int, mix: int) -> None:
        self.forward, self.mix = forward, mix
        self.ids = _token_parameter(forward)
        self.batch, self.tokens = self.ids.shape
        self.rows = dim("rows", 1, max_rows)
        self.outputs = dim("outputs", 0, max_rows)
        self.slots = dim("slots", 1)
        rows = Tensor("i32", (self.rows,))
        table = Tensor("i32", (dim("sequences", 1), dim("context", 1, context)))
        self.inputs = {n: ops.param(name=n, type=rows) for n in ("tokens", "positions", "slots", "sequence")}
        self.inputs["table"] = ops.param(name="table", type=table)
        self.inputs["selected"] = ops.param(name="selected", type=Tensor("i32", (self.outputs,)))
        if mix > 1:
            for name, kind in (("tokens", "i32"), ("weights", "f32")):
                self.inputs[name] = ops.param(name=name, type=Tensor(kind, (self.rows, mix)))
        self.caches: list[Node] = []
        self.updated: list[Node] = []
        self.shared: dict[tuple[Node, Node], tuple[Node, Node]] = {}
        self.new: dict[Node, Node] = {}

    def build(self, name: str, hidden: bool) -> Function:
        for node in self.forward.nodes:
            self.new[node] = self.convert(node)
        logits = self.new[self.forward.results[0]]
        if logits.tensor.rank != 3 or logits.shape[:2] != (1, self.rows):
            raise PassError(f"incremental: the first result must be [batch, tokens, vocabulary], it is {logits.type!r}.")
        needed = set(Function("", (), [(str(i), n) for i, n in enumerate(self.updated)]).nodes)
        selected = _Selection(self.rows, self.outputs, self.inputs["selected"], needed).of(logits)
        results = {"logits": ops.reshape(selected, shape=(self.outputs, logits.shape[2]))}
        if hidden:
            value = head_input(selected)
            results["hidden"] = ops.reshape(value, shape=(self.outputs, value.shape[-1]))
        names = [c.attrs["name"] for c in self.caches]
        return Function(name, (*self.inputs.values(), *self.caches), results | dict(zip(names, self.updated, strict=True)))

    def substituted(self, value: Any) -> Any:
        """Sizes of the plain graph in terms of rows: batch = 1, tokens = rows."""
        if isinstance(value, tuple):
            return tuple(self.substituted(v) for v in value)
        if isinstance(value, Size):
            return size.substitute(value, {str(self.batch): 1, str(self.tokens): self.rows})
        return value

    def varies(self, extent: SizeLike) -> bool:
        return bool(size.dims(extent) & (size.dims(self.batch) | size.dims(self.tokens)))

    def convert(self, node: Node) -> Node:
        name = node.op.name
        inputs = [self.new[i] for i in node.inputs]
        if self.mix > 1 and any(self.is_tokens(i) for i in node.inputs) and name != "cast":
            if name == "embedding":
                return self.mixed(inputs[0])
            raise PassError(f"incremental: {name} reads the token ids, so tokens cannot be mixed.")
        if node is self.ids:
            if self.mix > 1:  # read by casts alone, which nothing but embeddings read
                return ops.reshape(ops.slice(self.inputs["tokens"], axis=1, start=0, stop=1), shape=(1, self.rows))
            return ops.cast(ops.reshape(self.inputs["tokens"], shape=(1, self.rows)), dtype=node.dtype)
        if name == "param":
            raise PassError(f"incremental: the model has a second input {node.attrs['name']!r}; only token ids are supported.")
        if name == "iota" and self.varies(node.attrs["size"]):
            if node.attrs["size"] is not self.tokens:
                raise self.mixes(node, f"it counts to {node.attrs['size']}")
            return ops.cast(self.inputs["positions"], dtype=node.dtype)
        if name == "size_value" and self.varies(node.attrs["size"]):
            raise self.mixes(node, f"its value depends on the length ({node.attrs['size']})")
        if name == "attention":
            return self.attention(node, *inputs)
        self.check(node)
        return node.op(*inputs, **{k: self.substituted(v) for k, v in node.attrs.items()})

    def is_tokens(self, value: Node) -> bool:
        """Whether a value is the token ids, whatever their integer type."""
        while value.op.name == "cast":
            value = value.inputs[0]
        return value is self.ids

    def mixed(self, table: Node) -> Node:
        """The weighted sums [1, rows, width] of the embeddings of each row's tokens (Shen et al. 2024, Superposed Decoding)."""
        found = ops.embedding(table, self.inputs["tokens"])
        weights = ops.reshape(self.inputs["weights"], shape=(self.rows, self.mix, 1))
        return ops.reshape(ops.reduce_sum(found * weights, axes=(1,)), shape=(1, self.rows, found.shape[2]))

    def mixes(self, node: Node, why: str) -> PassError:
        where = f" at {node.origin.line}" if node.origin.line else ""
        return PassError(f"incremental: {node.op.name}{where} mixes positions: {why}. Only causal attention may.")

    def check(self, node: Node) -> None:
        """Raise unless the node treats every row alone."""
        attrs = node.attrs
        for i, value in enumerate(node.inputs):
            forbidden: tuple[int, ...] = ()
            rank = value.tensor.rank
            if "axes" in attrs and node.op.name != "transpose":
                forbidden = attrs["axes"]
            elif node.op.name in ("slice", "concat", "softmax", "argmax", "cumsum", "take_along"):
                forbidden = (attrs["axis"],)
            elif node.op.name in ("take", "scatter") and i == 0:
                forbidden = (attrs["axis"],)
            elif node.op.name in ("linear", "rms_norm", "layer_norm", "rope", "quantize"):
                forbidden = (rank - 1,)
            elif node.op.name == "matmul":
                forbidden = (rank - 1,) if i == 0 else (rank - 2,)
            elif node.op.name == "pad":
                forbidden = tuple(a for a in range(rank) if attrs["low"][a] or attrs["high"][a])
            elif node.op.name in ("conv", "fused", "loop", "cond", "cached_attention"):
                forbidden = tuple(range(rank))
            for axis in forbidden:
                if self.varies(value.shape[axis]):
                    raise self.mixes(node, f"it works along an axis of size {value.shape[axis]}")
        if sum(self.varies(s) and bool(size.dims(s) & size.dims(self.tokens)) for s in node.shape) > 1:
            raise self.mixes(node, f"its value {node.type!r} relates tokens to tokens")
        if node.op.name == "reshape":
            before, after = (self.stride(n) for n in (node.inputs[0], node))
            if before != after:
                raise self.mixes(node, "it moves elements between rows")

    def stride(self, node: Node) -> SizeLike | None:
        """Elements from one token to the next, in row-major order; None when the value has no token axis."""
        for axis, extent in enumerate(node.shape):
            if size.dims(extent) & size.dims(self.tokens):
                return size.product(node.shape[axis + 1 :])
        return None

    def attention(self, node: Node, q: Node, k: Node, v: Node, mask: Node | None = None) -> Node:
        attrs = node.attrs
        if mask is not None or not attrs["causal"]:
            problem = "its mask was not understood" if mask is not None else "it is not causal"
            raise self.mixes(node, f"{problem} (`stemma why attention_mask MODEL` shows more)")
        if node.inputs[0].shape[2] is not self.tokens or node.inputs[1].shape[2] is not self.tokens:
            raise self.mixes(node, f"queries {node.inputs[0].type!r} and keys {node.inputs[1].type!r} are not the same tokens")
        if (k, v) not in self.shared:
            self.shared[k, v] = (self.cache("k", k), self.cache("v", v))
        k_cache, v_cache = self.shared[k, v]
        _, heads, _, width = q.shape
        rows = ops.reshape(ops.transpose(q, axes=(0, 2, 1, 3)), shape=(self.rows, heads, width))
        result = ops.cached_attention(
            rows, k_cache, v_cache, self.inputs["table"], self.inputs["sequence"], self.inputs["positions"],
            scale=attrs["scale"], window=attrs["window"], softcap=attrs["softcap"],
        )  # fmt: skip
        return ops.transpose(ops.reshape(result, shape=(1, self.rows, heads, v.shape[3])), axes=(0, 2, 1, 3))

    def cache(self, kind: str, value: Node) -> Node:
        """Write the new rows [1, heads, rows, width] into a cache; the updated cache. It stores what `value` is widened from."""
        _, heads, _, width = value.shape
        name = f"{kind}_cache_{len(self.caches) // 2}"
        wide, stored = _stored(value)
        self.caches.append(ops.param(name=name, type=Tensor(stored, (heads, self.slots, width))))
        rows = ops.reshape(wide, shape=(heads, self.rows, width))
        if stored != rows.dtype:
            rows = (ops.quantize if dtype(stored).kind == "quantized" else ops.cast)(rows, dtype=stored)
        self.updated.append(ops.scatter(self.caches[-1], self.inputs["slots"], rows, axis=CACHE_AXIS))
        return self.updated[-1]


class _Selection:
    """The values of the wanted rows only, computed from as early as nothing else needs all rows."""

    def __init__(self, rows: SizeLike, outputs: SizeLike, selected: Node, needed: set[Node]) -> None:
        self.rows, self.outputs, self.selected, self.needed = rows, outputs, selected, needed
        self.memo: dict[Node, Node] = {}

    def of(self, node: Node) -> Node:
        order = Function("", (), {"value": node}).nodes
        for n in order:
            self.memo[n] = self.one(n)
        return self.memo[node]

    def one(self, node: Node) -> Node:
        axis = next((a for a, s in enumerate(node.shape) if s is self.rows), None)
        if axis is None:
            return node
        rounding = node.op.name in ("quantize", "cast")  # cheaper to redo on fewer rows than to move packed values
        if (node in self.needed and not rounding) or not node.inputs:
            return ops.take(node, self.selected, axis=axis)
        attrs = {k: self.substituted(v) for k, v in node.attrs.items()}
        return node.op(*(self.memo[i] for i in node.inputs), **attrs)

    def substituted(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.substituted(v) for v in value)
        return size.substitute(value, {str(self.rows): self.outputs}) if isinstance(value, Size) else value


def head_input(logits: Node) -> Node:
    """The f32 value that the output head, the last linear before `logits`, is applied to, before any rounding for its product."""
    linears = [n for n in Function("", (), {"logits": logits}).nodes if n.op.name == "linear"]
    if not linears:
        raise PassError("incremental: there is no linear output head, so the model has no hidden state to return.")
    value = linears[-1].inputs[0]
    return value.inputs[0] if value.op.name in ("quantize", "cast") and value.dtype != "f32" else value


def _stored(value: Node) -> tuple[Node, str]:
    """(x, T) when `value` is x rounded to the element type T and widened again, as the pass `cache` writes it; else itself."""
    rounded = value.inputs[0] if value.op.name in ("dequantize", "cast") else value
    kind = dtype(rounded.dtype)
    narrow = kind.kind == "quantized" or (kind.kind == "float" and kind.bits < dtype(value.dtype).bits)
    if narrow and rounded.op.name in ("quantize", "cast") and rounded.inputs[0].type == value.type:
        return rounded.inputs[0], rounded.dtype
    return value, value.dtype


def _token_parameter(forward: Function) -> Node:
    for param in forward.params:
        if dtype(param.dtype).kind == "int" and param.tensor.rank == 2 and all(isinstance(s, Size) for s in param.shape):
            return param
    raise PassError(f"incremental: {forward!r} has no parameter of token ids [batch, tokens] with symbolic sizes.")
