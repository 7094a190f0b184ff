"""Rewrites a tensor-level function until every node is one launch: claimed by a template, or generated; else decomposed.

Also says what one launch is: `kernel_body` turns a node into a body (a Function) with canonical parameter names, so that equal
kernels of different layers are the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

from stemma.backends.base import Backend, Claim, Inputs, Refusal
from stemma.codegen.generate import Generated, generate
from stemma.ir import CompileError, Function, Node, constant_nodes, dtype, ops, stamp, tensors_of

SCALARS = ("constant", "size_value")
ROUNDS = 64


def is_alias(node: Node) -> bool:
    """Whether the node's value has the bytes of its input: reshape, and transpose or broadcast that move only axes of size 1."""
    name = node.op.name
    if name == "reshape":
        return True
    if name == "transpose":
        moved = [a for a in node.attrs["axes"] if node.inputs[0].shape[a] != 1]
        return moved == sorted(moved)
    return name == "broadcast_to" and node.inputs[0].tensor.elements == node.tensor.elements


def is_launch(node: Node, constant: Container[Node]) -> bool:
    """Whether the node computes something: not a leaf, a constant expression, a view, or the choice of a result."""
    return not (node in constant or node.op.name in ("param", "get", *SCALARS) or is_alias(node))


def kernel_body(node: Node) -> tuple[Function, tuple[Node, ...]]:
    """The body of a launch and the nodes it reads. Constant expressions inside a region become inputs, scalars move inside."""
    if node.op.name == "fused":
        region = node.attrs["body"]
        outer = dict(zip(region.params, node.inputs, strict=True))
        lifted = constant_nodes(region)
        nodes, results = region.nodes, region.results
    else:
        outer, lifted, nodes, results = {i: i for i in node.inputs}, set(), (*node.inputs, node), (node,)
    inner: dict[Node, Node] = {}
    inputs: list[Node] = []
    params: dict[Node, Node] = {}

    def leaf(value: Node) -> Node:
        if value.op.name in SCALARS:
            return value
        if value not in params:
            params[value] = ops.param(name=f"a{len(inputs)}", type=value.type)
            inputs.append(value)
        return params[value]

    needed = _inside(results, outer, lifted)
    for n in nodes:
        if n not in needed:
            continue
        if n in outer:
            inner[n] = leaf(outer[n])
        elif n in lifted and n.op.name not in SCALARS:
            inner[n] = leaf(n)
        else:
            inner[n] = n.rebuild(*(inner[i] for i in n.inputs))
    body = Function("", params.values(), [(f"r{i}", inner[r]) for i, r in enumerate(results)])
    return body, tuple(inputs)


def _inside(results: tuple[Node, ...], outer: dict[Node, Node], lifted: set[Node]) -> set[Node]:
    """Nodes of a region that the results need when constant expressions are read from outside."""
    found: set[Node] = set()
    stack = list(results)
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            if n not in outer and (n not in lifted or n.op.name in SCALARS):
                stack.extend(n.inputs)
    return found


@dataclass
class Offers:
    """Asks the backend, then the generator, how to run a node; remembers the answers."""

    backend: Backend
    panels: set[Node] = field(default_factory=set)
    _generated: dict[Function, Generated | Refusal] = field(default_factory=dict)

    def find(self, node: Node, constant: Container[Node]) -> Claim | Generated | Refusal:
        """A way to run the node as one kernel, or why there is none."""
        body, inputs = kernel_body(node)
        known = Inputs(
            frozenset(i for i, n in enumerate(inputs) if n in constant),
            frozenset(i for i, n in enumerate(inputs) if n in self.panels),
        )
        claim = self.backend.claim(body, known)
        if isinstance(claim, Claim):
            return claim
        if node.op.name == "fused" and any(n.op.name in self.backend.hot for n in body.nodes):
            return claim
        if body not in self._generated:
            self._generated[body] = generate(body, self.backend)
        made = self._generated[body]
        return made if isinstance(made, Generated) else Refusal(f"{claim.reason}; {made.reason}")


def legalize(functions: tuple[Function, ...], offers: Offers) -> tuple[Function, ...]:
    """The functions with every launch claimed or generated; CompileError lists each operation for which there is no way."""
    for _ in range(ROUNDS):
        offers.panels = set().union(*(_linear_weights(f) for f in functions))
        failed: dict[str, str] = {}
        new = tuple(f.rewrite(_step(offers, _Constants(constant_nodes(f)), failed)) for f in functions)
        if failed:
            listed = "; ".join(f"{what}: {reason}" for what, reason in failed.items())
            raise CompileError(
                f"The backend {offers.backend.name} has no kernel for {len(failed)} operation(s): {listed}. Write a pass that "
                "rewrites them, or give the operation a decomposition."
            )
        if new == functions:
            return functions
        functions = new
    raise CompileError(f"Decomposing did not end after {ROUNDS} rounds: a decomposition produces its own operation.")


def _linear_weights(function: Function) -> set[Node]:
    """Constant expressions that some linear of the function reads as its weight."""
    constant = constant_nodes(function)
    found: set[Node] = set()
    for node in function.nodes:
        if node.op.name == "linear":
            found.add(node.inputs[1])
        elif node.op.name == "fused":
            body, inputs = kernel_body(node)
            outer = dict(zip(body.params, inputs, strict=True))
            found.update(outer[n.inputs[1]] for n in body.nodes if n.op.name == "linear" and n.inputs[1] in outer)
    return found & constant


class _Constants:
    """The constant expressions among nodes that come into being while a function is rewritten."""

    def __init__(self, known: set[Node]) -> None:
        self._memo = dict.fromkeys(known, True)

    def __contains__(self, node: object) -> bool:
        assert isinstance(node, Node)
        if node not in self._memo:
            types = tensors_of(node.type)
            fixed = node.op.name not in ("param", "size_value", "iota") and all(isinstance(s, int) for t in types for s in t.shape)
            self._memo[node] = fixed and all(i in self for i in node.inputs)
        return self._memo[node]


def _step(offers: Offers, constant: Container[Node], failed: dict[str, str]) -> Callable[[Node, tuple[Node, ...]], Node]:
    opened: dict[Node, tuple[Node, ...]] = {}  # regions with several results that no backend runs whole

    def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.op.name == "get" and node.inputs[0] in opened:
            return opened[node.inputs[0]][int(node.attrs["index"])]
        node = node.rebuild(*inputs)
        if not is_launch(node, constant):
            return node
        with stamp(line=node.origin.line, by=node.origin.by or f"decompose {node.op.name}"):
            better = offers.backend.legalize(node)
            if better is not None:
                return better
            offer = offers.find(node, constant)
            if not isinstance(offer, Refusal):
                return node
            if node.op.name == "fused":
                results = node.attrs["body"].inline(*inputs)
                if len(results) == 1:
                    return results[0]  # type: ignore[no-any-return]
                opened[node] = results
                return node
            stored = next((i.dtype for i in inputs if i in constant and dtype(i.tensor.dtype).kind == "quantized"), None)
            if stored is not None and node.op.name != "dequantize":  # a decomposition would store it as f32, unasked
                raise CompileError(
                    f"The backend {offers.backend.name} has no kernel for this {node.op.name} with a weight of {stored}"
                    f"{f' (from {node.origin.line})' if node.origin.line else ''}: {offer.reason}. Choose another format, or other "
                    "activations: see round_activations."
                )
            if node.op.decompose is not None:
                return node.op.decompose(*inputs, **node.attrs)
        where = f" (from {node.origin.line})" if node.origin.line else ""
        failed[f"{node.op.name}: {node.type!r}{where}"] = offer.reason
        return node

    return replace
