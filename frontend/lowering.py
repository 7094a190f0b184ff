"""Walks an exported graph and calls the lowering of every operator, collecting what has none."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stemma.frontend.aten import LOWERINGS, Call, Unsupported
from stemma.frontend.sizes import Sizes
from stemma.ir import Node, Size, SizeLike, Tensor, UnsupportedError, ops, size, stamp
from stemma.ir.errors import TypeMismatch

_DROPPED = ("aten._assert", "aten.sym_constrain", "aten._functional_assert")
_DATA_DEPENDENT = re.compile(r"nonzero|unique|masked_select|item|bincount|multinomial|rand|bernoulli")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ([^\n]+)\n\s*([^\n]*)')
_TORCH = str(Path(torch.__file__).parent)


def is_dropped(node: torch.fx.Node) -> bool:
    """Assertions about sizes and types: the IR's types already say it."""
    return str(node.target).startswith(_DROPPED)


def is_region(node: torch.fx.Node) -> bool:
    """A call of a graph inside the graph, made for torch.no_grad() and torch.autocast(enabled=False) blocks."""
    return str(node.target) in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def source_line(node: torch.fx.Node) -> str:
    """The innermost line of the model's own source, "modeling_llama.py:66 in forward: return self.weight * x"."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_TORCH) and not f[0].startswith("<")] or frames
    if not own:
        return ""
    path, line, function, code = own[-1]
    return f"{Path(path).name}:{line} in {function}: {code.strip()[:80]}"


class Lowerer:
    """Lowers the graphs of one exported program."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._problems: dict[tuple[str, str], tuple[int, str]] = {}

    def run(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
        """The values of the graph's outputs for the given placeholder values."""
        env: dict[torch.fx.Node, Any] = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = getattr(module, str(node.target))
            elif node.op == "output":
                outputs = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
                return [self._argument(a, env) for a in outputs]
            elif not is_dropped(node):
                with stamp(line=source_line(node)):
                    env[node] = self._call(node, env)
        return []

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
        if node.target is operator.getitem:
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        value = node.meta.get("val")
        if isinstance(value, (int, float, bool)):
            return value
        try:
            if isinstance(value, torch.SymInt):
                return self.sizes.size(value)
            if isinstance(value, torch.SymFloat):
                return self.sizes.number(value)
            if isinstance(value, torch.SymBool):
                return None  # read only by assertions
            if is_region(node):
                return self._region(node, env)
            return self._operator(node, env)
        except (Unsupported, TypeMismatch) as error:
            return self._problem(node, str(error))

    def _argument(self, value: Any, env: dict[torch.fx.Node, Any]) -> Any:
        if isinstance(value, torch.fx.Node):
            return env.get(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(v, env) for v in value]
        return value

    def _operator(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
        name = str(node.target)
        if name not in LOWERINGS:
            hint = (
                "its result depends on the values of its input, which a static graph cannot follow; replace it in the model"
                if _DATA_DEPENDENT.search(name)
                else "write it with supported operators in the model, or add a lowering with @lower"
            )
            raise Unsupported(hint)
        call = Call(name, tuple(self._types(node)))
        args = [self._argument(a, env) for a in node.args]
        named = {k: self._argument(v, env) for k, v in node.kwargs.items()}
        result = LOWERINGS[name](call, *args, **named)
        nodes = result if isinstance(result, list) else [result]
        for made, expected in zip(nodes, call.results, strict=False):
            self._check(made, expected)
        return result

    def _types(self, node: torch.fx.Node) -> list[Tensor]:
        value = node.meta["val"]
        values = value if isinstance(value, (tuple, list)) else [value]
        return [self.sizes.tensor(v) for v in values if isinstance(v, torch.Tensor)]

    def _check(self, made: Node, expected: Tensor) -> None:
        """Unsupported when a lowering built another type than torch inferred."""
        if made.tensor == expected:
            return
        same = made.dtype == expected.dtype and len(made.shape) == expected.rank
        if not (same and all(map(_equal, made.shape, expected.shape))):
            raise Unsupported(f"its lowering gives {made.tensor!r} where torch gives {expected!r}")

    def _region(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> list[Any]:
        args = [self._argument(a, env) for a in node.args]
        index = next(i for i, a in enumerate(args) if isinstance(a, torch.fx.GraphModule))
        if "autocast" in str(node.target) and args[2]:
            raise Unsupported("arithmetic under torch.autocast; trace the model without it")
        return self.run(args[index], args[index + 1 :])

    def _problem(self, node: torch.fx.Node, reason: str) -> Any:
        """Note what is not supported, and go on with a stand-in so that the rest of the graph is examined too."""
        key = (str(node.target), reason)
        count, line = self._problems.get(key, (0, source_line(node)))
        self._problems[key] = (count + 1, line)
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else [value]
        stand_ins = [self._stand_in(f"unsupported_{node.name}_{i}", v) for i, v in enumerate(values)]
        return stand_ins if isinstance(value, (tuple, list)) else stand_ins[0]

    def _stand_in(self, name: str, value: object) -> Node | None:
        try:
            return ops.param(name=name, type=self.sizes.tensor(value)) if isinstance(value, torch.Tensor) else None
        except Unsupported:
            return None

    def raise_problems(self, model: str) -> None:
        """Raise one UnsupportedError with everything that was met, if anything was."""
        if not self._problems:
            return
        lines = []
        for (name, reason), (count, line) in self._problems.items():
            times = "once" if count == 1 else f"{count} times"
            lines.append(f"{name} ({times}{f', first at {line}' if line else ''}): {reason}")
        raise UnsupportedError(f"{model} uses {len(lines)} operators that cannot be lowered. " + "; ".join(lines) + ".")


def _equal(a: SizeLike, b: SizeLike) -> bool:
    """Whether two sizes agree: the same object, or equal for a spread of values of their dimensions."""
    if a == b:
        return True
    names = sorted(size.dims(a) | size.dims(b), key=lambda d: d.name)
    for step in (0, 1, 2, 5, 17):
        values = {d.name: min(d.hi, d.lo + step * (i + 1)) for i, d in enumerate(names)}
        if size.evaluate(a, values) != size.evaluate(b, values):
            return False
    return bool(names) or not isinstance(a, Size)
