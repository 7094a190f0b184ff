"""Which bodies the CPU's hand-written kernels compute, and how each is called. One matcher per template.

A matcher returns a Claim, a Refusal when the body has the template's anchor op but does not fit, or None when it is not concerned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from stemma.backends.base import Argument, Claim, Inputs, Kernel, Refusal
from stemma.backends.cpu.epilogue import Epilogue
from stemma.backends.cpu.formats import ACTIVATIONS, packing, q8_row_bytes
from stemma.backends.cpu.formats import rows as by_rows
from stemma.backends.cpu.formats.base import Packing
from stemma.ir import Function, Node, SizeLike, Tensor, dtype, size

Answer = Claim | Refusal | None


def kernel(template: str, **options: Any) -> Kernel:
    """A kernel whose name tells the template and identifies the options."""
    items = tuple(sorted(options.items()))
    digest = hashlib.sha256(repr(items).encode()).hexdigest()[:8]
    return Kernel(f"{template}_{digest}", template, items)


def rows(tensor: Tensor) -> SizeLike:
    """Number of rows: the product of all axes but the last."""
    return size.product(tensor.shape[:-1])


def arguments(*parts: tuple[str, Any] | SizeLike) -> tuple[Argument, ...]:
    """Call arguments: pairs (kind, value), or sizes."""
    return tuple(Argument(p[0], p[1]) if isinstance(p, tuple) else Argument("size", p) for p in parts)  # type: ignore[arg-type]


def only(body: Function, name: str) -> Node | None:
    """The single node of the body with this op; None when there is none or more than one."""
    found = [n for n in body.nodes if n.op.name == name]
    return found[0] if len(found) == 1 else None


def positions(body: Function) -> Mapping[Node, int]:
    """Input number of each parameter."""
    return {p: i for i, p in enumerate(body.params)}


def linear(body: Function, inputs: Inputs) -> Answer:
    """linear [+ bias] [+ elementwise ops on its result], or the gated pair silu(x @ gate.T) * (x @ up.T) of one joined weight."""
    found = [n for n in body.nodes if n.op.name == "linear"]
    if not found:
        return None
    if len(found) > 1:
        return Refusal("a body with two matrix products is not one kernel")
    anchor, at = found[0], positions(body)
    x, w, *rest = anchor.inputs
    while x.op.name == "reshape" and x.inputs[0].shape[-1:] == x.shape[-1:]:
        x = x.inputs[0]
    if x not in at or w not in at or at[w] not in inputs.constant:
        return Refusal("the activations and the weight of a matrix product must come from outside the kernel, the weight constant")
    weight, columns = packing(w.dtype), x.shape[-1]
    assert isinstance(columns, int)
    if weight is None:
        return Refusal(f"no kernel multiplies with weights of {w.dtype}")
    if reason := weight.refusal(columns) or _activation_unfit(x.dtype, weight, columns):
        return Refusal(reason)
    if len(body.results) != 1:
        return Refusal("a matrix product with an epilogue has one result")
    epilogue = Epilogue(body, anchor, at)
    if isinstance(made := epilogue.build(rest[0] if rest else None), Refusal):
        return made
    used = kernel(
        "linear", weight=w.dtype, activation=x.dtype, core=weight.core, **weight.seams(), epilogue=tuple(made.statements),
        extras=tuple(made.extras), output=made.output, pair=made.pair,
    )  # fmt: skip
    call = arguments(
        rows(anchor.inputs[0].tensor), w.shape[0], columns, ("input", at[x]), ("input", at[w]), ("output", 0),
        *(("input", i) for i in made.inputs),
    )  # fmt: skip
    what = f"{w.dtype} weight, {x.dtype} activations" + (f", {made.operations} more ops" if made.operations else "")
    return Claim(used, call, {at[w]: "pair" if made.pair else "panel"}, what=what)


def _activation_unfit(x: str, weight: Packing, columns: int) -> str:
    if x not in weight.activations:
        return f"activations of {x} do not multiply weights of {weight.format.name}; {', '.join(weight.activations)} do"
    return "bf16 activations need an even K" if x == "bf16" and columns % 2 else ""


def embedding(body: Function, inputs: Inputs) -> Answer:
    """embedding(w, ids), with a constant scale of the result folded in."""
    anchor = only(body, "embedding")
    if anchor is None:
        return None
    at, result, scale = positions(body), body.results[0], 1.0
    if result.op.name == "mul" and anchor in result.inputs:
        other = result.inputs[1 - result.inputs.index(anchor)]
        if other.op.name == "constant":
            result, scale = anchor, float(other.attrs["value"])
    w, ids = anchor.inputs
    if len(body.results) != 1 or result is not anchor or w not in at or ids not in at:
        return Refusal("a table lookup is claimed alone, with at most a constant factor after it")
    if at[w] not in inputs.constant or ids.dtype != "i32":
        return Refusal("the table must be constant and the ids i32")
    made = packing(w.dtype) if at[w] in inputs.panels else None
    if made is None and w.dtype not in ("f32", "bf16"):
        return Refusal(f"rows of {w.dtype} are read only from a weight that a matrix product shares")
    layout, seams = ("panel", {"core": made.core, **made.seams()}) if made else ("rows", {})
    used = kernel("embedding", weight=w.dtype, layout=layout, scale=scale, **seams)
    call = arguments(ids.tensor.elements, *w.shape, ("input", at[ids]), ("input", at[w]), ("output", 0))
    return Claim(used, call, {at[w]: layout}, what=f"{w.dtype} rows")


def norm(body: Function, inputs: Inputs) -> Answer:
    """rms_norm or layer_norm over the last axis, after a residual addition (two results: sum and norm), rounded or not."""
    found = [n for n in body.nodes if n.op.name in ("rms_norm", "layer_norm")]
    if not found:
        return None
    anchor, at = found[0], positions(body)
    x, *parameters = anchor.inputs
    if x.dtype != "f32" or not isinstance(x.shape[-1], int):
        return Refusal("a norm is claimed for f32 rows of constant length")
    if any(p not in at for p in parameters):
        return Refusal("the parameters of the norm must come from outside")
    residual = x.op.name == "add" and all(i in at and i.tensor == x.tensor for i in x.inputs)
    if not residual and x not in at:
        return Refusal("a norm is claimed of an input or of the sum of two inputs")
    last = next((r for r in body.results if r.op.name in ("quantize", "cast") and r.inputs[0] is anchor), anchor)
    if others := set(body.nodes) - {anchor, x, last, *body.params}:
        return Refusal(f"{', '.join(sorted(n.op.name for n in others))} next to a norm is not claimed")
    if not set(body.results) <= {last, x} or last not in body.results or len(set(body.results)) != len(body.results):
        return Refusal("the results must be the norm and the sum")
    if x in at and x in body.results:
        return Refusal("the results must be the norm and the sum")
    if last.dtype not in ("f32", "bf16", *ACTIVATIONS) or (last.dtype == "bf16" and x.shape[-1] % 2):
        return Refusal(f"a norm is not stored as {last.dtype}")
    used = kernel(
        "norm", kind="rms" if anchor.op.name == "rms_norm" else "layer", eps=float(anchor.attrs["eps"]),
        weight=len(parameters) > 0, bias=len(parameters) > 1, residual=residual, output=last.dtype, weight_offset=0.0,
    )  # fmt: skip
    width = x.shape[-1]
    total = ("output", body.results.index(x)) if x in body.results else ("scratch", x.tensor.bytes)
    first = at[x.inputs[0]] if residual else at[x]
    call = arguments(
        rows(x.tensor), 1, width, ("input", first), width,
        *((("input", at[x.inputs[1]]), total) if residual else ()),
        *(("input", at[p]) for p in parameters), ("output", body.results.index(last)), width,
    )  # fmt: skip
    what = ", ".join(w for w in ("with residual" * residual, f"to {last.dtype}" * (last is not anchor)) if w)
    return Claim(used, call, output_bytes=_stored(last, body.results.index(last)), what=what)


def _stored(result: Node, index: int) -> dict[int, SizeLike]:
    """The bytes of 8-bit activations in the layout of the kernels; nothing for plain element types."""
    if result.dtype not in ACTIVATIONS:
        return {}
    width = result.shape[-1]
    assert isinstance(width, int)
    return {index: rows(result.tensor) * q8_row_bytes(width, dtype(result.dtype).group)}


def quantize_rows(body: Function, inputs: Inputs) -> Answer:
    """quantize(x, q8) or cast(x, bf16) of f32 rows."""
    if len(body.results) != 1 or body.results[0].op.name not in ("quantize", "cast"):
        return None
    anchor = body.results[0]
    output = anchor.dtype
    x = anchor.inputs[0]
    if len(body.nodes) != 2 or x is not body.params[0] or x.dtype != "f32" or x.tensor.rank < 1:
        return None if anchor.op.name == "cast" else Refusal("activations are quantized alone, from f32")
    columns = x.shape[-1]
    if output == "bf16" and (not isinstance(columns, int) or columns % 2):
        return Refusal("rows of odd length are cast by a generated kernel")
    if output not in ("bf16", *ACTIVATIONS) or not isinstance(columns, int):
        return None
    used = kernel("quantize_rows", output=output)
    call = arguments(rows(x.tensor), columns, ("input", 0), ("output", 0))
    return Claim(used, call, output_bytes=_stored(anchor, 0))


def cache_write(body: Function, inputs: Inputs) -> Answer:
    """scatter(cache, slots, x, axis=1) in place: x [heads, rows, D], maybe rounded, into cache [heads, slots, D]."""
    anchor = only(body, "scatter")
    if anchor is None:
        return None
    at = positions(body)
    cache, slots, updates = anchor.inputs
    if anchor.attrs["axis"] != 1 or cache.tensor.rank != 3:
        return Refusal("a cache write is scatter(cache [heads, slots, D], slots, rows, axis=1)")
    heads, extent, width = cache.shape
    if reason := cache_unfit(cache.dtype, width):
        return Refusal(reason)
    chain = [anchor]
    if updates.op.name in ("cast", "quantize") and updates.dtype == cache.dtype:
        chain.append(updates)
        updates = updates.inputs[0]
    while updates not in at and "view" in updates.op.tags:
        chain.append(updates)
        updates = updates.inputs[0]
    if body.results != (anchor,) or set(body.nodes) - {*chain, cache, slots, updates} or not {cache, slots, updates} <= at.keys():
        return Refusal("a cache write is claimed alone")
    if updates.dtype != "f32" or slots.dtype != "i32":
        return Refusal("a cache write stores f32 rows by i32 slots")
    found = _places(tuple(n for n in chain if "view" in n.op.tags), (heads, slots.shape[0], width))
    if found is None:
        return Refusal("the rows of a cache write are [heads, rows, D], or a part of [rows, heads * D], as they lie in memory")
    used = kernel("cache_write", kv_heads=heads, head_dim=width, cache=cache.dtype)
    call = arguments(slots.shape[0], extent, ("input", at[updates]), *found, ("input", at[slots]), ("output", 0))
    return Claim(used, call, inplace=((0, at[cache]),), what=f"{cache.dtype} cache")


def _places(views: tuple[Node, ...], shape: tuple[SizeLike, ...]) -> tuple[SizeLike, SizeLike, SizeLike] | None:
    """Steps from row to row and from head to head, and the first number, of a value seen through `views` (the outermost first) as
    [heads, rows, D]: as it is, as [rows, heads, D], or as some columns of [rows, N]. Reshapes move nothing."""
    heads, count, width = shape
    moving = [v for v in views if v.op.name != "reshape"]
    if not moving:
        return width, count * width, 0
    swap, *rest = moving
    rank = swap.tensor.rank
    if swap.op.name != "transpose" or swap.attrs["axes"] != (*range(rank - 3), rank - 2, rank - 3, rank - 1):
        return None
    if swap.shape[-3:] != shape or any(e != 1 for e in swap.shape[:-3]):
        return None
    if not rest:
        return heads * width, width, 0
    part = rest[0]
    columns = part.op.name == "slice" and part.attrs["axis"] == part.tensor.rank - 1 and part.attrs["step"] == 1
    if len(rest) > 1 or not columns or part.shape[-1] != heads * width:
        return None
    return part.inputs[0].shape[-1], width, part.attrs["start"]


def cached_attention(body: Function, inputs: Inputs) -> Answer:
    """Attention of rows to a cache."""
    anchor = only(body, "cached_attention")
    if anchor is None:
        return None
    at = positions(body)
    if body.results != (anchor,) or any(i not in at for i in anchor.inputs):
        return Refusal("cached attention is claimed alone")
    q, k, v, table, sequence, position = anchor.inputs
    count, heads, width = q.shape
    if refusal := _head_fits(width, v.shape[2]):
        return refusal
    if q.dtype != "f32":
        return Refusal("cached attention takes f32 queries")
    if reason := cache_unfit(k.dtype, width) or cache_unfit(v.dtype, width):
        return Refusal(reason)
    a = anchor.attrs
    used = kernel(
        "attention", variant="cached", heads=heads, kv_heads=k.shape[0], head_dim=width, scale=float(a["scale"]),
        window=a["window"], soft_cap=a["softcap"], keys=k.dtype, values=v.dtype,
    )  # fmt: skip
    call = arguments(
        count, k.shape[1], table.shape[1], ("input", at[q]), heads * width, ("input", at[k]), ("input", at[v]),
        ("input", at[position]), ("input", at[sequence]), ("input", at[table]), ("output", 0),
    )  # fmt: skip
    return Claim(used, call, what=f"{k.dtype} cache" if k.dtype == v.dtype else f"{k.dtype} keys, {v.dtype} values")


def cache_unfit(name: str, width: SizeLike) -> str:
    """Why the kernels keep no cache of an element type with heads of that width; empty when they do."""
    kind = dtype(name)
    whole = {"f32": 8, "bf16": 8, "f16": 8, "int8": 16}.get(name, 32 if name.startswith("uint4_g") and kind.group % 16 == 0 else 0)
    if not whole:
        return f"no kernel keeps a cache of {name}; f32, bf16, f16, int8 and uint4 by groups of a multiple of 16 are kept"
    if not isinstance(width, int) or width % whole or (kind.group and width % kind.group):
        return f"a cache of {name} needs heads of a multiple of {max(whole, kind.group)}, not of {width}"
    return ""


def attention(body: Function, inputs: Inputs) -> Answer:
    """Attention over whole sequences; an additive f32 mask becomes the template's bias."""
    anchor = only(body, "attention")
    if anchor is None:
        return None
    at, a = positions(body), anchor.attrs
    if body.results != (anchor,) or any(i not in at for i in anchor.inputs):
        return Refusal("attention is claimed alone")
    q, k, v, *mask = anchor.inputs
    if refusal := _head_fits(q.shape[3], v.shape[3]):
        return refusal
    if any(i.dtype != "f32" for i in anchor.inputs):
        return Refusal("attention takes f32 inputs, and a mask as additive f32")
    if a["window"] is not None and not a["causal"]:
        return Refusal("a window without causality is not in the template")
    batch, heads, t, width = q.shape
    kv_heads, s = k.shape[1], k.shape[2]
    used = kernel(
        "attention", variant="full", heads=heads, kv_heads=kv_heads, head_dim=width, scale=float(a["scale"]),
        window=a["window"], soft_cap=a["softcap"], causal=a["causal"], bias=bool(mask), causal_offset="S - T",
    )  # fmt: skip
    strides: list[SizeLike] = []
    for h, n in ((heads, t), (kv_heads, s), (kv_heads, s), (heads, t)):
        strides += [h * n * width, n * width, width]
    call = arguments(
        batch, t, s, ("input", at[q]), ("input", at[k]), ("input", at[v]), ("output", 0), ("sizes", tuple(strides))
    )  # fmt: skip
    for m in mask:
        call += arguments(("input", at[m]), ("sizes", _broadcast_strides(m.shape)))
    return Claim(used, call, what="causal" if a["causal"] else "")


def _head_fits(width: SizeLike, value_width: SizeLike) -> Refusal | None:
    if isinstance(width, int) and width == value_width and width <= 256 and width % 8 == 0:
        return None
    return Refusal(f"heads of {width} (values {value_width}) are not one multiple of 8 up to 256")


def _broadcast_strides(shape: tuple[SizeLike, ...]) -> tuple[SizeLike, ...]:
    strides: list[SizeLike] = []
    step: SizeLike = 1
    for extent in reversed(shape):
        strides.insert(0, 0 if extent == 1 else step)
        step = step * extent
    return tuple(strides)


NEURONS = {"top_neurons": "top", "linear_at": "at", "linear_from": "from"}


def neurons(body: Function, inputs: Inputs) -> Answer:
    """The choice of neurons, and products with some rows of a weight."""
    anchor = next((n for n in body.nodes if n.op.name in NEURONS), None)
    if anchor is None:
        return None
    at, x = positions(body), anchor.inputs[0]
    if body.results != (anchor,) or any(i not in at for i in anchor.inputs):
        return Refusal(f"{anchor.op.name} is claimed alone")
    if x.dtype != "f32":
        return Refusal(f"{anchor.op.name} takes f32 values")
    what, count = NEURONS[anchor.op.name], anchor.inputs[-1].shape[-1]
    if what == "top":
        call = arguments(rows(x.tensor), x.shape[-1], 0, anchor.shape[-1], ("input", at[x]), ("output", 0))
        return Claim(kernel("neurons", what=what, weight="f32"), call, what=f"{anchor.shape[-1]} of {x.shape[-1]}")
    w, places = anchor.inputs[1:]
    if at[w] not in inputs.constant or w.dtype not in by_rows.NAMES:
        return Refusal(f"some rows are read of a constant weight of {', '.join(by_rows.NAMES)}, not of {w.dtype}")
    call = arguments(
        rows(x.tensor), *w.shape, count, ("input", at[x]), ("input", at[w]), ("input", at[places]), ("output", 0)
    )  # fmt: skip
    return Claim(
        kernel("neurons", what=what, weight=w.dtype), call, {at[w]: "rows"}, what=f"{count} of {w.shape[0]} {w.dtype} rows"
    )


MATCHERS = (linear, embedding, norm, cached_attention, attention, cache_write, quantize_rows, neurons)
