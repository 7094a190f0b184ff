"""From any `torch.nn.Module` to a module of the IR: torch.export, then the lowering table of `frontend/aten*.py`.

The graph is lowered as exported, with torch's own composites (linear, attention, layer_norm, ...). Only when it holds an operator
without a lowering, or one that writes in place, is it first decomposed and made functional by torch.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from stemma.frontend import aten_compute, aten_elementwise, aten_shape  # noqa: F401  (they fill the lowering table)
from stemma.frontend.aten import LOWERINGS, torch_dtype
from stemma.frontend.lowering import Lowerer, is_dropped
from stemma.frontend.sizes import Sizes
from stemma.ir import Array, Function, Module, Node, Size, Tensor, UnsupportedError, WeightStore, dtype, ops, size


class Stored(NamedTuple):
    """A weight as it is stored: its type, the loader of its value, and of its elements by rows (see `WeightStore.add`)."""

    type: Tensor
    load: Callable[[], Any]
    rows: Callable[[], Any]


Dims = Mapping[str, Mapping[int, Size]]


def trace(
    module: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, dims: Dims | None = None,
    properties: Mapping[str, Any] | None = None, stored: Mapping[str, Stored] | None = None, name: str = "forward",
) -> tuple[Module, WeightStore]:  # fmt: skip
    """The module's forward as a function of the IR, and its weights.

    args, kwargs: example inputs; their values do not matter, their sizes only where they are not dynamic.
    dims: for arguments of forward by name, the axes that are symbolic: {"x": {0: dim("batch"), 1: dim("tokens", 1, 128)}}.
        The same size in two places must be equal there. Axes not named keep the size of the example.
    stored: weights that live elsewhere than in the module, by parameter name: their stored type and a loader. Parameters and
        buffers that are not listed are read from the module.
    Floats are computed in f32: a weight stored in another type is cast, or dequantized. Parameters are named as the arguments of
    forward, results by the keys of the output ("logits"), or "output". Weights that share one tensor have one name, the first.
    Raises UnsupportedError when torch.export fails or operators have no lowering; the message lists all of them.
    """
    module, originals = _in_f32(module)
    program, symbols = _export(module, tuple(args), dict(kwargs or {}), dims or {})
    if any(_needs_decomposition(graph) for graph in _graphs(program.graph_module)):
        program = _decompose(program)
    lowerer = Lowerer(Sizes(symbols, program))
    store = WeightStore()
    inputs, params = _inputs(program, lowerer, originals, stored or {}, store)
    values = lowerer.run(program.graph_module, inputs)
    lowerer.raise_problems(type(module).__name__)
    function = Function(name, params, _results(program, values))
    result = Module([function], properties)
    used = WeightStore()
    for weight in result.weights():
        used.add(weight, store.type(weight), partial(store, weight), partial(store.raw, weight))
    return result, used


def _in_f32(module: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The module with float32 parameters (a copy when it has others) and the original tensors by name."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors.values()):
        module = copy.deepcopy(module).float()
    return module, tensors


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Dims
) -> tuple[ExportedProgram, dict[str, Size]]:
    """The exported program, and our sizes by the name of torch's symbols."""
    names = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    for missing in dims.keys() - set(names):
        raise UnsupportedError(f"There is no argument {missing!r}; forward was given {', '.join(names)}.")
    torch_dims: dict[Size, Any] = {}
    for axes in dims.values():
        for each in axes.values():
            (d,) = size.dims(each)
            hi = None if d.hi == size.UNBOUNDED else d.hi
            torch_dims.setdefault(each, torch.export.Dim(d.name, min=d.lo, max=hi))
    dynamic = {n: {i: torch_dims[s] for i, s in dims[n].items()} if n in dims else None for n in names}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch raises many kinds here, its own and the model's
        reason = " ".join(str(error).split())[:600]
        raise UnsupportedError(
            f"torch.export could not trace {type(module).__name__}: {type(error).__name__}: {reason} The forward must not "
            "decide by the values of its inputs, and sizes must not be tied to the example; change that, or fix the axis."
        ) from error
    symbols: dict[str, Size] = {}
    for node in program.graph.nodes:
        for i, each in dims.get(node.name, {}).items() if node.op == "placeholder" else ():
            symbols[str(node.meta["val"].shape[i].node.expr)] = each
    return program, symbols


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings, and without the graph that it logs when an export fails."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _graphs(module: torch.fx.GraphModule) -> Iterator[torch.fx.Graph]:
    for child in module.modules():
        if isinstance(child, torch.fx.GraphModule):
            yield child.graph


def _needs_decomposition(graph: torch.fx.Graph) -> bool:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and not is_dropped(node):
            name = str(node.target)
            writes = node.target._schema.is_mutable and name != "aten.detach_.default"
            if writes or (name not in LOWERINGS and not name.startswith("aten.sym_")):  # sizes are read from their types
                return True
    return False


def _decompose(program: ExportedProgram) -> ExportedProgram:
    """The program in functional core operators, except those that have a lowering."""
    table: Any = torch.export.default_decompositions()
    for operator in list(table):
        if str(operator) in LOWERINGS:
            table.pop(operator)
    with _quiet():
        functional: ExportedProgram = program.run_decompositions(table)
    return functional


def _inputs(
    program: ExportedProgram, lowerer: Lowerer, originals: Mapping[str, torch.Tensor], stored: Mapping[str, Stored],
    store: WeightStore,
) -> tuple[list[Any], list[Node]]:  # fmt: skip
    """A node for every placeholder of the graph, and those that are parameters of the function."""
    first: dict[int, str] = {}
    for name, original in originals.items():
        first.setdefault(id(original), name)
    inputs: list[Any] = []
    params: list[Node] = []
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for placeholder, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if isinstance(spec.arg, ConstantArgument) or spec.kind is InputKind.TOKEN:
            inputs.append(getattr(spec.arg, "value", None))
            continue
        type = lowerer.sizes.tensor(placeholder.meta["val"])
        if spec.kind is InputKind.USER_INPUT:
            params.append(ops.param(name=placeholder.name, type=type))
            inputs.append(params[-1])
            continue
        target = str(spec.target)
        tensor: torch.Tensor = originals[target] if target in originals else program.constants[target]
        name = first.get(id(tensor), target)
        if name in stored:
            stored_type, load, rows = stored[name]
        else:
            if not tensor.dim() and spec.kind is not InputKind.PARAMETER:
                inputs.append(ops.constant(value=tensor.item(), dtype=type.dtype))
                continue
            stored_type = Tensor(torch_dtype(tensor.dtype), tuple(tensor.shape))
            load, rows = _loader(tensor), None
        if name not in store:
            store.add(name, stored_type, load, rows)
        weight = ops.weight(name=name, type=stored_type)
        inputs.append(_widened(weight, type.dtype))
    return inputs, params


def _widened(weight: Node, name: str) -> Node:
    """A stored weight in the element type in which the graph reads it."""
    if dtype(weight.dtype).kind == "quantized":
        return ops.dequantize(weight)
    return weight if weight.dtype == name else ops.cast(weight, dtype=name)


def _loader(tensor: torch.Tensor) -> Callable[[], Array]:
    def load() -> Array:
        value = tensor.detach()
        return np.asarray((value.float() if value.dtype is torch.bfloat16 else value).numpy(force=True))

    return load


def _results(program: ExportedProgram, values: Sequence[Any]) -> list[tuple[str, Node]]:
    """Names and nodes of the results that are tensors."""
    kept = []
    for spec, value in zip(program.graph_signature.output_specs, values, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            kept.append(value)
        elif spec.kind is not OutputKind.TOKEN:
            raise UnsupportedError(
                f"The forward changes {spec.target or spec.arg.name!r} in place. State is not traced: return it as a result "
                "instead, or call module.eval() if a statistic is being updated."
            )
    spec = program.call_spec.out_spec
    names = dict(_names(torch.utils._pytree.tree_unflatten(range(len(kept)), spec), ""))
    return [(names.get(i) or "output", value) for i, value in enumerate(kept) if isinstance(value, Node)]


def _names(tree: Any, prefix: str) -> Iterator[tuple[int, str]]:
    """Index and name of every leaf of an output structure."""
    if isinstance(tree, int):
        yield tree, prefix
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _names(value, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from _names(value, f"{prefix or 'output'}_{i}")
