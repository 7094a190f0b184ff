"""One renderer for all C-family languages: a kernel's scalars become statements in loops, each as far out as its indices allow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stemma.backends.dialect import Buffer, Dialect, Grid, Reduction, bare
from stemma.codegen.lower import Kernel
from stemma.ir import CompileError, Dim, Node, Size, SizeLike, size, topological
from stemma.ir.size import Call

LONG = 16384  # a longer row is shared by several threads
FEW = 16  # a reduction over fewer elements than this is done in order
SHORT = 48  # characters of an expression that is repeated rather than named
COSTLY = {"exp": 8, "log": 8, "tanh": 12, "erf": 12, "sigmoid": 12, "sin": 16, "cos": 16, "pow": 40, "div": 2, "load": 1}


@dataclass(frozen=True)
class Rendered:
    """The source text of one kernel. threads: work items to launch, in groups of the dialect's `block` (devices only)."""

    name: str
    source: str
    buffers: tuple[Buffer, ...]
    dims: tuple[str, ...]
    threads: SizeLike


def render(kernel: Kernel, dialect: Dialect) -> Rendered:
    """The kernel in a language; CompileError when the language lacks an element type or function it needs."""
    return _Renderer(kernel, dialect).render()


class _Renderer:
    def __init__(self, kernel: Kernel, dialect: Dialect) -> None:
        self.kernel, self.dialect = kernel, dialect
        self.names: set[str] = {*dialect.reserved, kernel.name}
        self.dims = {d: dialect.size_prefix + self._name(d) for d in kernel.dims}
        written = {_buffer(store) for r in kernel.function.results for store in _stores(r)}
        self.buffers = {
            p: Buffer(self._name(p.attrs["name"]), p.dtype, p in written) for p in kernel.function.params
        }  # fmt: skip
        self.depends: dict[Node, frozenset[Node]] = {}
        self.scope = frozenset(self.names)

    def _name(self, wanted: str) -> str:
        """A name of its own that every C-family language takes."""
        name = re.sub(r"_+", "_", re.sub(r"\W", "_", wanted)).strip("_") or "v"
        name = f"v{name}" if name[0].isdigit() else name
        unique, count = name, 0
        while unique in self.names or unique.startswith("st_"):
            count += 1
            unique = f"{name}_{count}" if name not in self.dialect.reserved or count > 1 else f"{name}_"
        self.names.add(unique)
        return unique

    def render(self) -> Rendered:
        limit = self.dialect.max_buffers
        if limit and len(self.buffers) > limit:
            raise CompileError(f"{self.kernel.name} binds {len(self.buffers)} buffers; {self.dialect.name} allows {limit}.")
        stores = [store for r in self.kernel.function.results for store in _stores(r)]
        nests: dict[tuple[Node, ...], list[Node]] = {}
        for store in stores:
            nests.setdefault(self._loops(store), []).append(store)
        parts = [self._nest(list(loops), group) for loops, group in nests.items()]
        lines = self.dialect.kernel(self.kernel.name, list(self.buffers.values()), list(self.dims.values()), parts)
        threads: SizeLike = 0
        for grid, _ in parts:
            threads = threads + grid.threads
        return Rendered(
            self.kernel.name, "\n".join(lines) + "\n", tuple(self.buffers.values()), self.kernel.dims, threads
        )  # fmt: skip

    # -- one loop nest ---------------------------------------------------------------------------------------------

    def _loops(self, store: Node) -> tuple[Node, ...]:
        found: frozenset[Node] = frozenset()
        for i in store.inputs[1:]:
            found |= self._depends(i)
        return tuple(sorted(found, key=lambda loop: -loop.attrs["axis"]))

    def _depends(self, node: Node) -> frozenset[Node]:
        if node not in self.depends:
            found = frozenset({node} if node.op.name == "loop_index" else ())
            for i in node.inputs:
                found |= self._depends(i)
            if node.op.name == "reduce_loop":
                found -= frozenset(node.inputs[1:])
            self.depends[node] = found
        return self.depends[node]

    def _nest(self, loops: list[Node], stores: list[Node]) -> tuple[Grid, list[str]]:
        self.names = set(self.scope)
        roots = [i for s in stores for i in s.inputs[1:]]
        ordered = {loop for s in stores for i in s.inputs[2:] for loop in self._through_loads(i)}
        reductions = [n for n in topological(roots) if n.op.name == "reduce_loop"]
        hoisted: dict[Node, int] = {}  # reduction outside the innermost loop -> position of the last loop it depends on
        for r in reductions:
            position = max((loops.index(d) for d in self._depends(r) if d in loops), default=-1)
            if position < len(loops) - 1 and self._depends(r) <= set(loops):
                hoisted[r] = position
        rows = min(hoisted.values(), default=len(loops) - 1) + 1  # loops whose iterations share nothing
        inside = any(r not in hoisted for r in reductions)
        parallel, inner = self._split(loops[:rows], loops, ordered, inside)
        rest = [loop for loop in loops if loop not in parallel]
        self.uses = _uses(stores)
        self.text: dict[Node, str] = {}
        for loop in loops:
            self.text[loop] = self._name(loop.attrs["name"])
        body = list(self._place(roots, frozenset(parallel), rest, stores, inner))
        counted = [self._extent(loop) for loop in rest]
        extents = {r: " * ".join(_wrap(self._extent(k)) for k in r.inputs[1:]) for r in reductions}
        each = " + ".join([str(self._work(roots)), *(e for r, e in extents.items() if r not in hoisted)])
        work = " + ".join([" * ".join(map(_wrap, [*counted, each])), *(extents[r] for r in hoisted)])
        grid = Grid(
            tuple((self.text[loop], self._extent(loop)) for loop in parallel),
            (self.text[inner], self._extent(inner)) if inner is not None else None,
            work, size.product(loop.attrs["extent"] for loop in parallel), self._note(stores),
        )  # fmt: skip
        return grid, body

    def _split(self, rows: list[Node], loops: list[Node], ordered: set[Node], reduces: bool) -> tuple[list[Node], Node | None]:
        """Parallel loops among `rows`, and an innermost loop that may be split as well.

        Loops that decide which of two writes to one place wins stay in order. On the CPU the innermost loop is left to the vector
        unit unless every iteration reduces.
        """
        if self.dialect.block > 1:
            return [loop for loop in rows if loop not in ordered], None
        first = next((i for i, loop in enumerate(rows) if loop in ordered), len(rows))
        parallel = rows[:first]
        if not loops or parallel != loops or reduces:
            return parallel, None
        return parallel[:-1], loops[-1] if size.bounds(loops[-1].attrs["extent"])[1] > LONG else None

    def _through_loads(self, index: Node) -> frozenset[Node]:
        """Loops that reach an index through memory: two iterations may give the same place."""
        if index.op.name == "load":
            return self._depends(index)
        found: frozenset[Node] = frozenset()
        for i in index.inputs:
            found |= self._through_loads(i)
        return found

    def _work(self, roots: Iterable[Node]) -> int:
        return sum(COSTLY.get(n.op.name, 1) for n in topological(roots) if n.dtype != "i64")

    def _note(self, stores: Sequence[Node]) -> str:
        nodes = [n for n in topological(stores) if n.op.name not in _QUIET and n.dtype not in ("i64", "bool")]
        found = [n.attrs.get("kind", n.op.name) for n in nodes]
        words = [*dict.fromkeys(found)] or ["copy"]
        lines = dict.fromkeys(s.origin.line for s in stores if s.origin.line)
        by = dict.fromkeys(s.origin.by for s in stores if s.origin.by)
        origin = "; ".join([*lines, *(f"by {b}" for b in by)])
        return " ".join(words) + (f"  ({origin})" if origin else "")

    def _place(
        self, roots: Sequence[Node], available: frozenset[Node], loops: Sequence[Node], stores: Sequence[Node] = (),
        split: Node | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """Statements for everything the roots need, as soon as its loops are open; then the remaining loops, then the stores."""
        for node in topological(roots):
            if node not in self.text and node.op.name not in ("param", "store") and self._depends(node) <= available:
                yield from self._statement(node, available)
        if loops:
            loop, *inside = loops
            begin, end = ("begin", "end") if loop is split else ("0", self._extent(loop))
            if not inside and stores and self.dialect.independent and not self._has_reduction(roots, loop):
                yield self.dialect.independent
            yield self.dialect.loop(self.text[loop], begin, end)
            for line in self._place(roots, available | {loop}, inside, stores, split):
                yield f"  {line}"
            yield "}"
            return
        for store in stores:
            buffer = self.buffers[_buffer(store)]
            offset = self._offset(store.shape, store.inputs[2:])
            yield self.dialect.store(buffer, offset, self._bare(store.inputs[1]))

    def _has_reduction(self, roots: Sequence[Node], loop: Node) -> bool:
        return any(n.op.name == "reduce_loop" and loop in self._depends(n) for n in topological(roots))

    def _statement(self, node: Node, available: frozenset[Node]) -> Iterator[str]:
        """Gives `node` a text: an expression, or the name of a constant that is defined first."""
        if node.op.name == "reduce_loop":
            yield from self._reduction(node, available)
            return
        text = self._expression(node)
        if node.op.name in ("constant", "size_value") or self._repeated(node, text) or self._used_once(node, text):
            self.text[node] = text
            return
        name = self._name(f"{_buffer(node).attrs['name']}_at" if node.op.name == "load" else _NAMES.get(node.op.name, node.op.name))
        self.text[node] = name
        yield self.dialect.define(self.dialect.value_type(node.dtype), name, bare(text))

    def _repeated(self, node: Node, text: str) -> bool:
        """Short address arithmetic is written out wherever it is used; compilers find what is common."""
        return node.dtype == "i64" and len(text) <= SHORT and "/" not in text and node.op.name != "load"

    def _used_once(self, node: Node, text: str) -> bool:
        """A value with one user, in the same loops, is written there."""
        users = self.uses.get(node, [])
        if len(users) != 1 or len(text) > 2 * SHORT:
            return False
        (user,) = users
        if user.op.name in ("store", "reduce_loop"):
            return True
        return len(text) <= SHORT and self._depends(user) == self._depends(node)

    def _reduction(self, node: Node, available: frozenset[Node]) -> Iterator[str]:
        value, *loops = node.inputs
        # What the terms need from outside the loops comes first, and stays available.
        for inner in topological([value]):
            if inner not in self.text and inner.op.name not in ("param", "store") and self._depends(inner) <= available:
                yield from self._statement(inner, available)
        kept, names = dict(self.text), set(self.names)
        result = self._name({"sum": "sum", "max": "largest", "min": "smallest", "argmax": "place"}[node.attrs["kind"]])
        names.add(result)
        for loop in loops:
            self.text[loop] = self._name(loop.attrs["name"])
        spare = self._name(f"{result}_so_far")
        short = size.bounds(loops[-1].attrs["extent"])[1] < FEW
        variables = tuple((self.text[loop], self._extent(loop)) for loop in loops)
        opening, form, closing = self.dialect.reduce(
            Reduction(node.attrs["kind"], value.dtype, node.dtype, result, spare, variables, short)
        )
        yield from opening
        indent = "  " * len(loops)
        for line in self._place([value], available | frozenset(loops), ()):
            yield indent + line
        for line in form.replace("{value}", self.text[value]).replace("{bare}", self._bare(value)).splitlines():
            yield indent + line
        yield from closing
        self.text, self.names = kept, names
        self.text[node] = result

    # -- expressions -----------------------------------------------------------------------------------------------

    def _bare(self, node: Node) -> str:
        return bare(self.text[node])

    def _extent(self, loop: Node) -> str:
        return self._size(loop.attrs["extent"])

    def _size(self, value: SizeLike) -> str:
        """A size as an expression. Sizes are not negative where they are divided, so that `/` is the floor."""
        if isinstance(value, int):
            return str(value)
        text = ""
        for monomial, coefficient in value.terms:
            factors = [self._atom(atom) for atom in monomial]
            if abs(coefficient) != 1 or not factors:
                factors.insert(0, str(abs(coefficient)))
            sign = "-" if coefficient < 0 else "+"
            term = " * ".join(factors)
            text = f"{text} {sign} {term}" if text else f"-{term}" if sign == "-" else term
        return text

    def _atom(self, atom: Dim | Call) -> str:
        if isinstance(atom, Dim):
            return self.dims[atom.name]
        a, b = self._size(atom.a), self._size(atom.b)
        if atom.kind == "floordiv":
            return f"(({a}) / ({b}))"
        return self.dialect.call("maximum" if atom.kind == "max" else "minimum", "i64", *(self._index(x) for x in (a, b)))

    def _index(self, text: str) -> str:
        return f"({self.dialect.index})({text})"

    def _offset(self, shape: Sequence[SizeLike], indices: Sequence[Node]) -> str:
        """The row-major offset of an element, by Horner's rule."""
        text = ""
        for extent, index in zip(shape, indices, strict=True):
            one = self.text[index]
            if one == "0" and extent == 1:
                continue
            if text and text != "0":
                by = self._size(extent)
                text = f"{_wrap(text)} * {_wrap(by)}" + ("" if one == "0" else f" + {bare(one) if _sum_only(one) else one}")
            else:
                text = bare(one)
        return text or "0"

    def _expression(self, node: Node) -> str:
        name, inputs = node.op.name, node.inputs
        match name:
            case "constant":
                return self.dialect.literal(node.attrs["value"], node.dtype)
            case "size_value":
                text = _wrap(self._size(node.attrs["size"]))
                return text if node.dtype == "i64" else self.dialect.convert(text, "i64", node.dtype)
            case "load":
                return self.dialect.load(self.buffers[_buffer(node)], self._offset(inputs[0].shape, inputs[1:]))
            case "cast":
                return self.dialect.convert(self.text[inputs[0]], inputs[0].dtype, node.dtype)
            case "floordiv" if node.dtype == "i64" and _natural(inputs[0]) and _natural(inputs[1]):
                return f"({self.text[inputs[0]]} / {self.text[inputs[1]]})"
        if "elementwise" not in node.op.tags:
            raise CompileError(f"{self.kernel.name}: {name} is no scalar operation.")
        kind = inputs[1].dtype if name == "where" else inputs[0].dtype
        text = self.dialect.call(name, kind, *(self.text[i] for i in inputs))
        if node.dtype in ("i8", "u8", "i16"):
            text = self.dialect.convert(text, "i32", node.dtype)
        return text


_QUIET = frozenset({"param", "constant", "size_value", "loop_index", "load", "store", "cast", "where"})
_NAMES = {"add": "sum", "mul": "product", "sub": "difference", "div": "quotient", "where": "chosen", "neg": "minus"}


def _buffer(node: Node) -> Node:
    """The parameter behind the first input of a load or store."""
    while node.op.name in ("store", "load"):
        node = node.inputs[0]
    return node


def _stores(result: Node) -> list[Node]:
    """The chain of stores of a result, first to last."""
    found = []
    while result.op.name == "store":
        found.append(result)
        result = result.inputs[0]
    return found[::-1]


def _uses(stores: Sequence[Node]) -> dict[Node, list[Node]]:
    found: dict[Node, list[Node]] = {}
    for node in (*topological([i for s in stores for i in s.inputs[1:]]), *stores):
        for i in node.inputs:
            found.setdefault(i, []).append(node)
    return found


def _natural(node: Node) -> bool:
    """Whether an i64 scalar is certainly not negative, so that truncating division is the floor."""
    match node.op.name:
        case "loop_index":
            return True
        case "constant":
            return bool(node.attrs["value"] >= 0)
        case "size_value":
            return size.bounds(node.attrs["size"])[0] >= 0
        case "add" | "mul" | "floordiv" | "minimum":
            return all(map(_natural, node.inputs))
        case "maximum":
            return any(map(_natural, node.inputs))
    return False


def _wrap(text: str) -> str:
    return text if re.fullmatch(r"[\w.]+", text) or (text[0] == "(" and bare(text) != text) else f"({text})"


def _sum_only(text: str) -> bool:
    return " ? " not in text


__all__ = ["Rendered", "Size", "render"]
