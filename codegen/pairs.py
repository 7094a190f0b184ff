"""Joins a gate-and-up product with the gated activation that alone reads it, where the backend has one kernel for both.

    y = linear(x, concat(gate, up)); fused{silu(y[:, :F]) * y[:, F:]}(y)   ->   fused{linear; slices; gated}(x, concat(gate, up))
"""

from __future__ import annotations

from stemma.backends.base import Claim
from stemma.codegen.legalize import Offers
from stemma.ir import Function, Node, constant_nodes, ops, stamp


def join_pairs(function: Function, offers: Offers) -> Function:
    """The function with every such pair that the backend claims as one kernel."""
    constant, users = constant_nodes(function), function.users()
    results = set(function.results)
    joined: dict[Node, tuple[Node, ...]] = {}  # activation -> inputs of the joined kernel
    bodies: dict[Node, Function] = {}
    for node in function.nodes:
        if node.op.name != "fused" or len(node.inputs) != 1:
            continue
        linear = node.inputs[0]
        if linear.op.name != "linear" or linear in results or len(users[linear]) != 1:
            continue
        region: Function = node.attrs["body"]
        params = [ops.param(name=f"a{i}", type=n.type) for i, n in enumerate(linear.inputs)]
        body = Function("", params, [("r0", region.inline(ops.linear(*params))[0])])
        if isinstance(offers.find(ops.fused(*linear.inputs, body=body), constant), Claim):
            joined[node], bodies[node] = linear.inputs, body
    new: dict[Node, Node] = {}
    for node in function.nodes:
        if node in joined:
            with stamp(line=node.origin.line, by="join_pairs"):
                new[node] = ops.fused(*(new[i] for i in joined[node]), body=bodies[node])
        else:
            new[node] = node.rebuild(*(new[i] for i in node.inputs))
    return function.with_results(zip(function.result_names, (new[r] for r in function.results), strict=True))
