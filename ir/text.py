"""The text form of a module: valid Python that can be read back to the very same object.

    # stemma ir 1
    rows = dim("rows", 1, 512)
    properties(kind="causal_lm")

    def step(tokens: i32[rows]):
        v0 = embedding(weight("embed", bf16[4096, 256]), tokens)  # f32[rows, 256]
        return {"hidden": v0}

Regions are nested functions. Comments carry types and origins and are not read. docs/grammar.md has the grammar.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from stemma.ir import size
from stemma.ir.errors import ParseError, StemmaError
from stemma.ir.function import Function, Module
from stemma.ir.node import OPS, Node
from stemma.ir.size import SizeLike
from stemma.ir.types import State, Tensor, Tuple, Type

HEADER = "# stemma ir 1"


def print_module(module: Module, note: str = "") -> str:
    """The text of a module; `note` ("by fold, 3.1 ms") goes into the header comment."""
    lines = [HEADER + (f"  ({note})" if note else "")]
    found: dict[str, size.Dim] = {}
    for function in module:
        for d in _all_dims(function):
            if found.setdefault(d.name, d) is not d:
                raise StemmaError(f"The module uses two dimensions called {d.name!r} with different ranges.")
    lines += [f'{d.name} = dim("{d.name}", {d.lo}, {d.hi})' for d in found.values()]
    if module.properties:
        lines.append("properties(" + ", ".join(f"{k}={_literal(v)}" for k, v in module.properties.items()) + ")")
    for function in module:
        lines += ["", *_function(function, function.name, "", "v")]
    return "\n".join(lines) + "\n"


def _all_dims(function: Function) -> list[size.Dim]:
    found = dict.fromkeys(function.dims())
    for node in function.nodes:
        for value in node.attrs.values():
            if isinstance(value, Function):
                found.update(dict.fromkeys(_all_dims(value)))
            for s in value if isinstance(value, tuple) else (value,):
                if isinstance(s, size.Size):
                    found.update(dict.fromkeys(sorted(size.dims(s), key=str)))
    return list(found)


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
    return str(value) if isinstance(value, size.Size) else repr(value)


def _function(function: Function, name: str, indent: str, prefix: str) -> list[str]:
    params = ", ".join(f"{p.attrs['name']}: {p.type!r}" for p in function.params)
    lines = [f"{indent}def {name}({params}):"]
    inner = indent + "    "
    names: dict[Node, str] = {p: p.attrs["name"] for p in function.params}
    taken = set(names.values())
    while any(t.startswith(prefix) and t[len(prefix) :].isdigit() for t in taken):
        prefix += "_"
    count = 0
    for node in function.nodes:
        if node in names:
            continue
        attrs = []
        for key, value in node.attrs.items():
            if isinstance(value, Function):
                region = f"{prefix}{count}_{key}"
                lines += _function(value, region, inner, prefix)
                attrs.append(f"{key}={region}")
            elif value != node.op.defaults[key] or type(value) is not type(node.op.defaults[key]):
                attrs.append(f"{key}={_literal(value)}")
        call = f"{node.op.name}({', '.join([*(names[i] for i in node.inputs), *attrs])})"
        if "leaf" in node.op.tags:
            names[node] = call
            continue
        names[node] = f"{prefix}{count}"
        count += 1
        origin = "  ".join(x for x in (node.origin.by and f"by {node.origin.by}", node.origin.line) if x)
        lines.append(f"{inner}{names[node]} = {call}  # {node.type!r}" + (f"  {origin}" if origin else ""))
    results = ", ".join(f'"{n}": {names[r]}' for n, r in zip(function.result_names, function.results, strict=True))
    lines.append(f"{inner}return {{{results}}}")
    return lines


def parse_module(text: str) -> Module:
    """Read the text form; ParseError names the line of the first thing that is wrong. Nothing in the text is executed."""
    if not text.startswith(HEADER):
        raise ParseError(f"This is not the text of a module: its first line must start with {HEADER!r}.")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ParseError(f"The module text is not valid Python: {error}.") from None
    sizes: dict[str, SizeLike] = {}
    properties: dict[str, Any] = {}
    functions: list[Function] = []
    for statement in tree.body:
        try:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="dim"), args=args)):
                    sizes[name] = size.dim(*(ast.literal_eval(a) for a in args))
                case ast.Expr(value=ast.Call(func=ast.Name(id="properties"), keywords=keywords)):
                    properties = {k.arg or "": _Reader(sizes).value(k.value) for k in keywords}
                case ast.FunctionDef():
                    functions.append(_Reader(sizes).function(statement, statement.name))
                case _:
                    raise ParseError("expected a dim, properties or a function")
        except (StemmaError, ValueError, KeyError, TypeError, IndexError) as error:
            where = getattr(error, "lineno", statement.lineno)
            raise ParseError(f"Line {where} of the module text: {error}.") from error
    return Module(functions, properties)


class _Reader:
    """Reads the functions of one module text."""

    def __init__(self, sizes: Mapping[str, SizeLike]) -> None:
        self.sizes = sizes

    def function(self, tree: ast.FunctionDef, name: str) -> Function:
        params = []
        env: dict[str, Any] = {}
        for argument in tree.args.args:
            if argument.annotation is None:
                raise ParseError(f"the parameter {argument.arg!r} has no type")
            env[argument.arg] = OPS["param"](name=argument.arg, type=self.type(argument.annotation))
            params.append(env[argument.arg])
        for statement in tree.body:
            try:
                match statement:
                    case ast.FunctionDef():
                        env[statement.name] = self.function(statement, "")
                    case ast.Assign(targets=[ast.Name(id=target)], value=value):
                        env[target] = self.value(value, env)
                    case ast.Return(value=ast.Dict(keys=keys, values=values)):
                        results = [(ast.literal_eval(k), self.value(v, env)) for k, v in zip(keys, values) if k]
                        return Function(name, params, results)
                    case _:
                        raise ParseError("expected an assignment, a region or a return")
            except (StemmaError, ValueError, KeyError, TypeError) as error:
                if not hasattr(error, "lineno"):
                    error.lineno = statement.lineno  # type: ignore[union-attr]
                raise
        raise ParseError(f"the function {name!r} does not return a dictionary of results")

    def type(self, tree: ast.expr) -> Type:
        match tree:
            case ast.Subscript(value=ast.Name(id="State"), slice=items):
                kind, *args = ast.literal_eval(items) if isinstance(items, ast.Tuple) else (ast.literal_eval(items),)
                return State(kind, tuple(args))
            case ast.Subscript(value=ast.Name(id="Tuple"), slice=items):
                parts = items.elts if isinstance(items, ast.Tuple) else [items]
                return Tuple(tuple(t for t in map(self.type, parts) if not isinstance(t, Tuple)))
            case ast.Subscript(value=ast.Name(id=name), slice=shape):
                parts = shape.elts if isinstance(shape, ast.Tuple) else [shape]
                return Tensor(name, tuple(size.from_ast(s, self.sizes) for s in parts))
        raise ParseError(f"{ast.unparse(tree)!r} is not a type")

    def value(self, tree: ast.expr, env: Mapping[str, Any] | None = None) -> Any:
        env = env or {}
        match tree:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in OPS:
                attrs = {k.arg or "": self.value(k.value, env) for k in keywords}
                return OPS[name](*(self.value(a, env) for a in args), **attrs)
            case ast.Constant(value=value):
                return value
            case ast.Tuple(elts=items):
                return tuple(self.value(i, env) for i in items)
            case ast.Name(id="inf"):
                return float("inf")
            case ast.Name(id="nan"):
                return float("nan")
            case ast.Name(id=name) if name in env:
                return env[name]
            case ast.Subscript():
                return self.type(tree)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self.value(operand, env)
                return value * -1 if isinstance(value, size.Size) else -value
            case ast.Name() | ast.BinOp():
                return size.from_ast(tree, self.sizes)
            case ast.Call(func=ast.Name(id="min" | "max")):
                return size.from_ast(tree, self.sizes)
        raise ParseError(f"{ast.unparse(tree)!r} cannot be read")
