"""AWQ (Lin et al., arXiv 2306.00978): inputs of a linear that are large get larger weights, so that rounding costs them less.

linear(norm(h, g), w)             ->  linear(norm(h, g / s), w * s)
linear(gated(a, linear(h, u)), w) ->  linear(gated(a, linear(h, u / s)), w * s)      rows of u

s = mean|x|^a for each input, with the a of 0, 1/20, ... 19/20 whose rounded weights change the outputs least on calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stemma.ir import Array, Format, Function, Module, Node, PassError, Rows, Tensor, TypeMismatch, constant_nodes, format_of, ops
from stemma.passes.base import PassContext
from stemma.passes.calibrate import (
    WEIGHT_OPERAND,
    Calibrated,
    Site,
    columns_of,
    embedded_weights,
    float_rows,
    label,
    linear_sites,
    row_blocks,
    rows_of,
    walk,
)
from stemma.passes.hessian import mean_squares

STEPS = 20
TOKENS = 512  # on which output errors are compared
LEAST = 1e-3  # of the largest mean input: what is hardly there is not scaled to nothing


@dataclass(frozen=True)
class Awq(Calibrated):
    """Scale inputs of linears by what they carry, then round weights to nearest (AWQ). What is scaled is undone by what makes them.

    format: any quantized element type. round: false scales only, for a pass such as gptq to follow with the same format. Inputs
    that neither a norm nor a gated product makes stay as they are.
    """

    format: str = "int4_g64"
    round: bool = True
    name: ClassVar[str] = "awq"

    def validate(self) -> None:
        try:
            format_of(self.format)
        except TypeMismatch as error:
            raise PassError(f"awq: format={self.format!r} is not available. {error}") from None

    def target(self, weight: Node) -> Format:
        return format_of(self.format)

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with scaled weights and what makes their inputs; PassError when there is too little text."""
        self.validate()
        forward = module["forward"]
        embedded = set(embedded_weights(forward))
        sites = linear_sites(forward)
        left = [w for w in dict.fromkeys(n.inputs[1] for _, nodes in sites for n in nodes) if w not in embedded]
        tied = self.tied(forward, left)
        if not self.round:
            tied = {w: w for w in tied}
        if not left:
            return _rewritten(module, {}, {}, self.format, tied)
        self.check(forward, context)
        makers = {x: maker for x, nodes in sites if (maker := _maker(forward, x, nodes, embedded)) is not None}
        scales = self._scales(module, context, left, tied, makers)
        rest = sum(x not in makers and any(n.inputs[1] not in embedded for n in nodes) for x, nodes in sites)
        if rest:
            context.notes.append(
                f"awq: {rest} of {len(sites)} inputs of linears are made by neither a norm nor a gated product and were not scaled."
            )
        return _rewritten(module, scales, makers, self.format if self.round else "", tied)

    def _scales(
        self, module: Module, context: PassContext, left: Sequence[Node], tied: Mapping[Node, Node], makers: Mapping[Node, Node]
    ) -> dict[Node, Node]:
        """For inputs of linears, the constant by which their weights are multiplied."""
        workspace, store, scales = self.workspace(module, context), context.weights, dict[Node, Node]()
        forward, stage, done = module["forward"], f"calibrating ({self.name})", 0

        def visit(site: Site) -> dict[Node, Node]:
            nonlocal done
            x, name = site.nodes[0].inputs[0], f"{label(site.weights[0])}:{self.name}"
            if x in makers:
                if not workspace.has(name, {"scales": (np.dtype(np.float32), (site.columns,))}):
                    weights = {w: Rows(w, store) for w in site.weights}
                    workspace.save(name, {"scales": best_scales(weights, site.inputs, self.target(site.weights[0]))})
                values = np.array(workspace.part(name, "scales"))
                if name not in store:
                    store.add(name, Tensor("f32", values.shape), partial(np.asarray, values))
                scales[x] = ops.weight(name=name, type=Tensor("f32", values.shape))
            done += len(site.weights)
            context.report(stage, done, len(left))
            if not self.round:
                return {w: w for w in site.weights}
            return {w: _effective(w, scales.get(x), self.format) for w in site.weights}

        context.report(stage, 0, len(left))
        walk(forward, context.calibration, store, visit, replaced=tied, weights=left)
        return scales


def best_scales(weights: Mapping[Node, Rows], inputs: Sequence[Array], target: Format) -> NDArray[np.float32]:
    """The scales [K] of mean|x|^a whose rounded weights change the outputs least, all weights taken together; float32."""
    mean_squares(inputs)  # says when inputs are not finite
    tokens = sum(map(len, inputs))
    mean = np.sum([np.abs(x).sum(axis=0, dtype=np.float64) for x in inputs], axis=0) / tokens
    mean = np.maximum(mean, LEAST * mean.max())
    step = -(-tokens // TOKENS)
    sample = np.concatenate([x[::step] for x in inputs])
    tried: list[NDArray[np.float32]] = []
    for a in range(STEPS):
        scale = mean ** (a / STEPS) if mean.any() else np.ones_like(mean)
        tried.append((scale / np.sqrt(scale.max() * scale.min())).astype(np.float32))
    errors = np.zeros(STEPS)
    for weight, rows in weights.items():
        for start, stop in row_blocks(rows_of(weight), columns_of(weight), getattr(target, "rows_together", 1)):
            values = float_rows(rows, start, stop)
            for i, scale in enumerate(tried):
                change = target.quantize(values * scale).dequantize() / scale - values
                errors[i] += float(np.square(sample @ change.T).sum(dtype=np.float64))
    return tried[int(np.argmin(errors))]


def _maker(function: Function, x: Node, nodes: Sequence[Node], embedded: set[Node]) -> Node | None:
    """What makes an input of linears, when it can divide it by constants: a norm, or the linear whose rows a gated product takes.

    Nothing but these linears may read the input, nor anything else their weights.
    """
    users = function.users()
    weights = {n.inputs[1] for n in nodes}
    alone = all(u in nodes and u.inputs[1] is not x for u in users[x]) and x not in function.results
    if not alone or weights & embedded or any(u not in nodes for w in weights for u in users[w]):
        return None
    if x.op.name in ("rms_norm", "layer_norm"):
        return x if len(x.inputs) > 1 and all(i in constant_nodes(function) for i in x.inputs[1:]) else None
    if x.op.name == "gated":
        up = x.inputs[1]
        own = up.op.name == "linear" and users[up] == [x] and up not in function.results
        if own and up.inputs[1] in constant_nodes(function) and up.inputs[1] not in embedded and users[up.inputs[1]] == [up]:
            return up
    return None


def _wide(weight: Node) -> Node:
    return weight if weight.dtype == "f32" else ops.cast(weight, dtype="f32")


def _effective(weight: Node, scale: Node | None, name: str) -> Node:
    """What a scaled and rounded weight does to inputs that are not divided."""
    if scale is None:
        return ops.quantize(_wide(weight), dtype=name)
    return ops.dequantize(ops.quantize(_wide(weight) * scale, dtype=name)) / scale


def _rewritten(
    module: Module, scales: Mapping[Node, Node], makers: Mapping[Node, Node], name: str, tied: Mapping[Node, Node]
) -> Module:
    """The module with its linears' weights scaled and rounded (when `name` is a format), and the makers of inputs divided."""
    divided = {makers[x]: scale for x, scale in scales.items()}
    known = {n for _, nodes in linear_sites(module["forward"]) for n in nodes}

    def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
        place = WEIGHT_OPERAND.get(node.op.name)
        if place is not None and node.inputs[place] in tied:
            return node.rebuild(*inputs[:place], tied[node.inputs[place]], *inputs[place + 1 :])
        by = divided.get(node)
        if node.op.name in ("rms_norm", "layer_norm") and by is not None:
            return node.rebuild(inputs[0], *(i / by for i in inputs[1:]))
        if node not in known:
            return node.rebuild(*inputs)
        weight, scale, rest = inputs[1], scales.get(node.inputs[0]), inputs[2:]
        if scale is not None:
            weight = _wide(weight) * scale
        if by is not None:
            weight = _wide(weight) / ops.reshape(by, shape=(rows_of(weight), 1))
            rest = tuple(i / by for i in rest)
        return node.rebuild(inputs[0], ops.quantize(_wide(weight), dtype=name) if name else weight, *rest)

    return module.replace(module["forward"].rewrite(replace))
