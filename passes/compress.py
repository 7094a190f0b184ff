"""A format for every layer, chosen by what it costs: size, speed or divergence is given, the other is minimised.

Every unit (weights that must share a format: linears of one input, a tied embedding) is stored in every candidate format by
itself, and the divergence of the model's next-token distribution from the unchanged one is measured. Divergences of units are taken
to add up; on the lower convex hull of each unit's (bytes, divergence) the steps that save most bytes for their divergence come
first (the classic greedy for the multiple-choice knapsack: Sinha and Zoltners 1979).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stemma.ir import (
    Array,
    Context,
    Function,
    Module,
    Node,
    PassError,
    Tensor,
    TypeMismatch,
    constant_nodes,
    dtype,
    format_of,
    ops,
    size,
    walk,
)
from stemma.passes.base import Label, Pass, PassContext
from stemma.passes.measure import check_logits, divergence, log_softmax

_BUDGET = re.compile(r"(?:(kl)=)?(\d+(?:\.\d*)?(?:e[+-]?\d+)?)(bits|MB|tok/s|)$")


@dataclass(frozen=True)
class Unit:
    """Weights that share a format. elements: of all of them. read: the share of its bytes that a decoded token reads."""

    weights: tuple[Node, ...]
    elements: int
    read: bool

    @property
    def name(self) -> str:
        """The first weight's name, and how many more there are."""
        names = [n.attrs["name"] for w in self.weights for n in walk(Function("", (), {"w": w})) if n.op.name == "weight"]
        return (names[0] if names else "a constant") + (f" +{len(names) - 1}" if len(names) > 1 else "")


@dataclass(frozen=True)
class Option:
    """A unit in a format ("" as it is): bytes, and the divergence in nats per token that it alone causes."""

    format: str
    bytes: int
    divergence: float


@dataclass(frozen=True)
class Compress(Pass):
    """Choose a format for every layer under a budget, from measured sensitivities; the choice is shown and kept in the artifact.

    budget: "4.5bits" (mean, scales included), "300MB" of weights, "50tok/s" (of decoding that reads all weights at `bandwidth`
    GB/s), or "kl=0.02" (nats per token on the calibration text, measured on the result). formats: candidates, joined with "+"; a
    layer may also stay as it is. tokens: how many calibration tokens sensitivities are measured on.
    """

    budget: str = "4.5bits"
    formats: str = "int8+int4_g64+int3_g64+int2_g64"
    tokens: int = 128
    bandwidth: float = 30.0
    name: ClassVar[str] = "compress"
    label: ClassVar[Label] = "lossy"

    def validate(self) -> None:
        self._budget()
        for name in self.formats.split("+"):
            try:
                format_of(name)
            except TypeMismatch as error:
                raise PassError(f"compress: formats={self.formats} has {name!r}, which is not available. {error}") from None
        if self.tokens < 2 or not 0 < self.bandwidth < np.inf:
            raise PassError(
                f"compress: tokens={self.tokens} and bandwidth={self.bandwidth} are not available; use two tokens at least, and a "
                "bandwidth of more than 0 GB/s."
            )

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with the chosen formats; PassError for a budget that cannot be read or met, or without calibration text."""
        self.validate()
        function = module["forward"]
        kind, amount = self._budget()
        units = list(find_units(function))
        if not units:
            raise PassError(
                "compress: the model has no float weights of linears or embeddings left. Run it before other quantizations."
            )
        trial = _Trial(function, context, self.tokens)
        options = [self._options(unit, trial) for unit in units]
        steps = greedy([o[0] for o in options], options)
        total = sum(u.elements for u in units)
        if kind == "kl":
            chosen = self._within(amount, units, steps, trial)
        else:
            limit = {"bits": amount * total / 8, "MB": amount * 1e6, "tok/s": self.bandwidth * 1e9 / max(amount, 1e-9)}[kind]
            chosen = self._below(limit, kind == "tok/s", units, steps)
        for unit, option in zip(units, chosen, strict=True):
            context.choices.append(
                {
                    "weights": unit.name, "format": option.format or unit.weights[0].dtype, "bytes": option.bytes,
                    "bits per weight": round(8 * option.bytes / unit.elements, 3), "KL by itself": round(option.divergence, 6),
                }
            )  # fmt: skip
        return module.replace(stored(function, {u: o.format for u, o in zip(units, chosen, strict=True)}))

    def _budget(self) -> tuple[str, float]:
        found = _BUDGET.match(self.budget)
        if not found or bool(found[1]) == bool(found[3]):
            raise PassError(f"compress: the budget {self.budget!r} is none of 4.5bits, 300MB, 50tok/s, kl=0.02.")
        return found[1] or found[3], float(found[2])

    def _options(self, unit: Unit, trial: _Trial) -> list[Option]:
        """The unit as it is, then in every candidate format that fits its rows."""
        found = [Option("", stored_bytes(unit, ""), 0.0)]
        for name in self.formats.split("+"):
            if not any(format_of(name).refusal(int(w.shape[1])) for w in unit.weights):  # type: ignore[arg-type]
                cost = trial.divergence({unit: name})
                if cost < np.inf:
                    found.append(Option(name, stored_bytes(unit, name), cost))
        return found

    def _below(self, limit: float, read_only: bool, units: Sequence[Unit], steps: Sequence[Sequence[Option]]) -> Sequence[Option]:
        """The first state of the greedy whose bytes fit."""

        def total(state: Sequence[Option]) -> int:
            return sum(o.bytes for o, u in zip(state, units, strict=True) if u.read or not read_only)

        for state in steps:
            if total(state) <= limit:
                return state
        raise PassError(
            f"compress: the budget {self.budget} allows {limit / 1e6:.3g} MB, but the smallest choice among {self.formats} has "
            f"{min(total(s) for s in steps) / 1e6:.3g} MB. Give a larger budget, or smaller formats."
        )

    def _within(self, limit: float, units: Sequence[Unit], steps: Sequence[Sequence[Option]], trial: _Trial) -> Sequence[Option]:
        """The smallest state of the greedy whose measured divergence stays below the limit, by bisection."""
        low, high = 0, len(steps) - 1  # the state `low` is within the limit
        while low < high:
            middle = (low + high + 1) // 2
            found = trial.divergence({u: o.format for u, o in zip(units, steps[middle], strict=True)})
            low, high = (middle, high) if found <= limit else (low, middle - 1)
        return steps[low]


def find_units(function: Function) -> Iterator[Unit]:
    """The float weights [N, K] of linears and embeddings, in groups that must share a format, in the order of their use."""
    constant = constant_nodes(function)
    groups: dict[Node, set[Node]] = {}  # weight -> the group it is in
    by_input: dict[Node, set[Node]] = {}
    read: set[Node] = set()
    for node in function.nodes:
        at = {"linear": 1, "embedding": 0}.get(node.op.name)
        if at is None or node.inputs[at] not in constant or dtype(node.inputs[at].dtype).kind != "float":
            continue
        weight = node.inputs[at]
        group = groups.setdefault(weight, {weight})
        if at == 1:
            read.add(weight)
            shared = by_input.setdefault(node.inputs[0], group)
            if shared is not group:
                shared |= group
                for member in group:
                    groups[member] = shared
    done: set[int] = set()
    for group in groups.values():
        if id(group) not in done:
            done.add(id(group))
            weights = tuple(w for w in groups if w in group)
            yield Unit(weights, sum(int(w.tensor.elements) for w in weights), any(w in read for w in weights))  # type: ignore[arg-type, misc]


def stored_bytes(unit: Unit, format: str) -> int:
    """Bytes of a unit in a format, scales included; "": as it is."""
    return sum(size.evaluate(Tensor(format or w.dtype, w.shape).bytes, {}) for w in unit.weights)


def stored(function: Function, formats: Mapping[Unit, str]) -> Function:
    """The function with the weights of units in these formats ("": as they are)."""
    chosen = {w: name for unit, name in formats.items() for w in unit.weights if name}

    def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
        at = {"linear": 1, "embedding": 0}.get(node.op.name)
        if at is None or node.inputs[at] not in chosen:
            return node.rebuild(*inputs)
        weight = inputs[at]
        wide = weight if weight.dtype == "f32" else ops.cast(weight, dtype="f32")
        return node.rebuild(*inputs[:at], ops.quantize(wide, dtype=chosen[node.inputs[at]]), *inputs[at + 1 :])

    return function.rewrite(replace)


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of (bytes, divergence), the largest first; the first one given is kept."""
    kept = [options[0]]
    for option in sorted(options[1:], key=lambda o: (-o.bytes, o.divergence)):
        if option.bytes >= kept[-1].bytes:
            continue
        while len(kept) > 1 and slope(kept[-2], kept[-1]) >= slope(kept[-2], option):
            kept.pop()
        kept.append(option)
    return kept


def slope(a: Option, b: Option) -> float:
    """Divergence for a byte that is saved."""
    return (b.divergence - a.divergence) / (a.bytes - b.bytes)


def greedy(start: Sequence[Option], options: Sequence[Sequence[Option]]) -> list[tuple[Option, ...]]:
    """States from `start` on, each with one unit stored in fewer bytes than before: cheapest steps first."""
    hulls = [hull(o) for o in options]
    moves = [(slope(a, b), i, b) for i, h in enumerate(hulls) for a, b in zip(h, h[1:], strict=False)]
    state, states = list(start), [tuple(start)]
    for _, unit, option in sorted(moves, key=lambda m: (m[0], m[1], -m[2].bytes)):
        state[unit] = option
        states.append(tuple(state))
    return states


class _Trial:
    """Divergences of changed models from the unchanged one, on the first calibration tokens.

    Nodes are interned: what a change does not reach is the same node, and its value is known.
    """

    def __init__(self, function: Function, context: PassContext, tokens: int) -> None:
        documents, left = [], tokens
        for document in context.calibration:
            documents.append(np.asarray(document)[:left])
            left -= len(documents[-1])
            if left <= 0:
                break
        if not documents or sum(map(len, documents)) < 2:
            raise PassError(
                "compress: at least two tokens of calibration text are needed to measure sensitivities. Give --calibration FILE."
            )
        self.function = function
        self.runs: list[tuple[Context, dict[Node, Any], Array]] = []
        for length in {len(d): None for d in documents}:
            inputs = [np.stack([d for d in documents if len(d) == length])]
            run = Context.of(function, inputs, context.weights)
            values = dict(zip(function.params, inputs, strict=True))
            logits = run.extend(function, values)[0]
            check_logits([logits])
            self.runs.append((run, values, log_softmax(logits)))

    def divergence(self, formats: Mapping[Unit, str]) -> float:
        """Mean KL divergence in nats per token with units in these formats; infinite when logits are no numbers."""
        changed = stored(self.function, formats)
        found: list[Array] = []
        for run, values, reference in self.runs:
            logits = run.extend(changed, dict(values))[0]
            found.append(divergence(reference, log_softmax(logits)).reshape(-1))
        mean = float(np.mean(np.concatenate(found)))
        return max(0.0, mean) if np.isfinite(mean) else np.inf
