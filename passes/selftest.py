"""Tests of rules by themselves: a pattern and its replacement are evaluated with the reference interpreter and compared.

Also used by the manager's `verify_each`: inputs made up for a function, and the comparison of results.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stemma.ir import Function, Module, Node, PassError, Tensor, dtype, interpret, ops, size, stamp
from stemma.ir.formats import quantize_array
from stemma.passes.pattern import Choices, choices
from stemma.passes.rewrite import NoMatch, Rule

TOLERANCE = 1e-12  # relative, in float64: identical up to the order of a few additions
SIZES = (1, 2, 3, 5, 7)  # values that symbolic sizes of examples take


def tensor_type(text: str) -> Tensor:
    """`"f32[batch, 2*n, 8]"` as a type; every name in it is a dimension of 1 to 64."""
    found = re.fullmatch(r"\s*(\w+)\[(.*)\]\s*", text)
    if found is None:
        raise PassError(f"{text!r} is not a type such as f32[n, 4].")
    names = {n: size.dim(n, 1, 64) for n in re.findall(r"[A-Za-z_]\w*", found[2])}
    items = [i for i in re.split(r",(?![^(]*\))", found[2]) if i.strip() not in ("", "()")]
    return Tensor(found[1], tuple(size.parse(i.strip(), names) for i in items))


def example(name: str, type: str) -> Node:
    """A parameter for the examples of rules: `example("x", "f32[n, 4]")`."""
    return ops.param(name=name, type=tensor_type(type))


def check_rule(rule: Rule) -> int:
    """Apply `rule` to its examples and compare before with after; returns how many comparisons were made.

    Every alternative of the pattern is built, and every symbolic size takes several values. PassError when a rule has no examples,
    does not match its own example, or changes a value by more than 1e-12 (relative, float64).
    """
    if not rule.cases:
        raise PassError(f"The rule {rule.name!r} has no examples. Give it cases=[...]: types for the variables of its pattern.")
    count = 0
    for case in rule.cases:
        picks = Choices()
        token = choices.set(picks)
        try:
            while True:
                count += _check_case(rule, case)
                if not picks.advance():
                    break
        finally:
            choices.reset(token)
    return count


def _check_case(rule: Rule, case: Mapping[str, Any]) -> int:
    arguments = {n: example(n, v) if isinstance(v, str) and "[" in v else v for n, v in case.items()}
    with stamp(line="example"):
        before = rule.build(**arguments)
    after = _apply_once(rule, before)
    functions = [Function("rule", _parameters(before), {"value": node}) for node in (before, after)]
    count = 0
    for sizes in _assignments(functions[0]):
        inputs, weights = make_inputs(functions[0], sizes), make_weights(Module(functions[:1]))
        results = [interpret(f, inputs, weights, sizes=sizes)["value"] for f in functions]
        error = difference(*results)
        if not error <= TOLERANCE:
            raise PassError(
                f"The rule {rule.name!r} changes the value of its example by {error:.3g} (relative) at the sizes "
                f"{sizes or 'given'}: {before!r} became {after!r}."
            )
        count += 1
    return count


def _apply_once(rule: Rule, before: Node) -> Node:
    function = Function("rule", _parameters(before), {"value": before})
    reason = "the pattern does not match"
    for match in rule.matches(before, function, function.users):
        try:
            return rule.apply(match)
        except NoMatch as rejected:
            reason = str(rejected)
    raise PassError(f"The rule {rule.name!r} does not apply to its own example {before!r}: {reason}.")


def _parameters(node: Node) -> list[Node]:
    return [n for n in Function("", (), {"value": node}).nodes if n.op.name == "param"]


def _assignments(function: Function) -> Iterator[dict[str, int]]:
    names = [d.name for d in function.dims()]
    for i in range(len(SIZES) if names else 1):
        yield {n: SIZES[(i + 2 * k) % len(SIZES)] for k, n in enumerate(names)}


def make_array(name: str, type: Tensor, sizes: Mapping[str, int]) -> Any:
    """Made-up values of a type, the same for the same name: floats near 1 in size, integers 0..3, both truth values."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shape = [size.evaluate(s, sizes) for s in type.shape]
    match dtype(type.dtype).kind:
        case "bool":
            return rng.random(shape) < 0.5
        case "int":
            return rng.integers(0, 4, shape)
        case "quantized":
            return quantize_array(rng.standard_normal(shape).astype(np.float32), type.dtype)
        case _:
            return rng.standard_normal(shape)


def make_inputs(function: Function, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Values for every parameter of a function at the given sizes."""
    return {p.attrs["name"]: make_array(p.attrs["name"], p.tensor, sizes) for p in function.params}


def make_weights(module: Module) -> dict[str, Any]:
    """Values for every weight of a module: those of 16-bit types are representable, integers are 0 or 1."""
    return {name: _weight(name, type) for name, type in module.weights().items()}


def _weight(name: str, type: Tensor) -> Any:
    value, kind = make_array(name, type, {}), dtype(type.dtype)
    if kind.kind == "float" and kind.bits == 16:
        return np.round(value * 16) / 16  # few enough digits for either 16-bit type
    return value % 2 if kind.kind == "int" else value


def difference(before: Any, after: Any) -> float:
    """Largest difference relative to the largest magnitude; equal infinities and NaN count as equal, others as infinite."""
    a, b = (np.asarray(v.dequantize() if hasattr(v, "dequantize") else v) for v in (before, after))
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind in "bi" or not a.size:
        return 0.0 if np.array_equal(a, b) else float("inf")
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(a - b))
    if not np.isfinite(error).all():
        return float("inf")
    finite = np.abs(a[np.isfinite(a)])
    return float(error.max() / max(float(finite.max(initial=0.0)), 1e-30))


def largest_difference(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> tuple[str, float]:
    """The first result that differs most, and by how much."""
    errors = [(n, difference(before[n], after[n])) for n in names]
    return max(errors, key=lambda item: item[1])


__all__ = ["check_rule", "difference", "example", "largest_difference", "make_array", "make_inputs", "make_weights", "tensor_type"]
