"""Lowers decoding programs to the blob that the native machine runs: flat register code, with no compiler behind it.

A blob is int64 words: magic, version, number of words, strings, models, functions, programs (`Writer` writes each part; the reader
is backends/cpu/machine/program.hpp). A program is blocks of instructions over registers: the function itself and its regions.

What happens on the way: operations that the machine lacks are decomposed, constant expressions become constants of their block,
`get` becomes one of several output registers, and the last read of a register is marked so that the machine may change the value in
place. Readers of a value are placed before the operation that changes it, so that it need not be copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stemma.codegen.blob import (
    DTYPES,
    MAX_CONSTANT,
    MAX_RANK,
    STATE,
    Served,
    Writer,
    bits,
    function_words,
    is_callable,
    model_words,
)  # fmt: skip
from stemma.ir import (
    CompileError,
    Dim,
    Function,
    Module,
    Node,
    Size,
    SizeLike,
    State,
    StemmaError,
    Tensor,
    Tuple,
    Type,
    WeightStore,
    evaluate_constant,
    size,
    stamp,
    walk,
)  # fmt: skip
from stemma.ir.node import OPS
from stemma.ir.trace import ModelSpec, Program, TracedProgram, trace

MEMBER = "programs.bin"
TENSOR_OPS = frozenset({
    "abs", "add", "argmax", "broadcast_to", "cast", "ceil", "concat", "cond", "constant", "cos", "cumsum", "div", "eq", "erf",
    "exp", "floor", "floordiv", "ge", "get", "gt", "iota", "le", "log", "logical_and", "logical_not", "logical_or", "loop", "lt",
    "matmul", "maximum", "minimum", "mod", "mul", "ne", "neg", "pad", "param", "pow", "reciprocal", "reduce_max", "reduce_min",
    "reduce_sum", "reshape", "round", "rsqrt", "scatter", "sigmoid", "sign", "sin", "size_value", "slice", "softmax", "sqrt", "sub",
    "take", "take_along", "tanh", "transpose", "where",
})  # fmt: skip
"""What a program may use besides the operations of level "program"; others are decomposed."""


@dataclass(frozen=True)
class Listed:
    """A program of a module: its function, the values of options that are not given, and its unspeculated form, if any."""

    function: Function
    defaults: Mapping[str, Any] = field(default_factory=dict)
    plain: str | None = None


def attach(module: Module, programs: Iterable[Listed]) -> Module:
    """The module with these programs added to it (in place of earlier ones of the same names)."""
    known = {p.function.name: p for p in (*programs_of(module), *programs)}
    return module.replace(
        *(p.function for p in known.values()),
        programs=tuple(known),
        program_defaults=tuple((name, tuple(p.defaults.items())) for name, p in known.items()),
        program_plain=tuple((name, p.plain) for name, p in known.items() if p.plain),
    )


def programs_of(module: Module) -> list[Listed]:
    """The programs of a module, from its properties `programs` (names), `program_defaults` and `program_plain`."""
    defaults = {name: dict(pairs) for name, pairs in module.properties.get("program_defaults", ())}
    plain = dict(module.properties.get("program_plain", ()))
    return [Listed(module[n], defaults.get(n, {}), plain.get(n)) for n in module.properties.get("programs", ())]


def without_programs(module: Module) -> Module:
    """The module of the functions that become kernels."""
    names = module.properties.get("programs", ())
    return Module((f for f in module if f.name not in names), module.properties)


def models_of(module: Module) -> list[Served]:
    """The models of a module, from its property `models` ((name, vocab, width, eos, context), ...), else its one model."""
    given, properties = module.properties.get("models"), module.properties
    if given is None:
        if properties.get("kind") != "causal_lm" or "step" not in (f.name for f in module):
            return []
        step = module["step"]
        width: Any = next((r.shape[-1] for n, r in zip(step.result_names, step.results, strict=True) if n == "hidden"), 0)
        given = (("model", properties.get("vocab", 0), width, properties.get("eos", ()), properties.get("context", 0)),)
    return [
        Served(name, vocab, width, eos if isinstance(eos, tuple) else () if eos is None else (eos,), context)
        for name, vocab, width, eos, context in given
    ]


def program_table(program: Listed) -> dict[str, Any]:
    """A program's entry of the manifest: parameters (name, type, default), results, Python functions that it calls (name: result
    type), the name of its unspeculated form. CompileError when it expects two types of one Python function."""
    function = program.function
    host: dict[str, str] = {}
    for node in walk(function):
        if node.op.name == "host":
            name, type = node.attrs["function"], repr(node.type)
            if host.setdefault(name, type) != type:
                raise CompileError(f"The program {function.name!r} expects {host[name]} and {type} of the function {name!r}.")
    params = []
    for p in function.params:
        name = p.attrs["name"]
        default = {"default": program.defaults[name]} if name in program.defaults else {}
        params.append({"name": name, "type": repr(p.type), **default})
    return {"params": params, "results": list(function.result_names), "host": host, "plain": program.plain}


def lower_programs(
    programs: Sequence[Listed],
    models: Sequence[Served],
    functions: Mapping[str, Mapping[str, Any]],
    weights: WeightStore | None = None,
) -> bytes:
    """The blob. `functions` are the tables of the compiled functions as the manifest has them.

    CompileError for a program with an operation that machines do not run, naming the user's line.
    """
    out = Writer()
    steps = {m.function for m in models}
    words = [len(models)]
    for model in models:
        if model.function not in functions:
            raise CompileError(f"The model {model.name!r} of the programs has no compiled function {model.function!r}.")
        words += model_words(out, model, functions[model.function])
    called = {n: t for n, t in functions.items() if n not in steps and is_callable(t)}
    words.append(len(called))
    for name, table in called.items():
        words += function_words(out, name, table)
    words.append(len(programs))
    for program in programs:
        words += _Lowering(out, program, called, {m.name for m in models}, weights).words()
    return out.blob(words)


# ---- programs ---------------------------------------------------------------------------------------------------------


def lower_object(
    program: Program | TracedProgram, manifest: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[bytes, str, dict[str, Any]]:
    """A program written in Python, lowered for an artifact: its blob, its name, its entry of a manifest.

    `options` that the program fixes when it is traced (p.Fixed) are fixed here. TraceError and CompileError name the user's line.
    """
    if not isinstance(program, (Program, TracedProgram)):
        raise CompileError(f"{program!r} is no decoding program: give a function with the decorator @program, or a name.")
    models = [Served(**{**m, "eos": tuple(m["eos"])}) for m in manifest["models"]]
    if isinstance(program, Program):
        specs = {m.name: ModelSpec(m.vocab, m.width, m.eos, m.context) for m in models}
        program = trace(program, specs, **{name: options[name] for name in fixed_options(program) if name in options})
    listed = Listed(program.function, program.defaults)
    return lower_programs([listed], models, manifest["functions"]), listed.function.name, program_table(listed)


def fixed_options(program: Program | TracedProgram) -> list[str]:
    """Names of the options of a program that are fixed when it is traced."""
    if not isinstance(program, Program):
        return []
    parameters = inspect.signature(program.run, eval_str=True).parameters.values()
    return [p.name for p in parameters if "fixed" in getattr(p.annotation, "__metadata__", ())]


class _Lowering:
    """One program on its way to words."""

    def __init__(
        self, out: Writer, program: Listed, functions: Mapping[str, Any], models: set[str], weights: WeightStore | None
    ) -> None:
        self.out, self.program, self.functions, self.models, self.weights = out, program, functions, models, weights
        self.name = program.function.name
        self.dims: list[Dim] = []
        self.blocks: dict[Function, int] = {}
        self.block_words: list[list[int]] = []

    def words(self) -> list[int]:
        """The program's part of the blob."""
        function = legal(self.program.function)
        for p in function.params:
            for s in p.type.shape if isinstance(p.type, Tensor) else ():
                self.dims += [d for d in sorted(size.dims(s), key=str) if d not in self.dims]
        params = [word for p in function.params for word in self._param(p, function)]
        main = self._block(function)
        results = [self.out.text(n) for n in function.result_names]
        blocks = [word for words in self.block_words for word in words]
        return [
            self.out.text(self.name), len(self.dims), *(self.out.text(d.name) for d in self.dims), len(function.params), *params,
            len(results), *results, *main, len(self.block_words), *blocks,
        ]  # fmt: skip

    def _error(self, node: Node, what: str) -> CompileError:
        line = f" ({node.origin.line})" if node.origin.line else ""
        return CompileError(f"The program {self.name!r} cannot be lowered: {node.op.name}{line} {what}")

    def _param(self, node: Node, function: Function) -> list[int]:
        name, type = node.attrs["name"], node.type
        words = [self.out.text(name)]
        if isinstance(type, State):
            words += [STATE, 0, self.out.text(type.kind), len(type.args)]
            for a in type.args:
                words += [0, a] if isinstance(a, int) else [1, self.out.text(a)]
        else:
            self._check(node, type)
            words += [DTYPES[node.dtype], len(node.shape)]
            for s in node.shape:
                if isinstance(s, int):
                    words += [0, s]
                elif len(found := size.dims(s)) == 1 and s == size.dim(*_fields(next(iter(found)))):
                    words += [1, self.dims.index(next(iter(found)))]
                else:
                    raise self._error(node, f"{name!r} has the size {s}; parameters have sizes that are numbers or names.")
            words += [-1, 0]
        default = self.program.defaults.get(name)
        words += [0] if default is None else [2, bits(default)] if isinstance(default, float) else [1, int(default)]
        kept = name in function.result_names and not (isinstance(type, State) and type.kind == "output")
        return [*words, function.result_names.index(name) if kept else -1]

    def _check(self, node: Node, type: Type) -> None:
        for tensor in type.items if isinstance(type, Tuple) else (type,):
            if isinstance(tensor, Tensor) and (tensor.dtype not in DTYPES or tensor.rank > MAX_RANK):
                raise self._error(node, f"gives {tensor!r}; programs compute f32, i32, i64 and bool of at most {MAX_RANK} axes.")

    def _region(self, function: Function) -> int:
        if function not in self.blocks:
            words = self._block(function)
            self.blocks[function] = len(self.block_words)
            self.block_words.append(words)
        return self.blocks[function]

    def _block(self, function: Function) -> list[int]:
        """Registers, parameters, results, constants and instructions of a function or region."""
        constants = self._constants(function)
        code = ordered([n for n in function.nodes if n not in constants.inner], constants.values)
        uses: dict[tuple[Node, int], int] = {}  # (value, result) -> how many reads are left
        for node in code:
            for i in node.inputs if node.op.name != "get" else ():
                uses[value_of(i)] = uses.get(value_of(i), 0) + 1
        for r in function.results:
            uses[value_of(r)] = uses.get(value_of(r), 0) + 1
        registers: dict[tuple[Node, int], int] = {(p, 0): i for i, p in enumerate(function.params)}
        for node in constants.values:
            if (node, 0) in uses:
                registers[node, 0] = len(registers)
        count = len(registers)
        free: list[int] = []
        instructions: list[int] = []
        number = 0
        for node in code:
            if node.op.name == "get":
                continue
            if node.op.name == "param":
                if (node, 0) not in registers:
                    raise self._error(node, f"{node.attrs['name']!r} is of another function: it was not carried into the region.")
                continue
            self._allowed(node)
            inputs, dead = [], []
            for i in node.inputs:
                key = value_of(i)
                uses[key] -= 1
                if uses[key] or i in constants.values:
                    inputs.append(registers[key])
                else:
                    inputs.append(-1 - registers[key])
                    dead.append(registers[key])
            outputs = []
            for result in range(len(node.type.items) if isinstance(node.type, Tuple) else 1):
                if (node, result) not in uses:
                    outputs.append(-1)
                    continue
                if not free:
                    free.append(count)
                    count += 1
                registers[node, result] = free.pop()
                outputs.append(registers[node, result])
            free += dead
            attributes = [word for key in node.op.defaults for word in self._attribute(node, node.attrs[key])]
            instructions += [
                self.out.text(node.op.name), len(inputs), *inputs, len(outputs), *outputs, len(node.op.defaults), *attributes
            ]  # fmt: skip
            number += 1
        kept = [(n, v) for n, v in constants.values.items() if (n, 0) in registers]
        constant_words = [word for n, v in kept for word in self._constant(registers[n, 0], n, v)]
        results = [registers[value_of(r)] for r in function.results]
        return [
            count, len(function.params), *range(len(function.params)), len(results), *results, len(kept), *constant_words, number,
            *instructions,
        ]  # fmt: skip

    def _constant(self, register: int, node: Node, value: Any) -> list[int]:
        flat = [bits(float(v)) if node.dtype == "f32" else int(v) for v in value.reshape(-1)]
        return [register, DTYPES[node.dtype], len(node.shape), len(flat), *flat]

    def _constants(self, function: Function) -> _Constants:
        """Values of constant expressions of at most one axis, and the nodes that are only needed inside of them."""
        constant: dict[Node, bool] = {}
        for node in function.nodes:
            level = node.op.name in ("array", "weight") or (
                node.op.level == "tensor" and node.op.name not in ("loop", "cond", "param")
            )
            constant[node] = (
                level and isinstance(node.type, Tensor) and all(constant[i] for i in node.inputs)
                and not any(isinstance(s, Size) for s in (node.attrs.get("size"), *node.type.shape))
                and size.bounds(node.type.elements)[1] <= MAX_CONSTANT
            )  # fmt: skip
        found: dict[Node, Any] = {}
        users = function.users()
        for node, known in constant.items():
            outside = node in function.results or any(not (constant[u] and u.tensor.rank <= 1) for u in users[node])
            if known and outside and node.tensor.rank <= 1:
                self._check(node, node.type)
                try:
                    value = evaluate_constant(node, self.weights, np.float32)
                except StemmaError as error:
                    raise self._error(node, f"has no value: {error}") from None
                found[node] = np.asarray(value)
        inner = {n for n in function.nodes if constant[n] and n not in found and n.tensor.rank <= 1} | set(found)
        return _Constants(found, inner)

    def _allowed(self, node: Node) -> None:
        self._check(node, node.type)
        name, attrs = node.op.name, node.attrs
        if name not in TENSOR_OPS and node.op.level != "program":
            raise self._error(node, "is an operation of models. Programs use those of `stemma.program` and plain array operations.")
        if name == "call" and attrs["function"] not in self.functions:
            raise self._error(node, f"names {attrs['function']!r}; compiled functions: {', '.join(self.functions) or 'none'}.")
        if name == "start" and attrs["model"] not in self.models:
            raise self._error(node, f"names the model {attrs['model']!r}; models: {', '.join(sorted(self.models)) or 'none'}.")

    def _attribute(self, node: Node, value: Any) -> list[int]:
        match value:
            case None:
                return [0]
            case bool() | int():
                return [1, int(value)]
            case float():
                return [2, bits(value)]
            case str():
                return [3, self.out.text(value)]
            case tuple():
                return [4, len(value), *(word for v in value for word in self._attribute(node, v))]
            case Function():
                return [5, self._region(value)]
            case Tensor():
                self._check(node, value)
                return [6, DTYPES[value.dtype], value.rank, *(word for s in value.shape for word in self._attribute(node, s))]
            case Size():
                words = self._postfix(node, value)
                return [7, len(words) // 2, *words]
        raise self._error(node, f"has the attribute {value!r}, which blobs cannot hold.")

    def _postfix(self, node: Node, value: SizeLike) -> list[int]:
        """A size as (operation, value) pairs: 0 constant, 1 dimension, 2 add, 3 mul, 4 floordiv, 5 min, 6 max."""
        if isinstance(value, int):
            return [0, value]
        words: list[int] = []
        for count, (monomial, coefficient) in enumerate(value.terms):
            words += [0, coefficient]
            for atom in monomial:
                if isinstance(atom, Dim):
                    if atom not in self.dims:
                        raise self._error(node, f"needs the size {atom}, which no parameter of the program has.")
                    words += [1, self.dims.index(atom)]
                else:
                    words += [*self._postfix(node, atom.a), *self._postfix(node, atom.b)]
                    words += [{"floordiv": 4, "min": 5, "max": 6}[atom.kind], 0]
                words += [3, 0]
            words += [2, 0] * (count > 0)
        return words


@dataclass(frozen=True)
class _Constants:
    values: dict[Node, Any]
    inner: set[Node]


def _fields(d: Dim) -> tuple[str, int, int]:
    return d.name, d.lo, d.hi


def value_of(node: Node) -> tuple[Node, int]:
    """The node that computes a value, and which of its results it is."""
    return (node.inputs[0], node.attrs["index"]) if node.op.name == "get" else (node, 0)


def legal(function: Function) -> Function:
    """The function with every operation that machines lack decomposed, where it can be, in regions too."""
    while True:
        new = function.rewrite(_legal_node)
        if new is function:
            return new
        function = new


def _legal_node(node: Node, inputs: tuple[Node, ...]) -> Node:
    op, attrs = node.op, dict(node.attrs)
    if op.name == "fused" and len(attrs["body"].results) == 1:
        inlined: Node = attrs["body"].inline(*inputs)[0]
        return inlined
    if op.name not in TENSOR_OPS and op.level != "program" and op.decompose is not None:
        with stamp(line=node.origin.line, by=node.origin.by):
            found: Node = op.decompose(*inputs, **attrs)
            return found
    for key, value in attrs.items():
        if isinstance(value, Function):
            attrs[key] = legal(value)
    if all(attrs[k] is node.attrs[k] for k in attrs):
        return node.rebuild(*inputs)
    with stamp(line=node.origin.line, by=node.origin.by):
        return OPS[op.name](*inputs, **attrs)


def changes(node: Node, value: tuple[Node, int]) -> bool:
    """Whether a node may change a value in place that it is the last to read: a state that it returns, the target of a scatter."""
    if any(isinstance(a, Function) for a in node.attrs.values()):
        return True
    if node.op.name == "scatter":
        return value_of(node.inputs[0]) == value
    source, result = value
    type = source.type.items[result] if isinstance(source.type, Tuple) else source.type
    items = node.type.items if isinstance(node.type, Tuple) else (node.type,)
    return isinstance(type, State) and any(isinstance(t, State) and t.kind == type.kind for t in items)


def ordered(nodes: Sequence[Node], known: Iterable[Node]) -> list[Node]:
    """The nodes (inputs first) with those that only read a value before the one that changes it, where that is possible."""
    place = {n: i for i, n in enumerate(nodes)}
    before: dict[Node, list[Node]] = {n: [i for i in n.inputs if i in place] for n in nodes}

    def needs(node: Node, wanted: Node) -> bool:
        """Whether `node` must come after `wanted`."""
        stack, seen = [node], {node}
        while stack:
            n = stack.pop()
            if n is wanted:
                return True
            new = [b for b in before[n] if b not in seen]
            seen.update(new)
            stack += new
        return False

    readers: dict[tuple[Node, int], list[Node]] = {}
    for n in nodes:
        for i in n.inputs if n.op.name != "get" else ():
            readers.setdefault(value_of(i), []).append(n)
    for value, users in readers.items():
        changing = [u for u in dict.fromkeys(users) if changes(u, value)]
        for changer in changing[:1]:
            for reader in dict.fromkeys(users):
                if reader is not changer and not needs(reader, changer):
                    before[changer].append(reader)
    order: list[Node] = []
    done: set[Node] = set(known)
    for n in nodes:
        stack = [n]
        while stack:
            top = stack[-1]
            waiting = [b for b in before[top] if b not in done]
            if top in done or not waiting:
                stack.pop()
                if top not in done:
                    done.add(top)
                    order.append(top)
            else:
                stack.append(min(waiting, key=place.__getitem__))
    return order
