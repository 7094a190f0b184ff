"""Canonicalization: one form for equal expressions, so that later rules have one thing to look for.

Common subexpressions and dead code need no pass: nodes are interned, and a function is what its results depend on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.passes.rewrite import Rule, RulePass
from stemma.passes.simplify_arithmetic import ARITHMETIC
from stemma.passes.simplify_views import VIEWS
from stemma.passes.simplify_weights import WEIGHTS


@dataclass(frozen=True)
class Canonicalize(RulePass):
    """Simplify arithmetic and views, fold scalar constants, bring matrix products with weights into the form of linear."""

    name: ClassVar[str] = "canonicalize"
    rules: ClassVar[tuple[Rule, ...]] = ARITHMETIC + VIEWS + WEIGHTS
