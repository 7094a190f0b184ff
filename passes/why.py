"""Why a rule did not fire: its best partial matches and the reason (idea: the onnxscript rewriter's tracer)."""

from __future__ import annotations

from dataclasses import dataclass

from stemma.ir import Function, Module, Node
from stemma.passes.pattern import Binding, Matcher, NotYet, operations
from stemma.passes.rewrite import NoMatch, Rule


@dataclass(frozen=True)
class PartialMatch:
    """How far a rule came at one node.

    root: what the pattern's root was held against. matched of total: operations of the pattern found. at: the node that did not
    fit. reason: what was different, or what the rule's check said. fires: the rule applies here.
    """

    rule: str
    function: str
    root: Node
    at: Node
    matched: int
    total: int
    reason: str
    fires: bool = False

    def __str__(self) -> str:
        line = next((n.origin.line for n in (self.at, self.root) if n.origin.line), "")
        where = f"{self.root!r} in {self.function}" + (f", from {line}" if line else "")
        if self.fires:
            return f"{self.rule} applies at {where}."
        made = f" (made by {self.at.origin.by})" if self.at.origin.by else ""
        return f"{self.rule} matched {self.matched} of {self.total} operations at {where}: {self.reason}{made}."


def explain(rule: Rule, module: Module, limit: int = 5) -> list[PartialMatch]:
    """The best partial matches of `rule` in a module, best first: complete ones that its check rejected, then the longest.

    Nodes where not even the root operation fits are left out; an empty list means that the root operation does not occur.
    """
    found = []
    for function in module:
        for node in function.nodes:
            if rule.roots is None or node.op.name in rule.roots:
                found.append(_at(rule, function, node))
    found.sort(key=lambda m: (not m.fires, -m.matched))
    return found[:limit]


def _at(rule: Rule, function: Function, node: Node) -> PartialMatch:
    total = operations(rule.pattern)
    rejected: str | None = None
    for match in rule.matches(node, function, function.users):
        try:
            fires = rule.apply(match) is not node
        except (NoMatch, NotYet) as error:
            rejected = rejected or str(error)
            continue
        if fires:
            return PartialMatch(rule.name, function.name, node, node, total, total, "", True)
        rejected = rejected or "the replacement is what is there already"
    if rejected is not None:
        return PartialMatch(rule.name, function.name, node, node, total, total, rejected)
    matcher = Matcher(explain=True)
    for _ in matcher.match(rule.pattern, node, Binding({}, ())):
        pass
    matched, at, reason = matcher.furthest or (0, node, "the pattern does not match")
    return PartialMatch(rule.name, function.name, node, at, matched, total, reason)
