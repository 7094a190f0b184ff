"""Raising of activations and gated MLPs: chains of arithmetic become `silu`, `gelu` and `gated`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from stemma.ir import Node, ops
from stemma.passes.pattern import any_of, scalar
from stemma.passes.rewrite import NoMatch, Rule, RulePass, rule

X = {"x": "f32[n, 4]"}
ROOT_2_OVER_PI, ROOT_HALF = math.sqrt(2 / math.pi), math.sqrt(0.5)


@rule(lambda x: any_of(x * ops.sigmoid(x), x / (ops.exp(-x) + 1.0)), cases=[X])
def silu(x: Node) -> Node:
    """x * sigmoid(x), x / (1 + exp(-x)) -> silu(x)"""
    return ops.silu(x)


@rule(lambda x: x * ops.sigmoid(x * 1.702), cases=[X])
def quick_gelu(x: Node) -> Node:
    """x * sigmoid(1.702 * x) -> gelu(x, approximate="sigmoid")"""
    return ops.gelu(x, approximate="sigmoid")


def _half_of(x: Any, factor: Any) -> Any:
    """0.5 * x * factor, however it is associated."""
    return any_of((x * 0.5) * factor, x * (factor * 0.5), (x * factor) * 0.5)


def _close(actual: float | None, expected: float) -> bool:
    """Whether a number written in a model is `expected` up to the last digits of a float64."""
    return actual is None or math.isclose(actual, expected, rel_tol=1e-14)


@rule(
    lambda x, c, d: _half_of(x, ops.erf(any_of(x * scalar(c), x / scalar(d))) + 1.0),
    cases=[X | {"c": ROOT_HALF, "d": math.sqrt(2)}],
)
def gelu_erf(x: Node, c: float | None, d: float | None) -> Node:
    """x * 0.5 * (1 + erf(x * sqrt(1/2))) -> gelu(x)"""
    if not (_close(c, ROOT_HALF) and _close(d, math.sqrt(2))):
        raise NoMatch("the argument of erf is not x / sqrt(2)")
    return ops.gelu(x)


def _cube(x: Any) -> Any:
    return any_of((x * x) * x, ops.pow(x, 3.0))


@rule(
    lambda x, c, k: _half_of(
        x, ops.tanh(any_of((x + _cube(x) * scalar(k)) * scalar(c), (x * scalar(c)) * ((x * x) * scalar(k) + 1.0))) + 1.0
    ),
    cases=[X | {"c": ROOT_2_OVER_PI, "k": 0.044715}],
)
def gelu_tanh(x: Node, c: float, k: float) -> Node:
    """x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x**3))) -> gelu(x, approximate="tanh") (gelu_new of GPT-2)"""
    if not (_close(c, ROOT_2_OVER_PI) and _close(k, 0.044715)):
        raise NoMatch(f"the constants {c} and {k} are not sqrt(2/pi) = {ROOT_2_OVER_PI} and 0.044715")
    return ops.gelu(x, approximate="tanh")


def _same_type(gate: Node, up: Node) -> None:
    if gate.type != up.type:
        raise NoMatch(f"the gate {gate!r} and the other factor {up!r} have different types")


PAIR = {"gate": "f32[n, 4]", "up": "f32[n, 4]"}


@rule(lambda gate, up: ops.silu(gate) * up, cases=[PAIR])
def gated_silu(gate: Node, up: Node) -> Node:
    """mul(silu(gate), up) -> gated(gate, up, activation="silu")"""
    _same_type(gate, up)
    return ops.gated(gate, up, activation="silu")


@rule(
    lambda gate, up, kind: ops.gelu(gate, approximate=kind) * up,
    cases=[PAIR | {"kind": kind} for kind in ("none", "tanh")],
)
def gated_gelu(gate: Node, up: Node, kind: str) -> Node:
    """mul(gelu(gate), up) -> gated(gate, up, activation="gelu" or "gelu_tanh")"""
    _same_type(gate, up)
    if kind == "sigmoid":
        raise NoMatch("there is no gated form of the sigmoid approximation")
    return ops.gated(gate, up, activation="gelu_tanh" if kind == "tanh" else "gelu")


@dataclass(frozen=True)
class RaiseMlp(RulePass):
    """Recover silu, gelu and gated MLPs from arithmetic."""

    name: ClassVar[str] = "raise_mlp"
    rules: ClassVar[tuple[Rule, ...]] = (silu, quick_gelu, gelu_erf, gelu_tanh, gated_silu, gated_gelu)
