"""Raising of normalisations: chains of arithmetic become `rms_norm` and `layer_norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from stemma.ir import Node, ops
from stemma.passes.pattern import any_of, scalar
from stemma.passes.rewrite import NoMatch, Rule, RulePass, rule

X, X3 = "f32[n, 4]", "f32[n, m, 4]"


def _mean(x: Any, inverse: Any, count: Any, axes: Any) -> Any:
    """The mean along axes, kept as size 1, times 1/n or divided by n."""
    total = ops.reduce_sum(x, axes=axes, keepdims=True)
    return any_of(total * scalar(inverse), total / scalar(count))


def _check_mean(x: Node, inverse: float | None, count: float | None, axes: tuple[int, ...]) -> None:
    last = x.tensor.rank - 1
    width = x.shape[last]
    if axes != (last,) or not isinstance(width, int):
        raise NoMatch(f"the mean is over the axes {axes}, not over the last one")
    if inverse not in (None, 1.0 / width) or count not in (None, width):
        raise NoMatch(f"it is no mean of {width} elements")


@rule(
    lambda x, inverse, count, axes, eps: x * ops.rsqrt(_mean(any_of(x * x, ops.pow(x, 2.0)), inverse, count, axes) + scalar(eps)),
    cases=[{"x": X3, "inverse": 0.25, "count": 4.0, "axes": (2,), "eps": 1e-5}],
)
def rms_norm(x: Node, inverse: float | None, count: float | None, axes: tuple[int, ...], eps: float) -> Node:
    """x * rsqrt(mean(x * x) + eps) -> rms_norm(x, eps=eps)"""
    _check_mean(x, inverse, count, axes)
    return ops.rms_norm(x, eps=eps)


def _is_scale(w: Node, x: Node) -> None:
    if w.shape != x.shape[-1:] or w.dtype != x.dtype:
        raise NoMatch(f"{w!r} is no vector over the last axis of {x!r}")


@rule(lambda x, w, eps: ops.rms_norm(x, eps=eps) * w, cases=[{"x": X, "w": "f32[4]", "eps": 1e-5}])
def rms_norm_weight(x: Node, w: Node, eps: float) -> Node:
    """mul(rms_norm(x), w) -> rms_norm(x, w); w may be an expression such as add(weight, 1) (Gemma)"""
    _is_scale(w, x)
    return ops.rms_norm(x, w, eps=eps)


def _centred(x: Any, inverse: Any, count: Any, axes: Any) -> Any:
    return x - _mean(x, inverse, count, axes)


@rule(
    lambda x, inverse, count, axes, inverse2, count2, eps: (
        _centred(x, inverse, count, axes)
        * ops.rsqrt(
            _mean(_centred(x, inverse, count, axes) * _centred(x, inverse, count, axes), inverse2, count2, axes) + scalar(eps)
        )
    ),
    cases=[{"x": X3, "inverse": 0.25, "count": 4.0, "axes": (2,), "inverse2": 0.25, "count2": 4.0, "eps": 1e-5}],
)
def layer_norm(
    x: Node, inverse: float | None, count: float | None, inverse2: float | None, count2: float | None, axes: tuple[int, ...],
    eps: float,
) -> Node:  # fmt: skip
    """(x - mean(x)) * rsqrt(mean((x - mean(x))**2) + eps) -> layer_norm(x, eps=eps)"""
    _check_mean(x, inverse, count, axes)
    _check_mean(x, inverse2, count2, axes)
    return ops.layer_norm(x, eps=eps)


@rule(lambda x, w, eps: ops.layer_norm(x, eps=eps) * w, cases=[{"x": X, "w": "f32[4]", "eps": 1e-5}])
def layer_norm_weight(x: Node, w: Node, eps: float) -> Node:
    """mul(layer_norm(x), w) -> layer_norm(x, w)"""
    _is_scale(w, x)
    return ops.layer_norm(x, w, eps=eps)


@rule(lambda x, w, b, eps: ops.layer_norm(x, w, eps=eps) + b, cases=[{"x": X, "w": "f32[4]", "b": "f32[4]", "eps": 1e-5}])
def layer_norm_bias(x: Node, w: Node, b: Node, eps: float) -> Node:
    """add(layer_norm(x, w), b) -> layer_norm(x, w, b)"""
    _is_scale(b, x)
    return ops.layer_norm(x, w, b, eps=eps)


@dataclass(frozen=True)
class RaiseNorm(RulePass):
    """Recover rms_norm and layer_norm from arithmetic."""

    name: ClassVar[str] = "raise_norm"
    rules: ClassVar[tuple[Rule, ...]] = (
        layer_norm,
        layer_norm_weight,
        layer_norm_bias,
        rms_norm,
        rms_norm_weight,
    )  # fmt: skip  (layer_norm first: a centred chain is also an rms_norm of what is centred)
