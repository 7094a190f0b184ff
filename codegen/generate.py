"""Kernels that no template covers: lowered from a body, with content-derived names so that equal bodies share one kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from stemma.backends.base import Argument, Backend, Refusal
from stemma.codegen import lower
from stemma.codegen.render import render
from stemma.ir import CompileError, Function, Module, SizeLike, dtype, print_module, tensors_of


@dataclass(frozen=True)
class Generated:
    """The kernels of one body, run in order. `inplace` pairs an output of the body with the input it updates."""

    kernels: tuple[lower.Kernel, ...]
    sources: tuple[str, ...]
    inplace: tuple[tuple[int, int], ...]
    arguments: tuple[Argument, ...] = ()
    layouts: Mapping[int, str] = field(default_factory=dict)
    output_bytes: Mapping[int, SizeLike] = field(default_factory=dict)
    what: str = "generated"


def generate(body: Function, backend: Backend) -> Generated | Refusal:
    """Kernels for `body`; a refusal when it has regions or element types that the backend does not hold in memory."""
    for node in body.nodes:
        for tensor in tensors_of(node.type):
            if dtype(tensor.dtype).kind == "quantized" or tensor.dtype not in backend.dtypes:
                return Refusal(f"generated kernels have no values of {tensor.dtype}")
    try:
        kernels = lower.lower(body, kernel_name(body))
        sources = tuple(render(k, backend.dialect).source for k in kernels)
    except CompileError as error:
        return Refusal(str(error))
    params = {p.attrs["name"]: i for i, p in enumerate(body.params)}
    results = {name: i for i, name in enumerate(body.result_names)}
    pairs = {
        (results[out], params[source]) for k in kernels for out, source in k.alias.items() if out in results and source in params
    }  # fmt: skip
    return Generated(kernels, sources, tuple(sorted(pairs)))


def kernel_name(body: Function) -> str:
    """An identifier from the operations and the content of a body."""
    names = [n.op.name for n in body.nodes if not {"leaf", "view"} & n.op.tags] or [n.op.name for n in body.nodes[-1:]]
    text = print_module(Module([Function("body", body.params, zip(body.result_names, body.results, strict=True))]))
    content = "\n".join(line.partition("  # ")[0] for line in text.splitlines())
    return "_".join([*dict.fromkeys(names)][:4]) + "_" + hashlib.sha256(content.encode()).hexdigest()[:8]
