"""Linear weights that GPTQ and AWQ checkpoints hold: the same codes, scales and zero points in the IR's uniform formats.

GPTQ (AutoGPTQ, GPTQModel)  qweight i32 [K * bits / 32, N], qzeros i32 [groups, N * bits / 32], scales [groups, N], g_idx [K]
AWQ (AutoAWQ's "gemm")      qweight i32 [K, N / 8], qzeros i32 [groups, N / 8], scales [groups, N]; outputs 0 2 4 6 1 3 5 7 a word

A weight is (code - zero point) * scale. Nothing is rounded: a zero point in the middle of the codes gives int{bits}_gG, others
uint{bits}_gG. A file's group of several G columns becomes several groups with one scale. GPTQ with `desc_act` spreads a group over
the whole row: columns are stored sorted by group, and the input of the linear is brought into the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stemma.frontend.checkpoint import StoredTensor
from stemma.frontend.safetensors import Entry
from stemma.ir import Array, CheckpointError, Module, Node, Quantized, Tensor, UnsupportedError, WeightStore, ops

GROUPS = (128, 64, 32)
"""Group sizes that kernels take, best first."""
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Packed:
    """A quantized linear weight [N, K] of a file. zero_offset: what is added to stored zero points (modulo 2^bits)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int
    awq: bool
    qweight: Entry
    qzeros: Entry
    scales: Entry
    zero_offset: int
    order: Array | None  # i32 [K]: the file's column that is stored at each place; None: as in the file
    group_of: Array  # the file's group of each stored group

    @property
    def path(self) -> Path:
        return self.qweight.path

    @property
    def bytes(self) -> int:
        return self.qweight.bytes + self.qzeros.bytes + self.scales.bytes

    @property
    def type(self) -> Tensor:
        return Tensor(self.dtype, self.shape)

    def load(self) -> Quantized:
        """All rows; CheckpointError for scales that are not finite, or do not fit f16."""
        return self[0 : self.shape[0]]

    def rows(self) -> Packed:
        return self

    def __getitem__(self, part: slice) -> Quantized:
        start, stop, _ = part.indices(self.shape[0])
        codes = self.codes(self.qweight, start, stop, 0)[: self.shape[1]]
        stored = np.ascontiguousarray((codes if self.order is None else codes[self.order]).T)
        scales = self._scales(start, stop)[self.group_of].T
        if self.dtype.startswith("u"):
            zeros = self.zeros(start, stop)[self.group_of].T
            return Quantized(self.dtype, {"codes": stored.astype(np.int8), "scales": _own(scales), "zeros": _own(zeros)})
        codes = (stored.astype(np.int16) - 2 ** (self.bits - 1)).astype(np.int8)
        return Quantized(self.dtype, {"codes": codes, "scales": _own(scales)})

    def zeros(self, start: int, stop: int) -> Array:
        """Zero points of outputs start..stop, float32 [groups, outputs]."""
        stored = self.codes(self.qzeros, start, stop, 1).astype(np.int32)
        return np.asarray((stored + self.zero_offset) % 2**self.bits, np.float32)

    def codes(self, entry: Entry, start: int, stop: int, axis: int) -> Array:
        """uint8 codes of outputs start..stop, packed along `axis`: [places along K or groups, outputs]."""
        if axis == 0 and not self.awq:
            return _unpack(entry.cells(start, stop).T, self.bits).T
        period = 32  # outputs whose codes end with a word, for any number of bits
        first, last = start // period * period, min(-(-stop // period) * period, self.shape[0])
        words = entry.cells(first * self.bits // 32, -(-last * self.bits // 32))
        codes = _unpack(words, self.bits)
        if self.awq:
            eights = codes.reshape(len(codes), codes.shape[1] // 8, 8)
            codes = eights[:, :, np.argsort(_AWQ_ORDER)].reshape(codes.shape)
        return codes[:, start - first : stop - first]

    def _scales(self, start: int, stop: int) -> Array:
        values = self.scales.cells(start, stop)
        if self.scales.dtype == "bf16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.astype(np.float32)
        with np.errstate(over="ignore"):
            held = values.astype(np.float16).astype(np.float32)
        if not np.isfinite(held).all() or not np.array_equal(held, values):
            raise CheckpointError(
                f"The scales {self.scales.name!r} in {self.path} hold values that are not finite, or that f16 cannot hold exactly. "
                "The file is damaged, or was not made for f16 kernels."
            )
        return held


def _own(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32)


def _unpack(words: Array, bits: int) -> Array:
    """uint8 [.., count] from i32 words [.., count * bits / 32]: a stream of bits, lowest first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    if bits == 3:
        stream = np.unpackbits(raw, axis=-1, bitorder="little")
        triples = stream.reshape(*raw.shape[:-1], stream.shape[-1] // 3, 3)
        return np.asarray(triples[..., 0] | triples[..., 1] << 1 | triples[..., 2] << 2, np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = raw[..., None] >> shifts & np.uint8(2**bits - 1)
    return np.asarray(codes.reshape(*raw.shape[:-1], raw.shape[-1] * len(shifts)), np.uint8)


def unpack_tensors(
    tensors: Mapping[str, Entry], settings: Mapping[str, Any], folder: Path
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a checkpoint with its `quantization_config`: one `Packed` "x.weight" in place of each x.qweight, x.qzeros, ...

    Also notes on what the file gets wrong. CheckpointError for methods, layouts, bits and groups that are not known or have no
    kernel.
    """
    method = str(settings.get("quant_method", "an unknown method")).lower()
    layout = _layout(method, settings, folder)
    names = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    if not names:
        raise CheckpointError(f"{folder / 'config.json'} says that the weights are quantized by {method}, but none has a qweight.")
    taken = {f"{name}.{part}" for name in names for part in _PARTS}
    found: dict[str, StoredTensor] = {n: e for n, e in tensors.items() if n not in taken}
    relabelled = []
    for name in names:
        packed = _packed(name, tensors, method, layout, settings)
        if packed.zero_offset != int(layout == "gptq"):
            relabelled.append(name)
        found[packed.name] = packed
    if not relabelled:
        return found, []
    return found, [
        f"{folder / 'config.json'} names the checkpoint format {layout!r}, but says that zero points are in the middle, which "
        f"those of {relabelled[0]!r} are only in the other format ({len(relabelled)} weights): they were read as that."
    ]


def _layout(method: str, settings: Mapping[str, Any], folder: Path) -> str:
    """Which of the known layouts: "gptq", "gptq_v2" or "gemm"."""
    if method not in _BITS:
        raise CheckpointError(
            f"{folder} is quantized by {method}, which is not read. Known: gptq, awq and GGUF files. Use one of those, or the "
            "original checkpoint in bfloat16 or float32; Stemma quantizes it with a pass."
        )
    key, known = ("checkpoint_format", ("gptq", "gptq_v2")) if method == "gptq" else ("version", ("gemm",))
    layout = str(settings.get(key) or known[0]).lower()
    if layout not in known:
        raise CheckpointError(
            f"{folder} is quantized by {method} in the layout {layout!r} ({key}), which is not read. Known: {', '.join(known)}. "
            "Convert it with the library that made it, or use the original checkpoint."
        )
    bits = settings.get("bits")
    if bits not in _BITS[method]:
        raise CheckpointError(
            f"{folder} is quantized by {method} to bits={bits!r}; {', '.join(map(str, _BITS[method]))} are read. Use another "
            "quantized checkpoint, or the original one."
        )
    return layout


def _packed(name: str, tensors: Mapping[str, Entry], method: str, layout: str, settings: Mapping[str, Any]) -> Packed:
    """The weight of one linear. Bits and groups are those of its tensors, which `dynamic` settings may have chosen."""
    parts = _parts(name, tensors, method)
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    groups, outputs = scales.shape
    awq = method == "awq"
    index = parts.get("g_idx")
    bits = int(settings["bits"])
    if awq:
        columns = qweight.shape[0]
    elif index is None:
        columns = qweight.shape[0] * 32 // bits
    else:
        columns = index.shape[0]
        bits = qweight.shape[0] * 32 // max(1, columns)
    codes = (columns, outputs // 8) if awq else (columns * bits // 32, outputs)
    fits = bits in _BITS[method] and qweight.shape == codes and qzeros.shape == (groups, -(-outputs * bits // 32))
    if not fits or not groups or not columns or outputs * bits % 32 or (not awq and columns * bits % 32):
        raise CheckpointError(
            f"The parts of the {method} weight {name!r} in {qweight.path} do not fit each other: qweight {qweight.shape}, qzeros "
            f"{qzeros.shape}, scales {scales.shape}{'' if index is None else f', g_idx {index.shape}'}, {bits} bits. The file is "
            "damaged, or in another layout than its config.json says."
        )
    group_of_column = _groups(name, index, columns, groups)
    order = np.argsort(group_of_column, kind="stable").astype(np.int32)
    counts = np.bincount(group_of_column, minlength=groups)
    group = next((g for g in GROUPS if not (counts % g).any()), 0)
    if not group:
        raise CheckpointError(
            f"The weight {name!r} in {qweight.path} has groups of {sorted(set(map(int, counts)))} columns, which no kernel takes: "
            f"they must be multiples of {GROUPS[-1]}. Quantize the original checkpoint again with a larger group_size."
        )
    packed = Packed(
        f"{name}.weight", "", (outputs, columns), bits, awq, qweight, qzeros, scales, int(layout == "gptq"),
        None if (np.diff(order) == 1).all() else order, np.repeat(np.arange(groups), counts // group),
    )  # fmt: skip
    return _typed(packed, group, bool(settings.get("sym")))


def _parts(name: str, tensors: Mapping[str, Entry], method: str) -> dict[str, Entry]:
    """The tensors of one weight; CheckpointError when one is missing or has another element type or number of axes."""
    parts = {p: tensors[f"{name}.{p}"] for p in _PARTS if f"{name}.{p}" in tensors}
    wanted = {
        "qweight": (("i32",), 2),
        "qzeros": (("i32",), 2),
        "scales": (("f16", "bf16", "f32"), 2),
        "g_idx": (("i32", "i64"), 1),
    }
    for part, (kinds, rank) in wanted.items():
        if part not in parts:
            if part != "g_idx":
                raise CheckpointError(f"The {method} weight {name!r} in {parts['qweight'].path} has no {part}. A file is missing.")
        elif parts[part].dtype not in kinds or len(parts[part].shape) != rank:
            raise CheckpointError(
                f"The tensor {parts[part].name!r} in {parts[part].path} is {parts[part].dtype}{list(parts[part].shape)}; {method} "
                f"weights are read with {' or '.join(kinds)} of {rank} axes there."
            )
    return parts


def _groups(name: str, index: Entry | None, columns: int, groups: int) -> Array:
    """The group of each column."""
    if index is None:
        return np.asarray(np.arange(columns) // -(-columns // groups))
    found = index.load().astype(np.int64)
    if found.min() < 0 or found.max() >= groups:
        raise CheckpointError(
            f"The tensor {index.name!r} in {index.path} names groups {int(found.min())}..{int(found.max())}, but {name!r} has "
            f"{groups}. The file is damaged."
        )
    return np.asarray(found)


def _typed(packed: Packed, group: int, symmetric: bool) -> Packed:
    """With its element type, which depends on the zero points."""
    middle = 2 ** (packed.bits - 1)
    zeros = packed.zeros(0, packed.shape[0])
    if symmetric and not (zeros == middle).all():  # some writers store the other format's zero points under this one's name
        other = replace(packed, zero_offset=1 - packed.zero_offset)
        if not packed.awq and (other.zeros(0, packed.shape[0]) == middle).all():
            packed, zeros = other, np.full_like(zeros, middle)
    if (zeros == middle).all():
        return replace(packed, dtype=f"int{packed.bits}_g{group}")
    if packed.bits == 8:
        raise CheckpointError(
            f"The weight {packed.name!r} in {packed.path} has 8 bits and zero points that are not in the middle, for which there "
            "is no kernel. Quantize the original checkpoint again with sym=true, or use it as it is."
        )
    return replace(packed, dtype=f"uint{packed.bits}_g{group}")


def is_padding(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor may be left out when the model has no place for it: a bias of zeros, which some writers add to linears."""
    weight = tensors.get(f"{name.removesuffix('.bias')}.weight")
    return name.endswith(".bias") and isinstance(weight, Packed) and not tensors[name].load().any()


def order_inputs(module: Module, weights: WeightStore, stored: Mapping[str, StoredTensor]) -> Module:
    """The module with the inputs of linears brought into the order in which their weights' columns are stored.

    linear(x, dequantize(w)) -> linear(take(x, order), dequantize(w)). Weights of one order share it, so that linears of one input
    still do. stored: by the names of the module. UnsupportedError when such a weight is read by something else than a linear.
    """
    orders: dict[str, Node] = {}
    known: dict[bytes, Node] = {}
    for name, type in module.weights().items():
        entry = stored.get(name)
        if isinstance(entry, Packed) and entry.order is not None:
            key = entry.order.tobytes()
            if key not in known:
                kind = Tensor("i32", (type.shape[1],))
                weights.add(f"{name}.order", kind, partial(np.asarray, entry.order))
                known[key] = ops.weight(name=f"{name}.order", type=kind)
            orders[name] = known[key]
    if not orders:
        return module

    def ordered(node: Node) -> Node | None:
        inner = node.inputs[0] if node.op.name == "dequantize" else None
        return orders.get(inner.attrs["name"]) if inner is not None and inner.op.name == "weight" else None

    def replace(node: Node, inputs: tuple[Node, ...]) -> Node:
        found = [ordered(i) for i in node.inputs]
        if not any(found):
            return node.rebuild(*inputs)
        order = found[1] if node.op.name == "linear" else None
        if order is None or found[0] is not None:
            raise UnsupportedError(
                f"A weight whose columns GPTQ sorted (desc_act) is read by {node.op.name!r}; only linears are known to be. Use a "
                "checkpoint that was quantized with desc_act=false."
            )
        taken = ops.take(inputs[0], order, axis=inputs[0].tensor.rank - 1)
        return node.rebuild(taken, *inputs[1:])

    return module.map(lambda f: f.rewrite(replace))
