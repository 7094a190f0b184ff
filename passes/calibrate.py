"""Calibration: a model's `forward` on sample text, node by node, stopping at every linear to let a pass choose its weight.

The walk evaluates in float32 by the operations' own definitions. Linears that read one input are visited together, before they are
evaluated, and what the visitor chooses is what the rest of the walk computes with: later layers see the quantized earlier ones,
as in GPTQ (arXiv 2210.17323). Only values that are still needed are kept, and weights are read by blocks of rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stemma.ir import (
    Array,
    Context,
    Format,
    Function,
    Module,
    Node,
    PassError,
    Quantized,
    Rows,
    Tensor,
    WeightStore,
    constant_nodes,
    dtype,
    ops,
    print_module,
    topological,
)
from stemma.ir.rows import LazyRows
from stemma.passes.base import Label, Pass, PassContext
from stemma.passes.workspace import StoredQuantized, Workspace, digest, identity

CHUNK_TOKENS = 2048  # documents of one length are evaluated together up to this many tokens
LEAST_TOKENS = 128  # below this, second moments of inputs are noise
WEIGHT_OPERAND = {"linear": 1, "embedding": 0}  # where operations read a weight by rows
ROW_ELEMENTS = 1 << 22  # elements of a weight that a pass works on at a time, 16 MiB in float32


@dataclass(frozen=True)
class Site:
    """Linears with constant weights that read the same input.

    weights: each once, as nodes of the graph, in the order of their first linear. inputs: the input's values on all documents,
    [tokens, K] float32 each. nodes: the linears.
    """

    weights: tuple[Node, ...]
    nodes: tuple[Node, ...]
    inputs: Sequence[NDArray[np.float32]]

    @property
    def columns(self) -> int:
        return int(self.inputs[0].shape[1])


Visitor = Callable[[Site], Mapping[Node, Node]]


def constant_linears(function: Function) -> list[Node]:
    """The linears whose weights are constants, in order."""
    constant = constant_nodes(function)
    return [n for n in function.nodes if n.op.name == "linear" and n.inputs[1] in constant]


def linear_sites(function: Function, weights: Collection[Node] | None = None) -> list[tuple[Node, tuple[Node, ...]]]:
    """Every value that linears with these weights read, and those linears, in order. Default: all constant float weights."""
    found: dict[Node, list[Node]] = {}
    for node in constant_linears(function):
        if is_float(node.inputs[1]) if weights is None else node.inputs[1] in weights:
            found.setdefault(node.inputs[0], []).append(node)
    return [(x, tuple(nodes)) for x, nodes in found.items()]


def is_float(weight: Node) -> bool:
    return dtype(weight.dtype).kind == "float"


def walk(
    function: Function, documents: Sequence[Array], store: WeightStore, visit: Visitor, *,
    replaced: Mapping[Node, Node] | None = None, weights: Collection[Node] | None = None,
) -> list[Array]:  # fmt: skip
    """Evaluate `function(ids [batch, tokens])` on documents of token ids, and return its first result of each chunk of documents.

    visit: is given every site once, and returns constants to use instead of weights in the rest of the walk; `replaced` has those
    that are known from the start. A weight that was replaced once is not visited again. weights: those to visit; when all have
    been, the walk ends and returns nothing. Default: all float ones, to the end.
    """
    (ids,) = function.params
    batches = list(_batches(documents))
    contexts = [Context(store, np.float32) for _ in batches]
    known = {d.name for d in function.dims()}
    for context, batch in zip(contexts, batches, strict=True):
        context.sizes = {str(d): n for d, n in zip(ids.shape, batch.shape, strict=True) if str(d) in known}
    constant, waiting = constant_nodes(function), set(weights or ())
    chosen: dict[Node, Node] = dict(replaced or {})
    shared: dict[Node, Any] = dict(contexts[0].lazy_rows(function))
    values: list[dict[Node, Any]] = [{ids: b.astype(c.numpy(ids.dtype))} for b, c in zip(batches, contexts, strict=True)]
    sites = dict(linear_sites(function, weights))
    remaining = {node: len(users) for node, users in function.users().items()}
    for result in function.results:
        remaining[result] += 1

    def operands(user: Node, own: Mapping[Node, Any]) -> list[Any]:
        found = [own[i] if i in own else shared[i] for i in user.inputs]
        place = WEIGHT_OPERAND.get(user.op.name)
        if place is not None and user.inputs[place] in chosen:
            found[place] = LazyRows(chosen[user.inputs[place]], store)
        return found

    for node in topological(function.results, (*function.params, *shared)):
        if node in constant:
            shared[node] = node.op.evaluate(contexts[0], *operands(node, {}), **node.attrs)
        else:
            if node.op.name == "linear" and node.inputs[0] in sites:
                nodes = sites.pop(node.inputs[0])
                new = tuple(dict.fromkeys(n.inputs[1] for n in nodes if n.inputs[1] not in chosen))
                if new:
                    chosen.update(visit(Site(new, nodes, [_flat(v[node.inputs[0]]) for v in values])))
                waiting.difference_update(new)
                if weights is not None and not waiting:
                    return []
            for own, context in zip(values, contexts, strict=True):
                own[node] = node.op.evaluate(context, *operands(node, own), **node.attrs)
        for i in dict.fromkeys(node.inputs):
            remaining[i] -= 1
            if not remaining[i]:
                shared.pop(i, None)
                for own in values:
                    own.pop(i, None)
    return [own[function.results[0]] for own in values]


def _flat(value: Any) -> NDArray[np.float32]:
    wide = value.dequantize() if isinstance(value, Quantized) else value
    return np.asarray(wide.reshape(-1, wide.shape[-1]), np.float32)


def _batches(documents: Sequence[Array]) -> Iterator[Array]:
    """Documents of one length, stacked up to CHUNK_TOKENS tokens."""
    for length in dict.fromkeys(map(len, documents)):
        same = [d for d in documents if len(d) == length]
        step = max(1, CHUNK_TOKENS // length)
        for start in range(0, len(same), step):
            yield np.stack(same[start : start + step])


@dataclass(frozen=True)
class Calibrated(Pass):
    """Base of passes that look at what a model computes on the calibration text.

    A weight that several linears read is chosen once and stays shared; one that an embedding reads as well, or alone, is rounded
    to nearest and stays tied, or is left alone with `embeddings=False`. Results are kept in the context's workspace, so an
    interrupted compile goes on after the last finished linear and gives the same bytes.
    """

    label: ClassVar[Label] = "lossy"
    embeddings: bool = True

    @abstractmethod
    def target(self, weight: Node) -> Format:
        """The new format of a weight; PassError when an option is out of range."""

    def tied(self, forward: Function, weights: Iterable[Node]) -> dict[Node, Node]:
        """Weights that embeddings read, and what takes their place: themselves, or themselves rounded to nearest.

        PassError when a row of those or of `weights` does not fit its format.
        """
        embedded = embedded_weights(forward)
        tied = {w for w in embedded if self.embeddings and is_float(w)}
        for node in (*tied, *weights):
            if reason := self.target(node).refusal(columns_of(node)):
                raise PassError(f"{self.name}: {label(node)} does not fit. {reason} Choose another format or group.")
        return {w: rounded(w, self.target(w).name) if w in tied else w for w in embedded}

    def workspace(self, module: Module, context: PassContext) -> Workspace:
        """Where results are kept; it is this calibration's own, by a hash of all that determines them."""
        source = identity(context.source) if context.source is not None else ""
        key = digest(self.name, sorted(self.options().items()), print_module(module), source, *context.calibration)
        return Workspace(context.workspace if context.source is not None else None, key)

    def check(self, forward: Function, context: PassContext) -> None:
        """PassError when there is nothing, or too little, to calibrate on."""
        tokens = sum(map(len, context.calibration))
        if len(forward.params) != 1 or dtype(forward.params[0].dtype).kind != "int":
            raise PassError(f"{self.name} calibrates on text, and this model reads something else. Use quantize instead.")
        if tokens < LEAST_TOKENS:
            raise PassError(
                f"{self.name} was given {tokens} tokens of text to calibrate on and needs {LEAST_TOKENS} at least. Give a longer "
                "--calibration text, or more --calibration-tokens."
            )
        widest = max(columns_of(n.inputs[1]) for n in constant_linears(forward))
        if tokens < widest:
            context.notes.append(
                f"{self.name}: {tokens} tokens of calibration text are fewer than the {widest} inputs of the widest linear; "
                "more tokens give better weights."
            )


@dataclass(frozen=True)
class CalibratedWeights(Calibrated):
    """Base of passes that store new codes for every weight of linears, one after the other."""

    @abstractmethod
    def choose(self, site: Site, take: Callable[[Node], Rows]) -> Iterator[tuple[Node, Quantized]]:
        """The new values of `site.weights`, one after the other. take: rows of a weight."""

    def takes(self, weight: Node) -> bool:
        """Whether a constant weight is one that this pass chooses: a float one, which no earlier pass has quantized."""
        return is_float(weight)

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with new weights; PassError when there is too little text, or a weight's rows do not fit the format."""
        self.validate()
        forward = module["forward"]
        embedded = set(embedded_weights(forward))
        read = dict.fromkeys(n.inputs[1] for n in constant_linears(forward))
        left = [w for w in read if w not in embedded and self.takes(w)]
        replaced = self.tied(forward, left)
        if left:
            self.check(forward, context)
            replaced |= self._calibrated(module, context, left, replaced)
        else:
            context.notes.append(f"{self.name} found no weights of linears to choose: an earlier pass has quantized them all.")
        changed = {w: new for w, new in replaced.items() if new is not w}
        return module.map(lambda f: replace_weights(f, changed)) if changed else module

    def _calibrated(
        self, module: Module, context: PassContext, left: Sequence[Node], replaced: Mapping[Node, Node]
    ) -> dict[Node, Node]:
        """Every weight of `left` with the constant that takes its place."""
        workspace = self.workspace(module, context)
        made: dict[Node, Node] = {}
        for weight in left:
            rows, columns = rows_of(weight), columns_of(weight)
            parts = self.target(weight).parts(columns).items()
            if workspace.has(label(weight), {p: (np.dtype(t), (rows, *extent)) for p, (t, extent) in parts}):
                made[weight] = self._add(context.weights, workspace, weight)
        # Compensation takes K^2 for each of N rows; making and factoring H as long as K / 7 more rows (2048 x 8192, 8192 x 2048).
        costs = {w: columns_of(w) ** 2 * (rows_of(w) + columns_of(w) / 7) for w in left if w not in made}
        total, done = sum(costs.values()), 0.0
        if made and costs:
            context.notes.append(f"{self.name}: went on after {len(made)} of {len(left)} weights of an interrupted calibration.")

        def visit(site: Site) -> dict[Node, Node]:
            nonlocal done
            new = [w for w in site.weights if w not in made]
            if new:
                missing = Site(tuple(new), site.nodes, site.inputs)
                for weight, value in self.choose(missing, lambda node: Rows(unrounded(node), context.weights)):
                    workspace.save(label(weight), value.parts)
                    made[weight] = self._add(context.weights, workspace, weight)
                    done += costs[weight]
                    context.report(f"calibrating ({self.name})", round(1000 * done / total), 1000)
            return {w: made[w] for w in site.weights}

        if costs:
            context.report(f"calibrating ({self.name})", 0, 1000)
            walk(module["forward"], context.calibration, context.weights, visit, replaced={**replaced, **made}, weights=[*costs])
        return made

    def _add(self, store: WeightStore, workspace: Workspace, weight: Node) -> Node:
        name, target = f"{label(weight)}:{self.name}", self.target(weight)
        type = Tensor(target.name, (rows_of(weight), columns_of(weight)))
        stored = StoredQuantized(workspace, label(weight), target.name, list(target.parts(columns_of(weight))))
        if name not in store:
            store.add(name, type, lambda: stored[0 : stored.shape[0]], lambda: stored)
        node: Node = ops.weight(name=name, type=type)
        return node


def rows_of(weight: Node) -> int:
    return int(str(weight.shape[0]))


def columns_of(weight: Node) -> int:
    return int(str(weight.shape[1]))


def embedded_weights(function: Function) -> list[Node]:
    """Constant weights that embeddings read, whatever else reads them."""
    constant = constant_nodes(function)
    return list(dict.fromkeys(n.inputs[0] for n in function.nodes if n.op.name == "embedding" and n.inputs[0] in constant))


def rounded(weight: Node, name: str) -> Node:
    """A float weight rounded to nearest, as an expression."""
    node: Node = ops.quantize(weight if weight.dtype == "f32" else ops.cast(weight, dtype="f32"), dtype=name)
    return node


def unrounded(weight: Node) -> Node:
    """The float expression that a weight is, or that it rounds to nearest."""
    return weight.inputs[0] if weight.op.name == "quantize" else weight


def replace_weights(function: Function, replaced: Mapping[Node, Node]) -> Function:
    """The function in which linears and embeddings read other weights."""

    def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
        index = WEIGHT_OPERAND.get(node.op.name)
        if index is None or node.inputs[index] not in replaced:
            return node.rebuild(*inputs)
        return node.rebuild(*inputs[:index], replaced[node.inputs[index]], *inputs[index + 1 :])

    return function.rewrite(replace)


def float_rows(rows: Rows, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a weight in float32, a copy."""
    return np.array(rows.block(rows.root, start, stop), np.float32)


def row_blocks(rows: int, columns: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of ROW_ELEMENTS elements at most, each a multiple of rows but the last."""
    step = max(multiple, ROW_ELEMENTS // columns // multiple * multiple)
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def label(weight: Node) -> str:
    """A name for a constant: that of the stored weight it is made of, or a hash of its text."""
    if weight.op.name == "weight":
        return str(weight.attrs["name"])
    function = Function("weight", (), {"value": weight})
    names = sorted(n.attrs["name"] for n in function.nodes if n.op.name == "weight")
    return f"{names[0] if names else 'constant'}:{digest(print_module(Module([function])))[:12]}"
