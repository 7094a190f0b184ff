"""The tracer of decoding programs: Python functions on sequences of a model become functions of the IR.

    from stemma import program as p

    @p.program
    def greedy(model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 128):
        text = model.start(prompt[:-1])

        def body(token):
            token = text.step(token).argmax()           # text goes on; the logits are f32[1, vocab]
            p.emit(token)
            return (p.emitted() < max_new_tokens) & ~model.is_end(token[0]), token

        p.loop(body, prompt[-1:])

A program decodes one request. Its parameters: models (p.Model), token rows (p.Tokens) and other arrays (Annotated[p.Value,
p.Array("f32", 4)]) without defaults; then options by keyword with defaults: int (i32), float (f32), bool, p.Long (i64), which are
given when the program runs, and p.Fixed[...] of anything, which is fixed when it is traced. It emits tokens with `emit` and may
return a dictionary of arrays. A parameter p.Kept(...) whose name is a key of that dictionary is kept from run to run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from stemma.ir import size as sizes
from stemma.ir.errors import TraceError
from stemma.ir.function import Function
from stemma.ir.node import Node
from stemma.ir.ops.program import OUTPUT
from stemma.ir.size import SizeLike
from stemma.ir.trace_scope import Cell, Scope, build, fail, scope, tracing
from stemma.ir.trace_states import Model, ModelSpec, Output, Sequences, Tree, emit, emitted, finish, select, tree
from stemma.ir.trace_values import (
    Number,
    Value,
    arange,
    array,
    as_value,
    call,
    concat,
    entropy,
    exp,
    floor,
    full,
    host,
    log,
    log_softmax,
    logsumexp,
    maximum,
    minimum,
    noise,
    sigmoid,
    softmax,
    sqrt,
    stack,
    take_along,
    top_k,
    where,
)  # fmt: skip
from stemma.ir.types import State, Tensor, Tuple, Type

__all__ = [
    "Array", "Cell", "Fixed", "Kept", "Long", "Model", "ModelSpec", "Number", "Program", "Sequences", "StopTokens", "Tokens",
    "TraceError", "TracedProgram", "Tree", "Value", "arange", "array", "as_value", "call", "concat", "cond", "emit",
    "emitted", "entropy", "exp", "finish", "floor", "full", "host", "log", "log_softmax", "logsumexp", "loop", "maximum", "minimum",
    "noise", "program", "select", "sigmoid", "softmax", "sqrt", "stack", "take_along", "top_k", "trace", "tree", "where",
]  # fmt: skip

T = TypeVar("T")
Long = Annotated[int, "i64"]
Fixed = Annotated[T, "fixed"]
Tokens = Annotated[Value, "tokens"]  # i32[n], 1 <= n <= context
StopTokens = Annotated[Value, "ids"]  # i32[n], any n >= 1


@dataclass(frozen=True)
class Array:
    """The type of an array parameter, for an annotation: Array("f32", 4, "n"); a name is a size known when the program runs."""

    dtype: str
    shape: tuple[SizeLike | str, ...]

    def __init__(self, dtype: str, *shape: SizeLike | str) -> None:
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", shape)

    def type(self) -> Tensor:
        return Tensor(self.dtype, tuple(sizes.dim(s) if isinstance(s, str) else s for s in self.shape))


@dataclass(frozen=True)
class Kept:
    """The type of a parameter that is kept from run to run, for an annotation: Kept("i32", 4) or Kept(State(...))."""

    kept: Type

    def __init__(self, kind: str | State, *shape: SizeLike) -> None:
        object.__setattr__(self, "kept", kind if isinstance(kind, State) else Tensor(kind, shape))


# ---- regions ----------------------------------------------------------------------------------------------------------


def _pack(x: Any, like: Type | None = None) -> Value | Cell:
    """What a loop or branch can carry."""
    if isinstance(x, Cell):
        return x
    return as_value(x, like.dtype if isinstance(like, Tensor) else None)


def _wrap(like: Value | Cell, node: Node, hint: str = "c") -> Value | Cell:
    """A name in the present scope, of the same sort as `like`, for a node."""
    return type(like)(node) if isinstance(like, Cell) else Value(node, hint)


def _bool(x: Any, what: str) -> Node:
    given = as_value(x, "bool")
    if given.dtype != "bool" or any(s != 1 for s in given.shape):
        fail(f"{what} must be one bool, not {given.type!r}.")
    return (given.reshape() if given.rank else given).node


def _listed(result: Any) -> list[Any]:
    return [] if result is None else list(result) if isinstance(result, (tuple, list)) else [result]


def _unlisted(results: list[Any]) -> Any:
    return None if not results else results[0] if len(results) == 1 else tuple(results)


def _differs(now: Type, before: Type, what: str, before_what: str) -> str:
    """Why two types that should be equal are not, in the user's words."""
    if isinstance(now, State) and isinstance(before, State) and now.kind == before.kind == "sequences":
        (model, count, *_), (other, number, *_) = now.args, before.args
        if model != other:
            return f"{what} is of the model {model!r}, {before_what} of {other!r}; sequences of two models are not exchangeable."
        return (
            f"{what} has {count} sequences, {before_what} {number}: it forks without bound. Fork before the loop, or keep() as many"
            " as there were."
        )
    if State("closed") in (now, before):
        return "finish() inside a loop or in one branch. Finish after it."
    return f"{what} is {now!r}, {before_what} {before!r}; the types must be equal."


def loop(body: Callable[..., Any], *init: Any) -> Any:
    """Runs `body(*values)` while its first result is true, at least once; the other results are the values of the next turn.

    Gives the last values: None, one, or a tuple. Everything else that the body uses or changes is carried along by itself.
    """
    outer = scope()
    start = [_pack(x) for x in init]
    inner = Scope(outer, "a loop")
    names = _argument_names(body, len(start))
    nodes = [x.node for x in start]
    with tracing(inner):
        params = [inner.param(name, n.type) for name, n in zip(names, nodes, strict=True)]
        result = _listed(body(*(_wrap(x, n, name) for x, n, name in zip(start, params, names, strict=True))))
        if len(result) != len(start) + 1:
            fail(f"the body of a loop returns whether to go on, then its {len(start)} values; it returns {len(result)} things.")
        again = _bool(result[0], "the first result of a loop body, whether to go on,")
        results = [_pack(x, n.type).node for x, n in zip(result[1:], nodes, strict=True)]
        for number, (now, before) in enumerate(zip(results, nodes, strict=True)):
            if now.type != before.type:
                fail(
                    f"value {number} of a loop: {_differs(now.type, before.type, 'what the body returns', 'what it started with')}"
                )
        taken = list(inner.taken.items())
        for thing, before in taken:
            now = inner.cells[thing] if isinstance(thing, Cell) else before
            if now.type != before.type:
                name = before.attrs["name"]
                fail(f"a loop: {_differs(now.type, before.type, f'{name} after a turn', 'before it')}")
            params.append(before)
            results.append(now)
    pairs = [("again", again), *((n.attrs["name"], r) for n, r in zip(params, results, strict=True))]
    region = Function("", params, pairs)
    done = build("loop", *nodes, *(inner.outer(thing) for thing, _ in taken), body=region)
    gets = [build("get", done, index=i) for i in range(len(params))]
    for (thing, _), node in zip(taken, gets[len(start) :], strict=True):
        if isinstance(thing, Cell) and thing in inner.changed:
            thing.node = node
    return _unlisted([_wrap(x, n, name) for x, n, name in zip(start, gets, names)])


def _argument_names(body: Callable[..., Any], count: int) -> list[str]:
    parameters = [
        p.name for p in inspect.signature(body).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return [*parameters[:count], *(f"x{i}" for i in range(len(parameters), count))]


def cond(test: Any, then: Callable[..., Any], otherwise: Callable[..., Any], *values: Any) -> Any:
    """`then(*values)` where the test holds, else `otherwise(*values)`; both return values of the same types, and only one runs."""
    outer = scope()
    predicate = _bool(test, "the test of p.cond")
    given = [_pack(x) for x in values]
    nodes = [x.node for x in given]
    sides: list[tuple[Scope, list[Node], list[Value | Cell], list[Node]]] = []
    for branch in (then, otherwise):
        inner = Scope(outer, "a branch")
        with tracing(inner):
            names = _argument_names(branch, len(given))
            params = [inner.param(name, n.type) for name, n in zip(names, nodes, strict=True)]
            result = _listed(branch(*(_wrap(x, n, name) for x, n, name in zip(given, params, names, strict=True))))
            like = dict(enumerate(n.type for n in sides[0][3])) if sides else {}
            packed = [_pack(x, like.get(i)) for i, x in enumerate(result)]
            sides.append((inner, params, packed, [x.node for x in packed]))
    (a, _, left, _), (b, _, right, _) = sides
    if len(left) != len(right):
        fail(f"the branches of p.cond return {len(left)} and {len(right)} things.")
    taken = list(dict.fromkeys([*a.taken, *b.taken]))  # both branches take what either takes, and give back what either changes
    changed = [c for c in dict.fromkeys([*a.changed, *b.changed]) if c in taken]
    regions = []
    for inner, params, _, results in sides:
        with tracing(inner):
            for thing in taken:
                if isinstance(thing, Cell):
                    inner.read(thing)
                elif thing not in inner.taken:
                    inner.taken[thing] = inner.param("c", thing[1].type)
        pairs = [(f"r{i}", r) for i, r in enumerate([*results, *(inner.cells[c] for c in changed)])]
        regions.append(Function("", [*params, *(inner.taken[thing] for thing in taken)], pairs))
    for number, (x, y) in enumerate(zip(regions[0].results, regions[1].results, strict=True)):
        if x.type != y.type:
            fail(f"result {number} of p.cond: {_differs(x.type, y.type, 'that of the first branch', 'that of the other')}")
    if not regions[0].results:
        fail("the branches of p.cond return nothing and change nothing.")
    captured = (a.outer(t) for t in taken)
    done = build("cond", predicate, *nodes, *captured, then=regions[0], otherwise=regions[1])
    gets = [build("get", done, index=i) for i in range(len(regions[0].results))] if isinstance(done.type, Tuple) else [done]
    for cell, node in zip(changed, gets[len(left) :], strict=True):
        cell.node = node
    return _unlisted([_wrap(x, n) for x, n in zip(left, gets)])


# ---- programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracedProgram:
    """A program as a function of the IR, and the values of options that are not given."""

    function: Function
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Program:
    """A decoding program. Called inside another one, it is part of that one; `fix` gives it with options fixed."""

    def __init__(self, run: Callable[..., Any], fixed: Mapping[str, Any] = MappingProxyType({}), name: str = "") -> None:
        self.run, self.fixed, self.name = run, MappingProxyType(dict(fixed)), name or run.__name__
        self.__doc__ = run.__doc__
        self.__name__ = self.name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.run(*arguments, **{**self.fixed, **options})

    def __repr__(self) -> str:
        return f"<program {self.name}>"

    def fix(self, name: str = "", **options: Any) -> Program:
        """The program with these options fixed, under a name of its own if one is given."""
        return Program(self.run, {**self.fixed, **options}, name or self.name)


def program(run: Callable[..., Any]) -> Program:
    """Decorator of decoding programs."""
    return Program(run)


_OPTIONS: dict[Any, str] = {int: "i32", float: "f32", bool: "bool"}


def trace(traced: Program, models: Mapping[str, ModelSpec], **fixed: Any) -> TracedProgram:
    """The program as a function of the IR. `fixed` gives options their values now; p.Fixed ones are fixed in any case.

    Parameters of the function: the program's own (without models and fixed options) in order, then `output`. Results: `output`,
    what the program returns, what it keeps. Raises TraceError at the user's line.
    """
    code = traced.run.__code__
    here = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno} in {traced.name}"
    signature = inspect.signature(traced.run, eval_str=True)
    chosen = {**traced.fixed, **fixed}
    if unknown := chosen.keys() - {n for n, q in signature.parameters.items() if q.kind is q.KEYWORD_ONLY}:
        raise TraceError(f"{here}: the program has no option {', '.join(sorted(unknown))}.")
    arguments: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    params: list[Node] = []
    kept: dict[str, Type] = {}
    with tracing(Scope(None, "the program")) as outer:
        for name, parameter in signature.parameters.items():
            note, plain = parameter.annotation, parameter.annotation
            marks = (note,)
            if get_origin(note) is Annotated:
                plain, *rest = get_args(note)
                marks = tuple(rest)
            if note is Model:
                if name not in models:
                    raise TraceError(f"{here}: the program needs the model {name!r}; given: {', '.join(models) or 'none'}.")
                arguments[name] = Model(name, models[name])
                continue
            if parameter.kind is parameter.KEYWORD_ONLY and (name in chosen or "fixed" in marks):
                arguments[name] = chosen.get(name, parameter.default)
                if arguments[name] is parameter.empty:
                    raise TraceError(f"{here}: the fixed option {name!r} has no value. Give one: fix({name}=...).")
                continue
            found = _parameter_type(name, plain, marks, models)
            if found is None or (parameter.kind is parameter.KEYWORD_ONLY) != (plain in _OPTIONS):
                raise TraceError(
                    f"{here}: the parameter {name!r} is annotated {note!r}. Parameters are p.Model, p.Tokens or p.Array(...)"
                    " without defaults; options, after a `*`, are int, float, bool or p.Long with defaults, or p.Fixed[...]."
                )
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
                defaults[name] = _OPTION_VALUES[found.dtype if isinstance(found, Tensor) else ""](parameter.default)
            if any(isinstance(m, Kept) for m in marks):
                kept[name] = found
            params.append(outer.param(name, found))
            arguments[name] = Value(params[-1], name)
        output = Output(outer.param("output", OUTPUT))
        params.append(output.node)
        returned = traced.run(**arguments)
        results = _results(returned, kept, here)
        if not results and output not in outer.changed:
            raise TraceError(f"{here}: the program never emits and returns nothing. Give tokens with p.emit, or return arrays.")
        pairs = [("output", output.node), *((n, v.node) for n, v in results.items())]
    return TracedProgram(Function(traced.name, params, pairs), defaults)


_OPTION_VALUES: dict[str, Callable[[Any], Any]] = {"i32": int, "i64": int, "f32": float, "bool": bool}


def _parameter_type(name: str, plain: Any, marks: Sequence[Any], models: Mapping[str, ModelSpec]) -> Type | None:
    for mark in marks:
        if isinstance(mark, Kept):
            return mark.kept
        if isinstance(mark, Array):
            return mark.type()
        if isinstance(mark, str) and mark == "tokens":
            context = min((spec.context for spec in models.values()), default=sizes.UNBOUNDED)
            return Tensor("i32", (sizes.dim(f"{name}_length", 1, context),))
        if isinstance(mark, str) and mark == "ids":
            return Tensor("i32", (sizes.dim(f"{name}_length"),))
        if isinstance(mark, str) and mark == "i64":
            return Tensor("i64", ())
    return Tensor(_OPTIONS[plain], ()) if plain in _OPTIONS else None


def _results(returned: Any, kept: Mapping[str, Type], here: str) -> dict[str, Value]:
    """The arrays that a program returns, the kept ones last."""
    if returned is None:
        returned = {}
    if not isinstance(returned, Mapping) or not all(isinstance(n, str) and n.isidentifier() for n in returned):
        raise TraceError(f"{here}: a program returns nothing, or a dictionary of arrays by name.")
    values = {n: as_value(v) for n, v in returned.items()}
    if "output" in values:
        raise TraceError(f"{here}: 'output' is the name of the emitted tokens; call the result otherwise.")
    for name, type in kept.items():
        if name not in values or values[name].type != type:
            raise TraceError(f"{here}: the kept parameter {name!r} must be returned with its type, {type!r}.")
    return {n: v for n, v in values.items() if n not in kept} | {n: values[n] for n in kept}
