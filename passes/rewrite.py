"""The rewrite engine: rules, and their application bottom-up to a fixpoint.

    @rule(lambda x: x * 1.0, cases=[{"x": "f32[n, 4]"}])
    def mul_one(x: Node) -> Node:
        '''mul(x, 1) -> x'''
        return x

A rule is two plain functions in the IR's own operations: the pattern, and the replacement, which carries the name, the docstring
(before -> after) and takes the pattern's variables by name (and `match`, if it asks for it). An optional `check(match)` returns the
reason why the rule must not apply, or None; a replacement may also raise `NoMatch(reason)`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stemma.ir import Function, Module, Node, PassError, TypeMismatch, stamp
from stemma.passes.base import Pass, PassContext
from stemma.passes.pattern import Binding, Match, Matcher, NotYet, Pattern, Var, root_ops, variables

REGIONS = frozenset({"loop", "cond"})  # `fused` bodies are finished kernels: rules leave them alone
LIMIT = 64  # firings per node of the function before a fixpoint is given up


class NoMatch(Exception):
    """Raised by a replacement that finds it does not apply; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A rewrite. `cases` are its test examples: each maps every variable to a type such as "f32[n, 4]" (a parameter), to a node
    over parameters and weights, or, for an attribute variable, to a value."""

    name: str
    doc: str
    build: Callable[..., Any]
    pattern: Pattern
    replacement: Callable[..., Node]
    check: Callable[[Match], str | None] | None
    cases: tuple[Mapping[str, Any], ...]
    arguments: tuple[str, ...]
    roots: frozenset[str] | None

    def apply(self, match: Match) -> Node:
        """The replacement for a match, stamped with the rule's name; NoMatch with the reason when it does not apply."""
        reason = self.check(match) if self.check else None
        if reason is not None:
            raise NoMatch(reason)
        arguments = {n: match if n == "match" else match.values.get(n) for n in self.arguments}
        root = match.root
        with stamp(line=root.origin.line, by=self.name):
            try:
                new = self.replacement(**arguments)
            except TypeMismatch as error:
                raise PassError(f"The rule {self.name!r} built an invalid replacement for {root!r}: {error}") from error
        if new.type != root.type:
            raise PassError(f"The rule {self.name!r} would replace {root!r} by {new!r}: the types differ. Fix the rule.")
        return new

    def matches(self, node: Node, function: Function, users: Callable[[], Mapping[Node, list[Node]]]) -> Iterator[Match]:
        """Every way in which the pattern matches at `node`; checks are not run yet."""
        for found in Matcher().match(self.pattern, node, Binding({}, ())):
            yield Match(node, found.values, found.nodes, function, users)

    def __repr__(self) -> str:
        return f"<rule {self.name}>"


def rule(
    pattern: Callable[..., Any],
    *,
    check: Callable[[Match], str | None] | None = None,
    cases: Sequence[Mapping[str, Any]] = (),
    roots: Iterable[str] | None = None,
) -> Callable[[Callable[..., Node]], Rule]:
    """Make a rule of a pattern function and the decorated replacement. `roots` limits a pattern that is one bare variable."""

    def make(replacement: Callable[..., Node]) -> Rule:
        name = replacement.__name__
        names = list(inspect.signature(pattern).parameters)
        traced = pattern(*map(Var, names))
        if not isinstance(traced, Pattern):
            raise PassError(f"The pattern of the rule {name!r} is {traced!r}, which uses none of its variables.")
        arguments = tuple(inspect.signature(replacement).parameters)
        bound = {*variables(traced), "match"}
        if missing := [a for a in arguments if a not in bound]:
            raise PassError(f"The replacement of the rule {name!r} takes {missing}, which its pattern does not bind.")
        found = root_ops(traced) if roots is None else frozenset(roots)
        doc = inspect.getdoc(replacement) or ""
        return Rule(name, doc, pattern, traced, replacement, check, tuple(cases), arguments, found)

    return make


class _Sweep:
    """One bottom-up pass over a function: every node is rebuilt on rewritten inputs, then rewritten until no rule applies."""

    def __init__(self, function: Function, rules: Sequence[Rule], fired: Counter[str], limit: int) -> None:
        self.function, self.fired, self.limit = function, fired, limit
        self.start = fired.total()
        self.recent: list[str] = []
        self.done: dict[Node, Node] = {}
        self._readers: Mapping[Node, list[Node]] | None = None
        self._rules = rules
        self._by_root: dict[str, list[Rule]] = {}
        self.asked_users = False

    def users(self) -> Mapping[Node, list[Node]]:
        if self._readers is None:
            self._readers = self.function.users()
        return self._readers

    def node(self, root: Node) -> Node:
        """The rewritten node. An explicit stack, as graphs are deep; `fired_on` maps a node to what it was rewritten to."""
        stack, fired_on = [root], dict[Node, Node]()
        while stack:
            node = stack[-1]
            if node in self.done:
                stack.pop()
                continue
            pending = [i for i in node.inputs if i not in self.done]
            if pending:
                if any(i in fired_on for i in pending):  # a replacement that contains what it replaces
                    raise self._endless(node)
                stack.extend(reversed(pending))
                continue
            new = fired_on.get(node)
            if new is None:
                new = self._step(node)
                fired_on[node] = new
            if new is node or new in self.done:
                self.done[node] = self.done.get(new, new)
                stack.pop()
            elif new in fired_on:
                raise self._endless(node)
            else:
                stack.append(new)
        return self.done[root]

    def _step(self, node: Node) -> Node:
        """The node on rewritten inputs and regions if those changed, else what the first rule that applies makes, else itself."""
        inputs = tuple(self.done[i] for i in node.inputs)
        attrs: dict[str, Any] = {}
        if node.op.name in REGIONS:
            for key, value in node.attrs.items():
                if isinstance(value, Function):
                    attrs[key] = rewrite(value, self._rules, self.fired)
        if any(attrs[k] is not node.attrs[k] for k in attrs):
            with stamp(line=node.origin.line, by=node.origin.by):
                rebuilt: Node = node.op(*inputs, **{**node.attrs, **attrs})
            return rebuilt
        new = node.rebuild(*inputs)
        return self._rewrite(node) if new is node else new

    def _rewrite(self, node: Node) -> Node:
        name = node.op.name
        if name not in self._by_root:
            self._by_root[name] = [r for r in self._rules if r.roots is None or name in r.roots]
        for candidate in self._by_root[name]:
            for match in candidate.matches(node, self.function, self.users):
                try:
                    new = candidate.apply(match)
                except NoMatch:
                    continue
                except NotYet:
                    continue
                finally:
                    self.asked_users |= match.asked_users
                if new is not node:
                    self._count(candidate, node)
                    return new
        return node

    def _count(self, candidate: Rule, node: Node) -> None:
        self.fired[candidate.name] += 1
        self.recent = [*self.recent[-31:], candidate.name]
        if self.fired.total() - self.start > self.limit:
            raise self._endless(node)

    def _endless(self, node: Node) -> PassError:
        names = ", ".join(repr(n) for n, _ in Counter(self.recent).most_common(4))
        line = f" from {node.origin.line}" if node.origin.line else ""
        return PassError(
            f"Rewriting {self.function!r} does not end: the rules {names} keep firing, lately at {node!r}{line}. "
            "One of them undoes another; give one of them a check."
        )


def rewrite(function: Function, rules: Sequence[Rule], fired: Counter[str] | None = None) -> Function:
    """Apply rules until none applies anywhere; the same object when nothing changed. Counts firings by rule name in `fired`.

    PassError naming the rules that kept firing when no fixpoint is reached, or the rule that built a wrong type.
    """
    fired = Counter() if fired is None else fired
    limit = LIMIT * (len(function.nodes) + 16)
    for _ in range(LIMIT):
        sweep = _Sweep(function, rules, fired, limit)
        new = function.with_results(zip(function.result_names, [sweep.node(r) for r in function.results], strict=True))
        if new is function or not sweep.asked_users:
            return new
        function = new
    raise PassError(f"Rewriting {function!r} did not settle after {LIMIT} sweeps; fired: {dict(fired)}.")


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass that is a list of rules, applied together to a fixpoint in every function of the module."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    def run(self, module: Module, context: PassContext) -> Module:
        return module.map(lambda function: rewrite(function, self.rules, context.fired))
