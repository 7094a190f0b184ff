"""Torch's symbolic integers (sympy expressions) as sizes of the IR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import ExportedProgram
from torch.utils._sympy.functions import CleanDiv, FloorDiv, IntTrueDiv, Max, Min, Mod, PythonMod, ToFloat

from stemma.frontend.aten import Unsupported, to, torch_dtype
from stemma.ir import Node, Size, SizeLike, Tensor, ops, size


class Sizes:
    """Converts sizes of one exported program. `symbols` names torch's symbols; others get a dimension of their own name."""

    def __init__(self, symbols: Mapping[str, Size], program: ExportedProgram) -> None:
        self._symbols: dict[str, SizeLike] = dict(symbols)
        self._ranges = {str(s): r for s, r in program.range_constraints.items()}

    def size(self, value: Any) -> SizeLike:
        """A size from an int, a torch SymInt or a sympy expression; Unsupported when it is not size arithmetic."""
        if isinstance(value, int):
            return value
        return self._convert(value.node.expr if isinstance(value, torch.SymInt) else value)

    def tensor(self, value: torch.Tensor) -> Tensor:
        """The IR type of a (fake) tensor."""
        return Tensor(torch_dtype(value.dtype), tuple(self.size(s) for s in value.shape))

    def number(self, value: Any, dtype: str = "f32") -> Node:
        """A symbolic float, such as a mean's divisor, as a scalar node."""
        expression = sympy.sympify(value.node.expr)
        if isinstance(expression, ToFloat):
            return to(ops.size_value(size=self._convert(expression.args[0])), dtype)
        if isinstance(expression, IntTrueDiv):
            a, b = (to(ops.size_value(size=self._convert(x)), dtype) for x in expression.args)
            return ops.div(a, b)
        raise Unsupported(f"the number {expression}, computed from sizes")

    def _symbol(self, name: str) -> SizeLike:
        if name not in self._symbols:
            known = self._ranges.get(name)
            if known is None:
                raise Unsupported(f"the size {name}, which depends on the values of tensors")
            high = int(known.upper) if known.upper.is_finite and known.upper < size.UNBOUNDED else size.UNBOUNDED
            self._symbols[name] = size.dim(name, max(0, int(known.lower)), high)
        return self._symbols[name]

    def _convert(self, expression: Any) -> SizeLike:
        if isinstance(expression, (int, sympy.Integer)):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            return self._symbol(str(expression))
        parts = [self._convert(a) for a in expression.args]
        if isinstance(expression, sympy.Add):
            total: SizeLike = 0
            for part in parts:
                total = total + part
            return total
        if isinstance(expression, sympy.Mul):
            return size.product(parts)
        if isinstance(expression, sympy.Pow) and isinstance(parts[1], int) and parts[1] > 0:
            return size.product([parts[0]] * parts[1])
        if isinstance(expression, (FloorDiv, CleanDiv)):
            return size.floordiv(parts[0], parts[1])
        if isinstance(expression, (Mod, PythonMod)):
            return parts[0] - size.floordiv(parts[0], parts[1]) * parts[1]
        if isinstance(expression, (Max, Min, sympy.Max, sympy.Min)):
            choose = size.maximum if isinstance(expression, (Max, sympy.Max)) else size.minimum
            result = parts[0]
            for part in parts[1:]:
                result = choose(result, part)
            return result
        raise Unsupported(f"the size {expression}")
