"""The element types of the IR: plain ones, and the formats of this folder. A new format is a file here and a line in FAMILIES."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from stemma.ir.errors import TypeMismatch
from stemma.ir.formats import codebook, group_sparse, lookup, two_four, two_level, uniform
from stemma.ir.formats.base import Array, DType, Format, Quantized


class Family(Protocol):
    """A file of formats. NAMES: for error messages."""

    NAMES: str

    def parse(self, name: str) -> Format | None:
        """The format called `name`, or None when it is not of this family."""


FAMILIES: tuple[Family, ...] = (uniform, two_level, codebook, group_sparse, two_four, lookup)

_PLAIN = {
    d.name: d
    for d in (
        DType("f64", "float", 64), DType("f32", "float", 32), DType("f16", "float", 16), DType("bf16", "float", 16),
        DType("i64", "int", 64), DType("i32", "int", 32), DType("i16", "int", 16), DType("i8", "int", 8),
        DType("u8", "int", 8), DType("bool", "bool", 8),
    )
}  # fmt: skip


@lru_cache(maxsize=None)
def dtype(name: str) -> DType:
    """The element type called `name`; TypeMismatch when there is none."""
    if name in _PLAIN:
        return _PLAIN[name]
    for family in FAMILIES:
        if found := family.parse(name):
            return found
    raise TypeMismatch(f"There is no element type {name!r}. Known: {', '.join(_PLAIN)}, {', '.join(f.NAMES for f in FAMILIES)}.")


def format_of(name: str) -> Format:
    """The format called `name`; TypeMismatch when there is none, or when it is a plain element type."""
    found = dtype(name)
    if not isinstance(found, Format):
        raise TypeMismatch(f"{name} is not a quantized element type.")
    return found


def quantize_array(values: Array, name: str) -> Quantized:
    """Float values [.., K] rounded to nearest in the format `name` (see `Format.quantize`)."""
    return format_of(name).quantize(values)


__all__ = ["FAMILIES", "Array", "DType", "Format", "Quantized", "dtype", "format_of", "quantize_array"]
