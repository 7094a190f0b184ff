"""Joins a launch with the one operation that reads it, where the backend has one kernel for both.

y = linear(x, concat(gate, up)); fused{silu(y[:, :F]) * y[:, F:]}(y)   ->   fused{linear; slices; gated}(x, concat(gate, up))
s, y = fused{add; rms_norm}(x, r, w); quantize(y)                       ->   s, q = fused{add; rms_norm; quantize}(x, r, w)
"""

from __future__ import annotations

from stemma.backends.base import Claim
from stemma.codegen.legalize import Offers
from stemma.ir import Function, Node, constant_nodes, ops, stamp

ROUNDING = ("quantize", "cast")
NORMS = ("rms_norm", "layer_norm")


def join(function: Function, offers: Offers) -> Function:
    """The function with every such pair that the backend claims as one kernel."""
    constant, users = constant_nodes(function), function.users()
    results = set(function.results)
    joined: dict[Node, Node] = {}  # producer -> the region of both, over the producer's inputs
    chosen: dict[Node, tuple[Node, int]] = {}  # consumer -> its producer and result number
    for node in function.nodes:
        if len(node.inputs) != 1 or node in constant or not (node.op.name == "fused" or node.op.name in ROUNDING):
            continue
        read = node.inputs[0]
        producer, index = (read.inputs[0], int(read.attrs["index"])) if read.op.name == "get" else (read, 0)
        if producer in joined or len(users[read]) != 1 or {read, producer} & results or not _may_join(producer, node):
            continue
        with stamp(line=node.origin.line, by="join"):
            region = _region(producer, index, node)
        if isinstance(offers.find(region, constant), Claim):
            joined[producer], chosen[node] = region, (producer, index)
    new: dict[Node, Node] = {}
    for node in function.nodes:
        inputs = tuple(new[i] for i in node.inputs)
        if node in chosen:
            producer, index = chosen[node]
            several = len(joined[producer].attrs["body"].results) > 1
            new[node] = ops.get(new[producer], index=index) if several else new[producer]
        elif node.op.name == "get" and (node.inputs[0], node.attrs["index"]) in chosen.values():
            new[node] = inputs[0]  # read by the chosen consumer alone
        else:
            new[node] = joined[node].rebuild(*inputs) if node in joined else node.rebuild(*inputs)
    return function.with_results(zip(function.result_names, (new[r] for r in function.results), strict=True))


def _may_join(producer: Node, consumer: Node) -> bool:
    names = {n.op.name for n in producer.attrs["body"].nodes} if producer.op.name == "fused" else {producer.op.name}
    return "linear" in names if consumer.op.name == "fused" else bool(names & {"linear", *NORMS})


def _region(producer: Node, index: int, consumer: Node) -> Node:
    """`fused` of both, over the inputs of the producer; the consumer's result takes the place of result `index`."""
    params = [ops.param(name=f"a{i}", type=n.type) for i, n in enumerate(producer.inputs)]
    if producer.op.name == "fused":
        values = list(producer.attrs["body"].inline(*params))
    else:
        values = [producer.op(*params, **producer.attrs)]
    values[index] = (
        consumer.attrs["body"].inline(values[index])[0] if consumer.op.name == "fused" else consumer.rebuild(values[index])
    )
    return ops.fused(*producer.inputs, body=Function("", params, [(f"r{i}", v) for i, v in enumerate(values)]))
