"""Rules around matrix products with weights: one form (`linear`), weights in the element type they are stored in."""

from __future__ import annotations

from stemma.ir import Node, SizeLike, ops
from stemma.passes.constants import is_constant
from stemma.passes.pattern import Match, optional
from stemma.passes.rewrite import NoMatch, rule
from stemma.passes.selftest import example, tensor_type

NARROW = ("bf16", "f16")


def weight(name: str, type: str) -> Node:
    """A weight for the examples of rules: `weight("w", "bf16[3, 4]")`."""
    return ops.weight(name=name, type=tensor_type(type))


W, BIAS, NARROW_W = weight("w", "f32[3, 4]"), weight("b", "f32[3]"), weight("n", "bf16[3, 4]")
CODES = weight("q", "int4_g32[3, 32]")


def _weight_is_constant(match: Match) -> str | None:
    return None if is_constant(match["w"]) else "the right operand is computed from inputs"


@rule(lambda x, w: ops.matmul(x, w), check=_weight_is_constant, cases=[{"x": "f32[n, 3]", "w": W}])
def matmul_with_weight(x: Node, w: Node) -> Node:
    """matmul(x, w) -> linear(x, transpose(w)), when w is a constant matrix"""
    if w.tensor.rank != 2 or x.dtype != "f32":
        raise NoMatch("the weight is no matrix, or the product is not f32")
    return ops.linear(x, ops.transpose(w, axes=(1, 0)))


@rule(lambda x, w, b: ops.linear(x, w) + b, cases=[{"x": "f32[n, 4]", "w": W, "b": BIAS}])
def linear_bias(x: Node, w: Node, b: Node) -> Node:
    """add(linear(x, w), b) -> linear(x, w, b), when b is a constant vector"""
    if b.shape != w.shape[:1] or not is_constant(b):
        raise NoMatch("what is added is no constant vector of the outputs")
    return ops.linear(x, w, b)


@rule(
    lambda x, w, b: ops.linear(x, ops.cast(w, dtype="f32"), optional(b)),
    cases=[{"x": "f32[n, 4]", "w": NARROW_W, "b": b} for b in (None, BIAS)],
)
def narrow_linear(x: Node, w: Node, b: Node | None) -> Node:
    """linear(x, cast(w, f32), b) -> linear(x, w, b): linear widens its weight while reading it"""
    if w.dtype not in NARROW:
        raise NoMatch(f"the cast from {w.dtype} to f32 is no widening")
    return ops.linear(x, w, b)


@rule(
    lambda x, w, b: ops.linear(x, ops.dequantize(w), optional(b)),
    check=_weight_is_constant,
    cases=[{"x": "f32[n, 32]", "w": CODES, "b": b} for b in (None, BIAS)],
)
def quantized_linear(x: Node, w: Node, b: Node | None) -> Node:
    """linear(x, dequantize(w), b) -> linear(x, w, b): linear dequantizes its weight while reading it"""
    return ops.linear(x, w, b)


PATCHES = weight("p", "f32[5, 3, 2, 2]")


def _square_patches(match: Match) -> str | None:
    kernel = match["w"].shape[2:]
    if not is_constant(match["w"]):
        return "the kernel is computed from inputs"
    if match["stride"] != kernel or any(match["padding"]) or any(d != 1 for d in match["dilation"]):
        return "the patches overlap or are padded"
    extents = match["x"].shape[2:]
    if len(kernel) != 2 or any(not isinstance(e, int) or e % k for e, k in zip(extents, kernel, strict=True)):
        return "the image is not cut evenly into patches"
    return None


@rule(
    lambda x, w, b, stride, padding, dilation: ops.conv(
        x, w, optional(b), stride=stride, padding=padding, dilation=dilation, groups=1
    ),
    check=_square_patches,
    cases=[
        {"x": "f32[n, 3, 4, 6]", "w": PATCHES, "b": b, "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
        for b in (None, weight("b5", "f32[5]"))
    ],
)
def patch_embedding(x: Node, w: Node, b: Node | None, stride: tuple[int, int]) -> Node:
    """conv(x, w, stride=kernel) -> transpose(linear(patches of x, flat w)): the first layer of vision transformers"""
    batch, channels, height, width = x.shape
    tall, wide = stride
    rows, columns, outputs = height // tall, width // wide, w.shape[0]
    patches = ops.transpose(ops.reshape(x, shape=(batch, channels, rows, tall, columns, wide)), axes=(0, 2, 4, 1, 3, 5))
    size = channels * tall * wide
    flat = ops.linear(ops.reshape(patches, shape=(batch, rows, columns, size)), ops.reshape(w, shape=(outputs, size)), b)
    return ops.transpose(flat, axes=(0, 3, 1, 2))


@rule(lambda w, ids: ops.embedding(ops.cast(w, dtype="f32"), ids), cases=[{"w": weight("n", "bf16[5, 4]"), "ids": "i64[n]"}])
def narrow_embedding(w: Node, ids: Node) -> Node:
    """embedding(cast(w, f32), ids) -> embedding(w, ids)"""
    if w.dtype not in NARROW:
        raise NoMatch(f"the cast from {w.dtype} to f32 is no widening")
    return ops.embedding(w, ids)


@rule(
    lambda w, ids: ops.embedding(ops.dequantize(w), ids), check=_weight_is_constant,
    cases=[{"w": weight("q", "int4_g32[5, 32]"), "ids": "i64[n]"}],
)  # fmt: skip
def quantized_embedding(w: Node, ids: Node) -> Node:
    """embedding(dequantize(w), ids) -> embedding(w, ids)"""
    return ops.embedding(w, ids)


@rule(
    lambda x, w, b, s: ops.linear(ops.reshape(x, shape=s), w, optional(b)),
    cases=[{"x": "f32[n, m, 4]", "w": W, "b": b, "s": (example("x", "f32[n * m]").shape[0], 4)} for b in (None, BIAS)],
)
def reshaped_linear(x: Node, w: Node, b: Node | None, s: tuple[SizeLike, ...]) -> Node:
    """linear(reshape(x, [.., K]), w, b) -> reshape(linear(x, w, b)), when the reshape keeps the last axis"""
    if x.tensor.rank == 0 or x.shape[-1] != s[-1]:
        raise NoMatch("the reshape changes the last axis")
    return ops.reshape(ops.linear(x, w, b), shape=(*s[:-1], w.shape[0]))


_WIDE = ops.cast(NARROW_W, dtype="f32")


@rule(
    lambda x: x, roots=("transpose", "reshape", "slice", "concat"),
    cases=[{"x": ops.transpose(_WIDE, axes=(1, 0))}, {"x": ops.reshape(_WIDE, shape=(12,))},
           {"x": ops.slice(_WIDE, axis=0, start=1, stop=3)}, {"x": ops.concat(_WIDE, _WIDE, axis=0)}],
)  # fmt: skip
def cast_outward(x: Node) -> Node:
    """transpose(cast(w)) -> cast(transpose(w)); likewise reshape, slice and concat of constants"""
    inner = [i.inputs[0] for i in x.inputs if i.op.name == "cast" and is_constant(i)]
    if len(inner) != len(x.inputs) or any(i.dtype != inner[0].dtype for i in inner):
        raise NoMatch("the operands are not all casts of constants of one element type")
    return ops.cast(x.op(*inner, **x.attrs), dtype=x.dtype)


WEIGHTS = (
    matmul_with_weight, linear_bias, narrow_linear, quantized_linear, patch_embedding, narrow_embedding, quantized_embedding,
    reshaped_linear, cast_outward,
)  # fmt: skip
