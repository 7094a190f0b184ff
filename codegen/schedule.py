"""From a legalized function to a list of launches over buffers: storage, order, and where barriers are needed.

A value lives in a buffer: an argument of the call (input, state or result), a packed weight, or a temporary of the arena. Views
that move no bytes share the buffer of their input. A launch that updates in place makes a new version of its buffer; readers of the
old version come first, or get a copy when that is impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from stemma.backends.base import Argument, Claim, Kernel, Refusal
from stemma.codegen import lower
from stemma.codegen.generate import Generated
from stemma.codegen.legalize import Offers, is_alias, is_launch, kernel_body
from stemma.codegen.plan import Lifetime, Plan, plan
from stemma.ir import CompileError, Cost, Function, Node, SizeLike, Tensor, constant_nodes, size, tensors_of

ROWS = "rows"


@dataclass(eq=False)
class Buffer:
    """Memory of one value. `index`: position among the call's buffers, or of the weight in the packed table."""

    kind: Literal["argument", "weight", "arena"]
    name: str
    tensor: Tensor
    bytes: SizeLike
    index: int = -1


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight of the artifact: a constant expression in a layout, for the launches that read it."""

    node: Node
    layout: str
    bytes: int
    buffer: Buffer


@dataclass(eq=False)
class Launch:
    """One kernel call. `arguments` pairs each Argument with the buffer it stands for, when it stands for one."""

    kernel: Kernel | lower.Kernel | None  # None: a copy of the bytes of one buffer
    op: str
    what: str
    line: str
    by: str
    cost: Cost
    arguments: list[tuple[Argument, Buffer | None]] = field(default_factory=list)
    reads: list[Version] = field(default_factory=list)
    writes: list[Version] = field(default_factory=list)
    scratch: list[Buffer] = field(default_factory=list)
    inplace: Node | None = None
    source: str = ""  # text of a generated kernel
    stage: int = 0


@dataclass(eq=False)
class Version:
    """The contents of a buffer between two writes."""

    buffer: Buffer
    writer: Launch | None = None
    readers: list[Launch] = field(default_factory=list)
    follows: Version | None = None


@dataclass(frozen=True)
class Schedule:
    """A function ready to be emitted: launches in order with their stages, arguments of the call, arena plan, dims."""

    function: Function
    arguments: tuple[Buffer, ...]
    states: tuple[str, ...]
    launches: tuple[Launch, ...]
    plan: Plan
    dims: tuple[size.Dim, ...]


class Weights:
    """The table of packed weights of a module, shared by its functions: each constant expression once per layout."""

    def __init__(self, offers: Offers) -> None:
        self._offers = offers
        self._found: dict[tuple[Node, str], Packed] = {}

    def buffer(self, node: Node, layout: str) -> Buffer:
        """The buffer of a constant expression in a layout."""
        key = (node, layout)
        if key not in self._found:
            count = self._offers.backend.layout_bytes(layout, node.tensor)
            name = node.attrs["name"] if node.op.name == "weight" else f"constant_{len(self._found)}"
            buffer = Buffer("weight", name, node.tensor, count, len(self._found))
            self._found[key] = Packed(node, layout, count, buffer)
        return self._found[key].buffer

    @property
    def table(self) -> tuple[Packed, ...]:
        """All packed weights, in the order of first use."""
        return tuple(self._found.values())


def schedule(function: Function, offers: Offers, weights: Weights) -> Schedule:
    """Launches, order, stages and memory of one legalized function."""
    refused: set[Node] = set()
    while True:
        builder = _Builder(function, offers, weights, refused)
        launches = builder.build()
        ordered, stuck = _order(launches)
        if not stuck:
            break
        culprits = {launch.inplace for launch in stuck if launch.inplace is not None}
        if not culprits:
            raise CompileError(f"The launches of {function.name!r} depend on each other in a cycle.")
        refused |= culprits  # copied before the update, so that old readers may come later
    _stages(ordered)
    placed = plan(_lifetimes(ordered))
    return Schedule(
        function, tuple(builder.arguments), tuple(builder.states), tuple(ordered), placed, tuple(function.dims())
    )  # fmt: skip


def state_names(function: Function) -> list[str]:
    """Parameters that have a result of the same name: updated in place, one buffer of the call for both."""
    return [p.attrs["name"] for p in function.params if p.attrs["name"] in function.result_names]


class _Builder:
    """Builds the launches of one function. `refused` holds nodes that must not update in place."""

    def __init__(self, function: Function, offers: Offers, weights: Weights, refused: set[Node]) -> None:
        self.function, self.offers, self.weights, self.refused = function, offers, weights, refused
        self.constant = constant_nodes(function)
        self.states = state_names(function)
        self.arguments: list[Buffer] = []
        self.launches: list[Launch] = []
        self.values: dict[tuple[Node, int], Version] = {}
        self.temporaries = 0
        self.wanted: dict[tuple[Node, int], Buffer] = {}  # produced values whose buffer is an argument of the call
        self.chain: set[Node] = set()  # launches that may overwrite a state

    def build(self) -> list[Launch]:
        self._arguments()
        for node in self.function.nodes:
            if node.op.name != "param" and is_launch(node, self.constant):
                self._launch(node)
        self._results()
        return self.launches

    def root(self, node: Node) -> tuple[Node, int]:
        """The node and result number whose buffer holds the value of `node`, through views and `get`."""
        index = 0
        while node not in self.constant and (node.op.name == "get" or is_alias(node)):
            if node.op.name == "get":
                index = node.attrs["index"]
            node = node.inputs[0]
        return node, index

    def _arguments(self) -> None:
        params = {p.attrs["name"]: p for p in self.function.params}
        plain = [n for n in params if n not in self.states]
        results = [n for n in self.function.result_names if n not in self.states]
        for name in (*plain, *self.states):
            buffer = self._argument(name, params[name].tensor)
            self.values[params[name], 0] = Version(buffer)
        named = dict(zip(self.function.result_names, self.function.results, strict=True))
        for name in results:
            buffer = self._argument(name, named[name].tensor)
            root = self.root(named[name])
            if root not in self.wanted and root[0].op.name != "param" and root[0] not in self.constant:
                self.wanted[root] = buffer
        for name in self.states:
            self._state_chain(params[name], named[name])

    def _argument(self, name: str, tensor: Tensor) -> Buffer:
        buffer = Buffer("argument", name, tensor, tensor.bytes, len(self.arguments))
        self.arguments.append(buffer)
        return buffer

    def _state_chain(self, param: Node, result: Node) -> None:
        """Remember the updates between a state and its new value, when all of them can be done in place."""
        chain: list[Node] = []
        node, index = self.root(result)
        while node is not param:
            offer = self._offer(node)
            pairs = dict(offer.inplace)
            if index not in pairs or node in self.refused:
                return
            chain.append(node)
            node, index = self.root(kernel_body(node)[1][pairs[index]])
        self.chain.update(chain)

    def _offer(self, node: Node) -> Claim | Generated:
        if node.op.name == "param" or node in self.constant or not is_launch(node, self.constant):
            return Claim(Kernel("", ""), ())
        offer = self.offers.find(node, self.constant)
        if isinstance(offer, Refusal):
            raise CompileError(f"{node!r} has no kernel: {offer.reason}. The function was not legalized.")
        return offer

    def _launch(self, node: Node) -> None:
        offer = self._offer(node)
        body, inputs = kernel_body(node)
        if isinstance(offer, Generated):
            self._generated(node, offer, body, inputs)
            return
        launch = self._new(node, offer.kernel, body, offer.what, bool(offer.inplace))
        outputs = [self._output(node, i, t, offer, launch, inputs) for i, t in enumerate(_types(node))]
        for argument in offer.arguments:
            launch.arguments.append((argument, self._buffer(argument, offer, inputs, outputs, launch)))
        self._finish(launch, {(node, i): version for i, version in enumerate(outputs)})

    def _new(self, node: Node, kernel: Kernel | lower.Kernel, body: Function, what: str, inplace: bool) -> Launch:
        return Launch(
            kernel, _title(body), what, node.origin.line, node.origin.by, _cost(body), inplace=node if inplace else None
        )  # fmt: skip

    def _finish(self, launch: Launch, written: dict[tuple[Node, int], Version]) -> None:
        for version in written.values():
            version.writer = launch
            launch.writes.append(version)
        self.values.update(written)
        self.launches.append(launch)

    def _output(self, node: Node, i: int, tensor: Tensor, offer: Claim, launch: Launch, inputs: Sequence[Node]) -> Version:
        pairs = dict(offer.inplace)
        if i in pairs:
            return self._overwrite(node, i, inputs[pairs[i]], launch)
        if (node, i) in self.wanted and i not in offer.output_bytes:
            return Version(self.wanted[node, i])
        return Version(self._temporary(tensor, offer.output_bytes.get(i, tensor.bytes)))

    def _generated(self, node: Node, offer: Generated, body: Function, inputs: Sequence[Node]) -> None:
        """One launch per kernel; a kernel's inputs are inputs of the body or what earlier kernels of the body wrote."""
        outer = {p.attrs["name"]: inputs[i] for i, p in enumerate(body.params)}
        numbers = {name: i for i, name in enumerate(body.result_names)}
        types = _types(node)
        local: dict[str, Version] = {}
        for kernel, text in zip(offer.kernels, offer.sources, strict=True):
            launch = self._new(node, kernel, body, offer.what, bool(kernel.alias))
            if all(name in kernel.temporaries for name in kernel.outputs):
                launch.cost = Cost(0, sum((t.bytes for t in kernel.temporaries.values()), start=0))
            launch.source = text
            where: dict[str, Buffer] = {}
            written: dict[str, Version] = {}
            for name in kernel.outputs:
                if name in kernel.alias:
                    target = kernel.alias[name]
                    made = self._overwrite(node, numbers.get(name, 0), outer.get(target) or local[target], launch)
                    where[target] = made.buffer
                elif name in local:  # a second kernel goes on with what the first has written
                    made = Version(local[name].buffer, follows=local[name])
                elif name in kernel.temporaries:
                    made = Version(self._temporary(kernel.temporaries[name], kernel.temporaries[name].bytes))
                elif (node, numbers[name]) in self.wanted:
                    made = Version(self.wanted[node, numbers[name]])
                else:
                    made = Version(self._temporary(types[numbers[name]], types[numbers[name]].bytes))
                where[name] = made.buffer
                written[name] = made
            for name in kernel.inputs:
                if name not in where:
                    where[name] = self._read(outer.get(name) or local[name], launch).buffer
            updated = kernel.alias.values()
            launch.arguments = [
                (Argument("output" if name in updated else "input", i), where[name]) for i, name in enumerate(kernel.inputs)
            ]
            fresh = [name for name in kernel.outputs if name not in kernel.alias]
            launch.arguments += [(Argument("output", i), where[name]) for i, name in enumerate(fresh)]
            local |= written
            for version in written.values():
                version.writer = launch
                launch.writes.append(version)
            self.launches.append(launch)
        for name, i in numbers.items():
            self.values[node, i] = local[name]

    def _overwrite(self, node: Node, index: int, source: Node | Version, launch: Launch) -> Version:
        """The next version of the source's buffer; of a copy, when others still need the old contents or may not lose them."""
        old = self._read(source, launch)
        free = old.buffer.kind == "arena" or (node in self.chain and old.buffer.name in self.states)
        if not free or node in self.refused or any(v.follows is old for v in self.values.values()):
            if old in launch.reads:
                launch.reads.remove(old)
                old.readers.remove(launch)
            target = self.wanted.get((node, index)) or self._temporary(old.buffer.tensor, old.buffer.bytes)
            old = self._copy(old, target)
            launch.reads.append(old)
            old.readers.append(launch)
        return Version(old.buffer, follows=old)

    def _copy(self, source: Version, target: Buffer, follows: Version | None = None) -> Version:
        count = source.buffer.bytes
        launch = Launch(None, "copy", source.buffer.name, "", "schedule", Cost(0, count * 2))
        launch.reads.append(source)
        source.readers.append(launch)
        made = Version(target, launch, follows=follows)
        launch.writes.append(made)
        launch.arguments = [(Argument("output", 0), target), (Argument("input", 0), source.buffer), (Argument("size", count), None)]
        self.launches.append(launch)
        return made

    def _temporary(self, tensor: Tensor, count: SizeLike) -> Buffer:
        self.temporaries += 1
        return Buffer("arena", f"t{self.temporaries - 1}", tensor, count)

    def _read(self, node: Node | Version, launch: Launch, layout: str = ROWS) -> Version:
        if isinstance(node, Node) and node in self.constant:
            return Version(self.weights.buffer(node, layout))
        version = self.values[self.root(node)] if isinstance(node, Node) else node
        if version not in launch.reads:
            launch.reads.append(version)
            version.readers.append(launch)
        return version

    def _buffer(
        self, argument: Argument, offer: Claim, inputs: Sequence[Node], outputs: Sequence[Version], launch: Launch
    ) -> Buffer | None:
        if argument.kind == "output":
            made: Version = outputs[argument.value]
            return made.buffer
        if argument.kind == "input":
            if argument.value in {b for _, b in offer.inplace}:
                return next(outputs[a].buffer for a, b in offer.inplace if b == argument.value)
            return self._read(inputs[argument.value], launch, offer.layouts.get(argument.value, ROWS)).buffer
        if argument.kind == "scratch":
            buffer = self._temporary(Tensor("f32", (size.floordiv(argument.value, 4),)), argument.value)
            launch.scratch.append(buffer)
            return buffer
        return None

    def _results(self) -> None:
        """Copies for results whose value was not computed in the result's own buffer."""
        by_name = {a.name: a for a in self.arguments}
        for name, node in zip(self.function.result_names, self.function.results, strict=True):
            target = by_name[name]
            if node in self.constant:
                self._copy(Version(self.weights.buffer(node, ROWS)), target)
                continue
            value = self.values[self.root(node)]
            if value.buffer is target:
                continue
            param = next((p for p in self.function.params if p.attrs["name"] == name), None)
            self._copy(value, target, follows=None if param is None else self.values[param, 0])


def _types(node: Node) -> tuple[Tensor, ...]:
    return tensors_of(node.type)


def _title(body: Function) -> str:
    names = [n.op.name for n in body.nodes if "leaf" not in n.op.tags and "view" not in n.op.tags]
    return " ".join(names) or body.nodes[-1].op.name


def _cost(body: Function) -> Cost:
    """FLOPs of all operations; bytes of inputs and results, of tables, picked rows and updated caches only what is touched."""
    flops: SizeLike = 0
    total: SizeLike = 0
    for node in body.nodes:
        if "leaf" not in node.op.tags:
            flops = flops + node.op.cost(node).flops
    touched: dict[Node, SizeLike] = {}
    for node in body.nodes:
        if node.op.name == "scatter":
            touched[node.inputs[0]] = 0
            touched[node] = node.inputs[2].tensor.bytes
        elif node.op.name in ("embedding", "take"):
            table = node.inputs[0]
            touched[table] = Tensor(table.dtype, node.shape).bytes
        elif node.op.name in ("linear_at", "linear_from"):
            weight, at = node.inputs[1:]
            touched[weight] = Tensor(weight.dtype, (size.minimum(at.tensor.elements, weight.shape[0]), weight.shape[1])).bytes
        elif node.op.name == "cached_attention":
            q, k, v, pages = node.inputs[:4]
            for cache in (k, v):
                touched[cache] = Tensor(cache.dtype, (cache.shape[0], pages.tensor.elements, cache.shape[2])).bytes
    for node in (*body.params, *body.results):
        total = total + touched.get(node, node.tensor.bytes)
    return Cost(flops, total)


def _edges(launches: Sequence[Launch]) -> dict[Launch, set[Launch]]:
    """For each launch, those that must be complete before it starts."""
    before: dict[Launch, set[Launch]] = {launch: set() for launch in launches}
    for launch in launches:
        for version in launch.reads:
            if version.writer is not None:
                before[launch].add(version.writer)
        for version in launch.writes:
            old = version.follows
            if old is not None:
                before[launch].update(old.readers)
                before[launch].update([old.writer] if old.writer else [])
        before[launch].discard(launch)
    return before


def _order(launches: Sequence[Launch]) -> tuple[list[Launch], list[Launch]]:
    """A stable order that respects all dependencies; and the launches that no order satisfies."""
    before = _edges(launches)
    done: set[Launch] = set()
    order: list[Launch] = []
    waiting = list(launches)
    while waiting:
        ready = next((x for x in waiting if before[x] <= done), None)
        if ready is None:
            return order, waiting
        waiting.remove(ready)
        done.add(ready)
        order.append(ready)
    return order, []


def _stages(order: Sequence[Launch]) -> None:
    """Number the stages: a launch opens a new one exactly when it depends on a launch of the current one."""
    before = _edges(order)
    stage = 0
    for launch in order:
        if any(x.stage == stage for x in before[launch]):
            stage += 1
        launch.stage = stage


def _lifetimes(order: Sequence[Launch]) -> list[Lifetime]:
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for launch in order:
        for buffer in (*(v.buffer for v in (*launch.reads, *launch.writes)), *launch.scratch):
            if buffer.kind == "arena":
                first[buffer] = min(first.get(buffer, launch.stage), launch.stage)
                last[buffer] = max(last.get(buffer, launch.stage), launch.stage)
    return [Lifetime(b.name, b.bytes, first[b], last[b]) for b in first]


__all__ = ["Buffer", "Launch", "Packed", "Schedule", "Version", "Weights", "schedule", "state_names"]
