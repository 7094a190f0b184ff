"""A pass of your own made of rules: pattern and replacement are two functions in the IR's own operations.

stemma compile CHECKPOINT -o fast.stemma --pass examples/passes/fast_gelu.py:FastGelu
stemma why examples/passes/fast_gelu.py:FastGelu CHECKPOINT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Node, ops
from stemma.passes import Label, Rule, RulePass, rule


@rule(lambda x, kind: ops.gelu(x, approximate=kind), cases=[{"x": "f32[n, 4]", "kind": "sigmoid"}])
def sigmoid_gelu(x: Node) -> Node:
    """gelu(x) -> x * sigmoid(1.702 * x): one exponential instead of erf or tanh"""
    return x * ops.sigmoid(x * 1.702)


@dataclass(frozen=True)
class FastGelu(RulePass):
    """Replace gelu by its sigmoid approximation."""

    name: ClassVar[str] = "fast_gelu"
    label: ClassVar[Label] = "lossy"
    rules: ClassVar[tuple[Rule, ...]] = (sigmoid_gelu,)
