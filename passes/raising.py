"""The passes that bring a traced graph to the operations the rest of the compiler works on, in order."""

from __future__ import annotations

from stemma.passes.base import Pass
from stemma.passes.canonicalize import Canonicalize
from stemma.passes.raise_attention import RaiseAttention
from stemma.passes.raise_mlp import RaiseMlp
from stemma.passes.raise_norm import RaiseNorm
from stemma.passes.raise_rope import RaiseRope

RAISING: tuple[Pass, ...] = (
    Canonicalize(),  # one form for everything the patterns below look for
    RaiseNorm(),
    RaiseMlp(),
    RaiseRope(),
    RaiseAttention(),  # explicit chains, grouped heads, then masks
)
