"""Fusion: which operations share one kernel. Each `fused` region becomes one launch.

join    linear(x, a), linear(x, b)         ->  slices of linear(x, concat(a, b))          one pass over x, one launch
fuse    linear -> add, activation, ...     ->  fused{linear; add; ...}                    epilogue in registers
        add -> rms_norm or layer_norm      ->  fused{add; norm} -> (sum, norm)            residual and norm in one read
        elementwise and view chains        ->  fused{...}                                 no intermediate in memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.ir import Function, Module, Node, Tensor, constant_nodes, dtype, ops
from stemma.passes.base import Pass, PassContext

NORMS = ("rms_norm", "layer_norm")
LIGHT = frozenset({"concat", "pad", "iota", "take_along"})
MAX_BODY = 64  # nodes of one generated kernel: bounds the compile time of a kernel and its registers


@dataclass(frozen=True)
class JoinLinears(Pass):
    """Join linears that read one input into one: q/k/v, gate/up. Their weights are concatenated when packed."""

    name: ClassVar[str] = "join"

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with horizontally joined linears."""
        return module.map(_join)


def _join(function: Function) -> Function:
    constant = constant_nodes(function)
    groups: dict[tuple[Node, str, bool], list[Node]] = {}
    for node in function.nodes:
        if node.op.name == "linear" and all(i in constant for i in node.inputs[1:]):
            groups.setdefault((node.inputs[0], node.inputs[1].dtype, len(node.inputs) > 2), []).append(node)
    parts: dict[Node, tuple[list[Node], int]] = {}
    for nodes in groups.values():
        if len(nodes) > 1:
            offset = 0
            for node in nodes:
                parts[node] = (nodes, offset)
                offset += int(node.shape[-1])  # type: ignore[arg-type]

    def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node not in parts:
            return node.rebuild(*inputs)
        nodes, offset = parts[node]
        operands = [ops.concat(*(n.inputs[i] for n in nodes), axis=0) for i in range(1, len(node.inputs))]
        last = node.tensor.rank - 1
        return ops.slice(ops.linear(inputs[0], *operands), axis=last, start=offset, stop=offset + node.shape[-1])

    return function.rewrite(replace) if parts else function


@dataclass(frozen=True)
class Fuse(Pass):
    """Group operations into kernels: epilogues, residual and norm, elementwise chains."""

    name: ClassVar[str] = "fuse"

    def run(self, module: Module, context: PassContext) -> Module:
        """The module with `fused` regions."""
        return module.map(lambda f: _chains(_residual_norms(_epilogues(f))))


def _region(nodes: list[Node], results: list[Node]) -> tuple[list[Node], Function]:
    """Inputs and body for a set of nodes, given in topological order, with these results. Scalars move into the body."""
    inner: dict[Node, Node] = {}
    inputs: list[Node] = []
    for node in nodes:
        for i in node.inputs:
            if i in inner:
                continue
            if i.op.name in ("constant", "size_value"):
                inner[i] = i
            else:
                inner[i] = ops.param(name=f"a{len(inputs)}", type=i.type)
                inputs.append(i)
        inner[node] = node.rebuild(*(inner[i] for i in node.inputs))
    return inputs, Function("", [inner[i] for i in inputs], [(f"r{i}", inner[r]) for i, r in enumerate(results)])


def _fuse(function: Function, groups: dict[Node, list[Node]], extra: dict[Node, Node]) -> Function:
    """Replace each group by a fused node. Keys are roots; `extra` maps a second result of a group to its root."""
    seconds: dict[Node, list[Node]] = {root: [] for root in groups}
    for second, root in extra.items():
        seconds[root].append(second)
    regions = {root: _region(nodes, [*seconds[root], root]) for root, nodes in groups.items()}

    def reads(node: Node) -> list[Node] | tuple[Node, ...]:
        root = extra.get(node, node)
        return regions[root][0] if root in regions else node.inputs

    new: dict[Node, Node] = {}
    stack = list(function.results)
    while stack:
        node = stack[-1]
        waiting = [i for i in reads(node) if i not in new] if node not in new else []
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        if node in new:
            continue
        root = extra.get(node, node)
        if root not in regions:
            new[node] = node.rebuild(*(new[i] for i in node.inputs))
            continue
        inputs, body = regions[root]
        fused = ops.fused(*(new[i] for i in inputs), body=body)
        outputs = [*seconds[root], root]
        for index, output in enumerate(outputs):
            new[output] = fused if len(outputs) == 1 else ops.get(fused, index=index)
    return function.with_results((n, new[r]) for n, r in zip(function.result_names, function.results, strict=True))


def _epilogues(function: Function) -> Function:
    """linear followed by elementwise operations of the same shape, each the only reader of the one before."""
    users, constant = function.users(), constant_nodes(function)
    results = set(function.results)
    groups: dict[Node, list[Node]] = {}
    taken: set[Node] = set()
    for linear in function.nodes:
        if linear.op.name != "linear" or linear.inputs[1] not in constant:
            continue
        chain = [linear]
        while chain[-1] not in results and len(users[chain[-1]]) == 1:
            user = users[chain[-1]][0]
            others = [i for i in user.inputs if i is not chain[-1]]
            plain = "elementwise" in user.op.tags and user.type == linear.type and len(others) == len(user.inputs) - 1
            if not plain or user in taken or any(not _epilogue_operand(o, linear) for o in others):
                break
            chain.append(user)
        if len(chain) > 1:
            groups[chain[-1]] = chain
            taken.update(chain)
    return _fuse(function, groups, {})


def _epilogue_operand(node: Node, linear: Node) -> bool:
    """A scalar, one value per column, or one value per element of the result."""
    return node.dtype == linear.dtype and (
        node.shape == linear.shape or node.shape == linear.shape[-1:] or node.op.name == "constant"
    )


def _residual_norms(function: Function) -> Function:
    """add -> norm, keeping both the sum and its norm."""
    users = function.users()
    groups: dict[Node, list[Node]] = {}
    extra: dict[Node, Node] = {}
    for node in function.nodes:
        if node.op.name in NORMS and node.inputs[0].op.name == "add" and node.inputs[0] not in extra:
            total = node.inputs[0]
            if all(i.type == total.type for i in total.inputs):
                groups[node] = [total, node]
                if len(users[total]) > 1 or total in function.results:
                    extra[total] = node
    return _fuse(function, groups, extra)


def _is_view(node: Node) -> bool:
    return "view" in node.op.tags


def _is_light(node: Node) -> bool:
    tags = node.op.tags
    quantized = any(isinstance(t.type, Tensor) and dtype(t.dtype).kind == "quantized" for t in (node, *node.inputs))
    return (bool({"elementwise", "view"} & tags) or node.op.name in LIGHT or node.op.name == "rope") and not quantized


def _chains(function: Function) -> Function:
    """Clusters of light operations: a value whose readers are all in one cluster joins it; views are copied into readers.

    A cluster ends in a light operation, a reduction, a gather or a scatter (the root), and has that one result. Because all readers
    of every other member are inside, no path leaves the cluster and comes back. A scatter into a cache of a quantized type has its
    rounding with it, and reads what it rounds through views only.
    """
    users, constant = function.users(), constant_nodes(function)
    results = set(function.results)
    root_of: dict[Node, Node] = {}
    members: dict[Node, list[Node]] = {}
    order = {node: i for i, node in enumerate(function.nodes)}
    rounded: set[Node] = set()  # members that are rounded before the scatter, and the rounding
    for node in reversed(function.nodes):
        if node in constant or node.op.name in ("param", "constant", "size_value"):
            continue
        readers = {root_of.get(u) for u in users[node]}
        light = _is_light(node) or (node.op.name == "quantize" and all(u.op.name == "scatter" for u in users[node]))
        (only,) = readers if len(readers) == 1 else (None,)
        leads = node.op.name == "quantize" or any(u in rounded for u in users[node])  # to a rounding
        may = light and (not leads or node.op.name == "quantize" or _is_view(node))
        if may and only is not None and node not in results and len(members[only]) < MAX_BODY:
            if leads:
                rounded.add(node)
            root_of[node] = only
            members[only].append(node)
        elif light or "reduction" in node.op.tags or node.op.name in ("take", "scatter", "softmax"):
            if not (node.op.name == "reshape"):
                root_of[node] = node
                members[node] = [node]
    groups: dict[Node, list[Node]] = {}
    for root, nodes in members.items():
        full = set(nodes)
        frontier = list(nodes)
        while frontier:  # views used elsewhere too are cheap: read through them
            for i in frontier.pop().inputs:
                if _is_view(i) and i not in full and i not in constant:
                    full.add(i)
                    frontier.append(i)
        if len(full) > 1:
            groups[root] = sorted(full, key=order.__getitem__)
    return _fuse(function, groups, {})
