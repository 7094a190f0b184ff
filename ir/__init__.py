"""The intermediate representation: sizes, types, nodes, operations, functions, modules, text, verifier and interpreter."""

from stemma.ir import ops, size
from stemma.ir.errors import (
    BudgetError,
    CheckpointError,
    CompileError,
    ParseError,
    PassError,
    StemmaError,
    TraceError,
    TypeMismatch,
    UnsupportedError,
    VerifyError,
)  # fmt: skip
from stemma.ir.formats import Array, DType, Format, Quantized, dtype, format_of, quantize_array
from stemma.ir.function import Function, Module, topological, walk
from stemma.ir.interpret import Context, World, evaluate_constant, interpret
from stemma.ir.merge import MAIN, merge_models
from stemma.ir.node import OPS, Cost, Node, Op, Origin, stamp
from stemma.ir.rows import Rows
from stemma.ir.size import Dim, Size, SizeLike, dim
from stemma.ir.text import parse_module, print_module
from stemma.ir.types import State, Tensor, Tuple, Type, tensors_of
from stemma.ir.verify import LEVELS, constant_nodes, verify
from stemma.ir.weights import WeightStore

__all__ = [
    "LEVELS", "MAIN", "OPS", "Array", "BudgetError", "CheckpointError", "CompileError", "Context", "Cost", "DType", "Dim",
    "Format", "Function", "Module", "Node", "Op", "Origin", "ParseError", "PassError", "Quantized", "Rows", "Size", "SizeLike",
    "State", "StemmaError", "Tensor", "TraceError", "Tuple", "Type", "TypeMismatch", "UnsupportedError", "VerifyError",
    "WeightStore", "World", "constant_nodes", "dim", "dtype", "evaluate_constant", "format_of", "interpret", "merge_models",
    "ops", "parse_module", "print_module", "quantize_array", "size", "stamp", "tensors_of", "topological", "verify", "walk",
]  # fmt: skip
