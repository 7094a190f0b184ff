"""Small hand-built programs that tests of passes and code generation share."""

from __future__ import annotations

import numpy as np

from stemma.ir import Array, Function, Module, Node, Tensor, dim, ops

BATCH, TOKENS = dim("batch", 1, 64), dim("tokens", 1, 4096)


def tiny_lm(
    *, layers: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 8, hidden: int = 32, vocab: int = 50, inner: int = 64,
    window: int | None = None, softcap: float | None = None,
) -> tuple[Module, dict[str, Array]]:  # fmt: skip
    """A raised Llama-like model, `forward(input_ids i64[batch, tokens]) -> logits`, with tied embeddings; and its weights."""
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {}

    def weight(name: str, *shape: int) -> Node:
        weights[name] = (rng.standard_normal(shape) * 0.3).astype(np.float32)
        node: Node = ops.weight(name=name, type=Tensor("f32", shape))
        return node

    ids = ops.param(name="input_ids", type=Tensor("i64", (BATCH, TOKENS)))
    embedding = weight("embedding", vocab, hidden)
    h = ops.embedding(embedding, ids)
    positions = ops.cast(ops.reshape(ops.iota(size=TOKENS), shape=(1, 1, TOKENS)), dtype="f32")
    angles = ops.transpose(
        ops.matmul(ops.reshape(weight("frequencies", width // 2), shape=(1, width // 2, 1)), positions), axes=(0, 2, 1)
    )
    angles = ops.concat(angles, angles, axis=2)
    cos, sin = (ops.reshape(f(angles), shape=(1, 1, TOKENS, width)) for f in (ops.cos, ops.sin))

    def split(x: Node, n: int) -> Node:
        node: Node = ops.transpose(ops.reshape(x, shape=(BATCH, TOKENS, n, width)), axes=(0, 2, 1, 3))
        return node

    for i in range(layers):
        x = ops.rms_norm(h, weight(f"{i}.norm", hidden), eps=1e-5)
        q = ops.rope(split(ops.linear(x, weight(f"{i}.q", heads * width, hidden)), heads), cos, sin)
        k = ops.rope(split(ops.linear(x, weight(f"{i}.k", kv_heads * width, hidden)), kv_heads), cos, sin)
        v = split(ops.linear(x, weight(f"{i}.v", kv_heads * width, hidden)), kv_heads)
        a = ops.attention(q, k, v, causal=True, scale=width**-0.5, window=window, softcap=softcap)
        a = ops.reshape(ops.transpose(a, axes=(0, 2, 1, 3)), shape=(BATCH, TOKENS, heads * width))
        h = h + ops.linear(a, weight(f"{i}.o", hidden, heads * width))
        x = ops.rms_norm(h, weight(f"{i}.mlp_norm", hidden), eps=1e-5)
        gate, up = (ops.linear(x, weight(f"{i}.{n}", inner, hidden)) for n in ("gate", "up"))
        h = h + ops.linear(ops.gated(gate, up, activation="silu"), weight(f"{i}.down", hidden, inner))
    logits = ops.linear(ops.rms_norm(h, weight("norm", hidden), eps=1e-5), embedding)
    properties = {"kind": "causal_lm", "context": 4096, "vocab": vocab}
    return Module([Function("forward", [ids], {"logits": logits})], properties), weights
