"""Every operation of the IR. `ops.add(a, b)` builds a node; `OPS["add"]` finds one by name."""

from stemma.ir.node import OPS
from stemma.ir.ops.choose import noise, select
from stemma.ir.ops.composite import (
    attention,
    cached_attention,
    gated,
    gelu,
    layer_norm,
    rms_norm,
    rope,
    silu,
    softmax,
)  # fmt: skip
from stemma.ir.ops.constraint import advance, allow, candidates
from stemma.ir.ops.core import cast, cond, constant, fused, get, iota, loop, param, size_value, weight
from stemma.ir.ops.elementwise import (
    abs,
    add,
    ceil,
    cos,
    div,
    eq,
    erf,
    exp,
    floor,
    floordiv,
    ge,
    gt,
    le,
    log,
    logical_and,
    logical_not,
    logical_or,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    ne,
    neg,
    pow,
    reciprocal,
    round,
    rsqrt,
    sigmoid,
    sign,
    sin,
    sqrt,
    sub,
    tanh,
    where,
)  # fmt: skip
from stemma.ir.ops.governor import ask, attend, learn, plan, prune
from stemma.ir.ops.kernel import load, loop_index, reduce_loop, store
from stemma.ir.ops.linear import conv, dequantize, embedding, linear, matmul, quantize
from stemma.ir.ops.neurons import linear_at, linear_from, top_neurons
from stemma.ir.ops.program import (
    array,
    call,
    emit,
    emitted,
    feed,
    finish,
    fork,
    history,
    host,
    is_in,
    length,
    start,
    step,
    step_mixed,
    sync,
    token_counts,
    top_k,
)  # fmt: skip
from stemma.ir.ops.reduce import argmax, cumsum, reduce_max, reduce_min, reduce_sum
from stemma.ir.ops.reflect import best_chain, mix_logits, retract
from stemma.ir.ops.shape import (
    broadcast_to,
    concat,
    pad,
    reshape,
    scatter,
    slice,
    take,
    take_along,
    transpose,
)  # fmt: skip
from stemma.ir.ops.tables import (
    empty_state,
    ngrams_draft,
    ngrams_learn,
    recycling_draft,
    recycling_learn,
    suffix_lookup,
    trie_draft,
    trie_learn,
)
from stemma.ir.ops.tree import (
    expand,
    follow,
    followed_path,
    has_child,
    node_top_k,
    settle,
    tree,
    tree_extend,
    tree_merge,
    tree_nodes,
)
from stemma.ir.ops.verify_draft import select_recursive, select_typical

__all__ = [
    "OPS", "abs", "add", "advance", "allow", "argmax", "array", "ask", "attend", "attention", "best_chain", "broadcast_to",
    "cached_attention", "call", "candidates", "cast", "ceil", "concat", "cond", "constant", "conv", "cos", "cumsum",
    "dequantize", "div", "embedding", "emit", "emitted", "empty_state", "eq", "erf", "exp", "expand", "feed", "finish",
    "floor", "floordiv", "follow", "followed_path", "fork", "fused", "gated", "ge", "gelu", "get", "gt", "has_child",
    "history", "host", "iota", "is_in", "layer_norm", "le", "learn", "length", "linear", "linear_at", "linear_from", "load",
    "log", "logical_and", "logical_not", "logical_or", "loop", "loop_index", "lt", "matmul", "maximum", "minimum",
    "mix_logits", "mod", "mul", "ne", "neg", "ngrams_draft", "ngrams_learn", "node_top_k", "noise", "pad", "param", "plan",
    "pow", "prune", "quantize", "reciprocal", "recycling_draft", "recycling_learn", "reduce_loop", "reduce_max", "reduce_min",
    "reduce_sum", "reshape", "retract", "rms_norm", "rope", "round", "rsqrt", "scatter", "select", "select_recursive",
    "select_typical", "settle", "sigmoid", "sign", "silu", "sin", "size_value", "slice", "softmax", "sqrt", "start", "step",
    "step_mixed", "store", "sub", "suffix_lookup", "sync", "take", "take_along", "tanh", "token_counts", "top_k",
    "top_neurons", "transpose", "tree", "tree_extend", "tree_merge", "tree_nodes", "trie_draft", "trie_learn", "weight",
    "where",
]  # fmt: skip
