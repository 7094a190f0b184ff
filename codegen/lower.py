"""Lowering: a tensor-level function becomes kernels, loops over scalars that load, compute and store.

Each result is computed per element: views compose into index maps, elementwise chains into one expression, reductions into inner
loops. A loop over an axis that was joined or padded is cut where the parts meet, so that every part is a plain loop. A value that
would be computed again and again (a reduction, or a transcendental function, inside a loop that it does not depend on) gets a
kernel and a temporary buffer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stemma.codegen.elements import RULES, cast, rule_of
from stemma.codegen.index import Index, Indices
from stemma.ir import CompileError, Function, Node, Size, SizeLike, Tensor, dtype, ops, size, stamp

REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "argmax", "cumsum", "matmul", "linear", "conv"})
TRANSCENDENTAL = frozenset({"exp", "log", "sin", "cos", "tanh", "erf", "sigmoid", "pow"})
MAX_SITES = {True: 1, False: 2}  # times a reduction / a transcendental may be computed before it is stored
MAX_PIECES = 16  # parts of one result; further joins are resolved by comparing indices


@dataclass(frozen=True)
class Kernel:
    """One generated kernel.

    function: kernel-level; its parameters are the buffers: `inputs` in order, then the `outputs` that are not in `alias`.
    alias: output -> input that is updated in place and is that output. dims: sizes the kernel is given, by name, in order.
    temporaries: the outputs that are no result of the lowered body, with their types. Kernels of one body run in order.
    """

    name: str
    function: Function
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: tuple[str, ...]
    temporaries: Mapping[str, Tensor] = field(default_factory=dict)
    alias: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Reduction:
    """A reduction being built: the one around it, its loops, and its scalar once known."""

    around: _Reduction | None
    loops: list[Node]
    node: Node | None = None


class _Store(Exception):
    """Lowering starts again with this node stored in memory."""

    def __init__(self, node: Node) -> None:
        self.node = node


class _Cut(Exception):
    """A result is lowered again with the range of one of its loops cut in two."""

    def __init__(self, loop: Node, at: SizeLike) -> None:
        self.loop, self.at = loop, at


def lower(body: Function, name: str) -> tuple[Kernel, ...]:
    """The kernels that compute the results of `body` from its parameters, to be run in order.

    Raises CompileError naming the operation when one has no scalar form (regions, values of quantized types).
    """
    results = _expand(body)
    for node in Function("", body.params, results).nodes:
        if node.op.name not in ("param", "scatter") and rule_of(node) is None:
            line = f" (from {node.origin.line})" if node.origin.line else ""
            raise CompileError(f"No kernel can be generated for {node.op.name} of type {node.type!r}{line} in {name}.")
    stored: list[Node] = []
    while True:
        try:
            return tuple(_Lowering(body, name, results, stored).kernels())
        except _Store as request:
            if request.node in stored:
                raise CompileError(f"{name}: storing {request.node!r} does not make it cheaper. This is a bug.") from None
            stored.append(request.node)


def _expand(body: Function) -> list[tuple[str, Node]]:
    """The results over primitives: composites decomposed, fused regions inlined."""
    new: dict[Node, Node | tuple[Node, ...]] = {}

    def expand(nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node in new:
                continue
            if node.op.name == "get":
                values = new[node.inputs[0]]
                new[node] = values[node.attrs["index"]] if isinstance(values, tuple) else values
                continue
            inputs = [n for i in node.inputs if isinstance(n := new[i], Node)]
            if node.op.name == "fused":
                values = tuple(expanded(v) for v in node.attrs["body"].inline(*inputs))
                new[node] = values if len(values) > 1 else values[0]
            elif node.op.decompose is None or node.op.name in RULES:
                new[node] = node.rebuild(*inputs)
            else:
                with stamp(line=node.origin.line, by=node.origin.by):
                    new[node] = expanded(node.op.decompose(*inputs, **node.attrs))

    def expanded(node: Node) -> Node:
        expand(Function("", (), {"": node}).nodes)
        value = new[node]
        assert isinstance(value, Node)
        return value

    return [(n, expanded(r)) for n, r in zip(body.result_names, body.results, strict=True)]


class _Lowering:
    """One attempt, with the nodes in `stored` kept in buffers. Implements `elements.Builder`."""

    def __init__(self, body: Function, name: str, results: list[tuple[str, Node]], stored: list[Node]) -> None:
        self.name, self.results, self.params = name, results, body.params
        self.nodes = Function("", body.params, results).nodes
        taken = {p.attrs["name"] for p in body.params}
        self.buffers: dict[Node, Node] = {}  # stored node -> its buffer
        self.outputs: dict[str, Node] = {}  # output -> its buffer
        for result, node in results:
            self.outputs[result] = ops.param(name=_fresh(result, taken), type=node.tensor)
        self.temporaries: dict[str, Tensor] = {}
        for node in (n for n in self.nodes if n in stored):
            result = next((r for r, n in results if n is node), "")
            if not result:
                result = _fresh(f"{name}_t{len(self.temporaries)}", taken)
                self.temporaries[result] = node.tensor
                self.outputs[result] = ops.param(name=result, type=node.tensor)
            self.buffers[node] = self.outputs[result]
        self.indices = Indices(d.name for node in self.nodes for s in node.shape for d in size.dims(s))
        self.sites: dict[Node, set[Index]] = {}
        self._depends: dict[Node, frozenset[Node]] = {}

    def _start(self, root: Node, extents: Sequence[SizeLike], may_cut: bool) -> Index:
        """Begin a loop nest over the given extents; returns the index made of its loop variables."""
        last = len(extents) - 1
        loops = tuple(self.indices.loop(f"i{a}", extent, last - a) for a, extent in enumerate(extents))
        self.root, self.may_cut, self.base_axis = root, may_cut, len(extents)
        self.outer = [n for n in map(self._loop_of, loops) if n is not None]
        self.whole: Node | None = None
        self.depth = 0
        self.inside: _Reduction | None = None
        self.computed: list[tuple[Node, Node, _Reduction | None]] = []
        self.elements: dict[tuple[Node, Index], Node] = {}
        self.reductions = 0
        return loops

    # -- kernels ---------------------------------------------------------------------------------------------------

    def kernels(self) -> list[Kernel]:
        made: list[Kernel] = []
        for node in (n for n in self.nodes if n in self.buffers):
            output = next(o for o, buffer in self.outputs.items() if buffer is self.buffers[node])
            made += self._write(output, node, output if output in self.temporaries else f"{self.name}_{output}")
        rest = {r: n for r, n in self.results if self.outputs[r] not in self.buffers.values()}
        plain = {r: n for r, n in rest.items() if n.op.name != "scatter"}
        if plain:
            made.append(self._kernel(self.name, {r: self._stores(self.outputs[r], n) for r, n in plain.items()}))
        for result, node in rest.items():
            if result in plain:
                continue
            made += self._write(result, node, f"{self.name}_{result}" if made else self.name)
        for node, sites in self.sites.items():
            if len(sites) > MAX_SITES[node.op.name in REDUCTIONS]:
                raise _Store(node)
        return made

    def _write(self, output: str, node: Node, name: str) -> list[Kernel]:
        if node.op.name == "scatter":
            return self._scatter(output, node, name)
        return [self._kernel(name, {output: self._stores(self.outputs[output], node)})]

    def _kernel(self, name: str, stores: dict[str, Node], alias: Mapping[str, str] | None = None) -> Kernel:
        body = Function(name, (), stores)
        read = [n for n in body.nodes if n.op.name == "param"]
        written = [self.outputs[o] for o in stores if o not in (alias or {})]
        order = {p: i for i, p in enumerate((*self.params, *self.outputs.values()))}
        inputs = sorted((n for n in read if n not in written), key=lambda n: order[n])
        function = Function(name, (*inputs, *written), stores)
        known = {buffer: output for output, buffer in self.outputs.items()}
        return Kernel(
            name, function, tuple(known.get(n, n.attrs["name"]) for n in inputs),
            (*(o for o in stores if o not in (alias or {})), *(alias or {})), _dims(function),
            {o: self.temporaries[o] for o in stores if o in self.temporaries}, dict(alias or {}),
        )  # fmt: skip

    def _scatter(self, output: str, node: Node, name: str) -> list[Kernel]:
        """Writes rows into a parameter in place when nothing else reads it, else into a copy."""
        chain = [node]
        while chain[0].inputs[0].op.name == "scatter" and chain[0].inputs[0] not in self.buffers:
            chain.insert(0, chain[0].inputs[0])
        base = chain[0].inputs[0]
        readers = [n for n in self.nodes if base in n.inputs] + [n for _, n in self.results if n is base]
        in_place = base.op.name == "param" and len(readers) == 1 and output not in self.temporaries
        in_place = in_place and chain[0].inputs.count(base) == 1
        made: list[Kernel] = []
        alias: dict[str, str] = {}
        if in_place:
            value, alias = base, {output: base.attrs["name"]}
        else:
            value = self.outputs[output]
            made.append(self._kernel(f"{name}_copy", {output: self._stores(value, base)}))
        for i, one in enumerate(chain):
            value = self._stores(value, one)
            last = i == len(chain) - 1
            made.append(self._kernel(name if last else f"{name}_{i}", {output: value}, alias))
            value = base if in_place else self.outputs[output]
        return made

    # -- one result ------------------------------------------------------------------------------------------------

    def _loop_of(self, index: SizeLike) -> Node | None:
        found = self.indices.variable(index)
        return found[0] if found else None

    def _stores(self, buffer: Node, node: Node) -> Node:
        """`buffer` with every element of `node` stored (of a scatter: of its updates), in as many parts as its joins ask for."""
        source, target = node, -1
        if node.op.name == "scatter":
            source, target = node.inputs[2], int(node.attrs["axis"])
        done: list[tuple[Node, list[Node]]] = []
        pieces: list[tuple[Index, Index]] = [((0,) * node.tensor.rank, source.shape)]
        count = 1
        while pieces:
            starts, extents = pieces.pop(0)
            loops = self._start(node, extents, may_cut=count < MAX_PIECES)
            # Parts may run at once, so writes to one place must be in one part: a scatter is not cut along its axis.
            self.whole = self._loop_of(loops[target]) if target >= 0 else None
            index = tuple(start + loop for start, loop in zip(starts, loops, strict=True))
            try:
                value = self.element(source, index)
                place = list(index)
                if target >= 0:
                    slot = cast(self.element(node.inputs[1], (index[target],)), "i64")
                    place[target] = self.indices.wrap(slot, node.shape[target])
                done.append((value, [self.indices.scalar(i) for i in place]))
                self._finish()
            except _Cut as cut:
                axis = next(a for a, loop in enumerate(loops) if self._loop_of(loop) is cut.loop)
                parts = ((starts[axis], cut.at), (starts[axis] + cut.at, extents[axis] - cut.at))
                pieces[:0] = [(_put(starts, axis, s), _put(extents, axis, e)) for s, e in parts]
                count += 1
        for value, where in done:
            with stamp(line=node.origin.line, by=node.origin.by):
                buffer = ops.store(buffer, value, *where)
        return buffer

    # -- the builder that the rules use ------------------------------------------------------------------------------

    def element(self, node: Node, index: Index) -> Node:
        key = (node, index)
        if key not in self.elements:
            with stamp(line=node.origin.line, by=node.origin.by):
                self.elements[key] = self._element(node, index)
        return self.elements[key]

    def _element(self, node: Node, index: Index) -> Node:
        if node.op.name == "param" or (node in self.buffers and node is not self.root):
            buffer = self.buffers.get(node, node)
            if dtype(buffer.dtype).kind == "quantized":
                where = buffer.attrs["name"]
                raise CompileError(f"{self.name}: the quantized value {where!r} cannot be read by a generated kernel.")
            return ops.load(buffer, *map(self.indices.scalar, index))
        if node.op.name == "scatter":
            raise _Store(node)
        rule = rule_of(node)
        assert rule is not None
        value = rule(self, node, index)
        if node is not self.root and (node.op.name in REDUCTIONS or node.op.name in TRANSCENDENTAL):
            self.sites.setdefault(node, set()).add(index)
            self.computed.append((node, value, self.inside))
        return value

    def _finish(self) -> None:
        """Ask for a buffer for an expensive value that is computed inside a loop it does not depend on."""
        for node, value, inside in self.computed:
            if any(loop not in self.depends(value) for loop in self._enclosing(value, inside)):
                raise _Store(node)

    def _enclosing(self, value: Node, inside: _Reduction | None) -> list[Node]:
        """The loops around a scalar, outermost first, when it is placed as far out as the loops it depends on allow."""
        loops = self.outer
        if inside is not None and inside.node is not None:
            loops = [*self._enclosing(inside.node, inside.around), *inside.loops]
        needed = self.depends(value)
        return loops[: max((i + 1 for i, loop in enumerate(loops) if loop in needed), default=0)]

    def depends(self, node: Node) -> frozenset[Node]:
        """The loops that a scalar changes with."""
        if node not in self._depends:
            found = frozenset({node} if node.op.name == "loop_index" else ())
            for i in node.inputs:
                found |= self.depends(i)
            if node.op.name == "reduce_loop":
                found -= frozenset(node.inputs[1:])
            self._depends[node] = found
        return self._depends[node]

    def reduction(self, extents: list[tuple[str, SizeLike]], kind: str, value: Callable[[Index], Node]) -> Node:
        self.reductions += 1
        suffix = str(self.reductions) if self.reductions > 1 else ""
        several = len(extents) > 1
        axis = self.base_axis + self.depth
        loops = [
            self.indices.loop(f"{name}{suffix}_{i}" if several else f"{name}{suffix}", extent, axis + i)
            for i, (name, extent) in enumerate(extents)
        ]
        nodes = [n for n in map(self._loop_of, loops) if n is not None]
        around, self.inside = self.inside, _Reduction(self.inside, nodes)
        self.depth += len(extents)
        element = value(tuple(loops))
        self.depth -= len(extents)
        record, self.inside = self.inside, around
        if not nodes:
            element = ops.constant(value=0, dtype="i64") if kind == "argmax" else element
            record.node = element
        else:
            record.node = element = ops.reduce_loop(element, *nodes, kind=kind)
        return element

    def part(self, index: SizeLike, cuts: list[SizeLike]) -> list[int]:
        possible = [
            i for i, (low, high) in enumerate(zip(cuts, cuts[1:]))
            if low != high and not self.indices.below(index, low) and not self.indices.at_least(index, high)
        ]  # fmt: skip
        found = self.indices.variable(index)
        if len(possible) > 1 and found is not None and self.may_cut and found[0] in self.outer and found[0] is not self.whole:
            loop, offset = found
            at = cuts[possible[0] + 1] - offset
            if size.bounds(at)[0] >= 0 and size.bounds(loop.attrs["extent"] - at)[0] >= 0:
                raise _Cut(loop, at)
        return possible


def _put(values: Index, axis: int, value: SizeLike) -> Index:
    return (*values[:axis], value, *values[axis + 1 :])


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_out"
    taken.add(name)
    return name


def _dims(function: Function) -> tuple[str, ...]:
    """Names of the dimensions that the kernel's loops, strides and sizes mention."""
    found = dict.fromkeys(d.name for p in function.params for s in p.shape for d in sorted(size.dims(s), key=str))
    for node in function.nodes:
        for value in node.attrs.values():
            if isinstance(value, Size):
                found.update(dict.fromkeys(d.name for d in sorted(size.dims(value), key=str)))
    return tuple(found)
