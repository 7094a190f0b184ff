"""Which nodes are constant expressions (over weights and constants only), for rules that look at one node at a time."""

from __future__ import annotations

import weakref

from stemma.ir import Function, Node, tensors_of

_KNOWN: weakref.WeakKeyDictionary[Node, bool] = weakref.WeakKeyDictionary()  # nodes are immutable: never stale


def is_constant(node: Node) -> bool:
    """Whether a node depends on no parameter and on no size, and has a fixed shape."""
    if node not in _KNOWN:
        for n in Function("", (), {"value": node}).nodes:
            if n not in _KNOWN:
                leaf = n.op.name in ("param", "size_value", "iota") or n.op.level == "program"
                fixed = all(isinstance(s, int) for t in tensors_of(n.type) for s in t.shape)
                _KNOWN[n] = not leaf and fixed and all(_KNOWN[i] for i in n.inputs)
    return _KNOWN[node]
