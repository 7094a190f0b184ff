"""The speculate pass: a decoding loop that checks a whole tree of drafted tokens with each call of the model.

A loop whose body steps one sequence,

    loop(S, token, ...):  S, logits = step(S, token);  <rest>;  return again, S, token', ...

becomes

    loop(S, token, ..., D, G):
        limit = plan(G)                                    # 0: drafting does not pay, a turn of the plain loop and G = learn(G, S)
        T = draft(S, token, limit, D);  T = prune(G, T)    # a tree rooted at the token; limit 1: the root alone
        S, tree logits = expand(S, T)                      # one call of the model for all nodes
        loop:  S, logits = follow(S, token);  <rest>;  again = again and has_child(S, token')
        D = observe(D, T, tree logits);  G = learn(G, S);  S = settle(S)
        return again of the last <rest>, S, token', ..., D, G

<rest> is the same nodes, so a program with penalties, filters, constraints or host functions speculates as it is, and decides the
same (speculative decoding: Leviathan et al. 2023, Chen et al. 2023; token trees: Miao et al. 2024, SpecInfer). `verify` replaces
only the choice of the token, or the logits that all of <rest> reads (`reflective`). D is what the drafters keep, G the measured
costs and gains (`governor`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from stemma.ir import Function, Module, Node, PassError, State, Tensor, Tuple, Type, ops, stamp, walk
from stemma.ir import trace as p
from stemma.ir.ops.choose import SETTINGS
from stemma.ir.trace import Sequences, Value
from stemma.ir.trace_scope import Cell, Scope, build, tracing
from stemma.passes.base import Label, Needs, Pass, PassContext, Stage
from stemma.passes.drafters import DraftContext, Drafter, Q, Table, make_drafters
from stemma.passes.kept_bytes import kept_bytes, slot_bytes
from stemma.passes.loops import Match, Unfit, match_loop, steps_models
from stemma.passes.reflective import Reflection, mixed, reflection_tokens

GOVERNOR = "governor"
PLAIN = "_plain"


@dataclass(frozen=True)
class Speculate(Pass):
    """Rewrite decoding programs so that each call of the model checks a tree of drafted tokens.

    draft: drafters by name, joined with "+", each with options: "recycling", "lookahead+draft_model{length=4}", "./mine.py:Mine".
    budget: nodes of a tree, its root included. verify: "identical" (same bytes as plain decoding), "recursive" (rejection sampling,
    same distribution), "typical" (Medusa's, lossy), "reflective" (a second look, lossy). shape: "measured" leaves out nodes that
    cost more than they bring, by what was measured while decoding; "fixed" runs all that were drafted. memory: megabytes that
    speculation may need; lowers the budget. epsilon, delta: of typical acceptance.

    reflection, alpha: of reflective verification (Wang et al. 2025). A drafted chain runs twice in one call, the second time after
    the tokens of the text `reflection`. The program reads logits in which the second look has the weight alpha: 0 gives the bytes
    of plain decoding, 1 the second look alone. The budget holds 1 + 2k + m nodes, for a chain of k tokens and a reflection of m.
    Of a tree only the chain that can be expected to bring most is checked. Where the context has no room for the largest of these
    calls, nothing is drafted. What was drafted changes the text, so a request may get another text later.
    """

    draft: str = "recycling"
    budget: int = 16
    verify: Literal["identical", "recursive", "typical", "reflective"] = "identical"
    shape: Literal["measured", "fixed"] = "measured"
    memory: float | None = None
    epsilon: float = 0.09
    delta: float = 0.3
    reflection: str = " # "
    alpha: float = 0.3
    name: ClassVar[str] = "speculate"
    label: ClassVar[Label] = "identical"
    requires: ClassVar[frozenset[str]] = frozenset({"has_programs"})
    ensures: ClassVar[frozenset[str]] = frozenset({"has_programs", "speculated"})
    stage: ClassVar[Stage] = "program"

    def __post_init__(self) -> None:
        labels: dict[str, Label] = {"recursive": "distribution", "typical": "lossy", "reflective": "lossy"}
        object.__setattr__(self, "label", labels.get(self.verify, "identical"))

    def validate(self) -> None:
        make_drafters(self.draft)
        for name in ("epsilon", "delta"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise PassError(f"speculate: {name} is {value:g}; it is a number of 0 or more.")

    def needs(self) -> Needs:
        """What the drafters need compiled."""
        return sum_needs([d.needs() for d in make_drafters(self.draft)])

    def run(self, module: Module, context: PassContext) -> Module:
        """Every program that matches, speculated, beside its plain form NAME_plain; PassError with reasons when none matches."""
        drafters = make_drafters(self.draft)
        names = [n for n in module.properties["programs"] if not n.endswith(PLAIN)]
        done, reasons, reports = [], [], []
        for name in names:
            program = _Program(module, context, self, drafters, module[name])
            try:
                done.append((module[name], program.build()))
                reports.append((name, tuple(program.report().items())))
            except Unfit as error:
                reasons.append(f"{name}: {error}")
        if not done:
            raise PassError("speculate: no program can be speculated. " + " ".join(r + "." for r in reasons))
        return _with_programs(module, done).replace(speculation=tuple(reports), not_speculated=tuple(reasons))


def sum_needs(each: list[Needs]) -> Needs:
    """What all of them need, each thing once."""

    def joined(field_name: str) -> Any:
        return tuple(dict.fromkeys(x for n in each for x in getattr(n, field_name)))

    return Needs(joined("models"), joined("made"), joined("heads"), any(n.hidden for n in each))


def _with_programs(module: Module, done: list[tuple[Function, Function]]) -> Module:
    plain = [Function(p.name + PLAIN, p.params, zip(p.result_names, p.results, strict=True)) for p, _ in done]
    names = {p.name for p, _ in done}
    order = tuple(n for old in module.properties["programs"] for n in ((old, old + PLAIN) if old in names else (old,)))
    defaults = dict(module.properties.get("program_defaults", ()))
    defaults |= {n + PLAIN: defaults[n] for n in names if n in defaults}
    pairs = dict(module.properties.get("program_plain", ())) | {n: n + PLAIN for n in names}
    return module.replace(
        *(new for _, new in done), *plain,
        programs=order, program_defaults=tuple(defaults.items()), program_plain=tuple(pairs.items()),
    )  # fmt: skip


# ---- one program ------------------------------------------------------------------------------------------------------


@dataclass
class _Program:
    """One program that is being rewritten: its loops, what the drafters keep, and the memory they need."""

    module: Module
    outside: PassContext
    options: Speculate
    drafters: tuple[Drafter, ...]
    function: Function
    reasons: list[str] = field(default_factory=list)
    kept: dict[str, Type] = field(default_factory=dict)  # persistent values
    context: DraftContext = field(init=False)
    reflection: Reflection | None = field(init=False, default=None)

    def build(self) -> Function:
        """The speculated function; Unfit when none of its loops matches."""
        loops = dict(self._matches(self.function))
        if not loops:
            raise Unfit("; ".join(self.reasons) or "it has no loop that steps a model")
        models = {match.sequences.args for match in loops.values()}
        if len(models) > 1:
            raise Unfit("its loops step different models")
        first = next(iter(loops.values()))
        if self.options.verify == "reflective":
            self.reflection = self._reflection(first)
        self.context = self._draft_context(first)
        for drafter in self.drafters:
            for name, type in drafter.persistent(self.context).items():
                self.kept[name] = type
        if self.options.shape == "measured":
            self.kept[GOVERNOR] = self._governor(self.size)
        taken = {p.attrs["name"] for p in self.function.params}
        if clash := taken & set(self.kept):
            raise Unfit(f"its parameter {min(clash)!r} has the name of something that a drafter keeps; rename it")
        params = {name: ops.param(name=name, type=type) for name, type in self.kept.items()}
        results, state = self._region(self.function, loops, dict(params))
        pairs = [*zip(self.function.result_names, results, strict=True), *state.items()]
        return Function(self.function.name, (*self.function.params, *params.values()), pairs)

    @property
    def size(self) -> int:
        """Nodes of a tree; of a chain that is looked at twice."""
        return self.context.size

    def nodes(self, size: int) -> int:
        """Nodes of a call for a tree of `size`."""
        return self.reflection.nodes(size) if self.reflection else size

    def _matches(self, function: Function) -> Iterator[tuple[Node, Match]]:
        """The loops of a function and its regions that can be speculated; why others cannot goes to `reasons`."""
        for node in function.nodes:
            regions = [v for v in node.attrs.values() if isinstance(v, Function)]
            if node.op.name == "loop" and steps_models(node.attrs["body"]):
                try:
                    yield node, match_loop(node, self.options.verify in ("recursive", "typical"))
                    continue
                except Unfit as error:
                    self.reasons.append(str(error))
            for region in regions:
                yield from self._matches(region)

    def _region(
        self, function: Function, loops: Mapping[Node, Match], state: dict[str, Node]
    ) -> tuple[list[Node], dict[str, Node]]:
        """The results of a function or region with its loops rewritten, and what the drafters keep afterwards."""
        new: dict[Node, Node] = {}

        def contains(node: Node) -> bool:
            return any(n in loops for v in node.attrs.values() if isinstance(v, Function) for n in walk(v))

        for node in function.nodes:
            inputs = [new[i] for i in node.inputs]
            if node in loops:
                with stamp(line=node.origin.line, by=Speculate.name):
                    new[node], state = _Loop(self, loops[node], inputs, state).build()
            elif contains(node):
                new[node], state = self._enclosing(node, inputs, loops, state)
            else:
                new[node] = node.rebuild(*inputs)
        return [new[r] for r in function.results], state

    def _enclosing(
        self, node: Node, inputs: list[Node], loops: Mapping[Node, Match], state: dict[str, Node]
    ) -> tuple[Node, dict[str, Node]]:
        """A loop or branch around a rewritten loop, which hands on what the drafters keep."""
        regions = {}
        for key, value in node.attrs.items():
            if isinstance(value, Function):
                params = {name: ops.param(name=name, type=n.type) for name, n in state.items()}
                results, after = self._region(value, loops, dict(params))
                pairs = [*zip(value.result_names, results, strict=True), *after.items()]
                regions[key] = Function("", (*value.params, *params.values()), pairs)
        rebuilt = node.op(*inputs, *state.values(), **{**node.attrs, **regions})
        count = len(node.type.items) if isinstance(node.type, Tuple) else 1
        after = {name: ops.get(rebuilt, index=count + i) for i, name in enumerate(state)}
        return (rebuilt if isinstance(node.type, Tuple) else ops.get(rebuilt, index=0)), after

    def _reflection(self, match: Match) -> Reflection:
        """The second look; PassError when the options are wrong, Unfit when the loop's model has other tokens."""
        options, (model, _, vocab, _) = self.options, match.sequences.args
        if not 0 <= options.alpha <= 1:
            raise PassError(f"speculate: alpha is {options.alpha:g}; it is a weight between 0 and 1.")
        info = self.outside.models[str(model)]
        if info.to_target is not None:
            raise Unfit(
                f"its loop steps {model!r}, whose tokens are not those of the checkpoint that the reflection is encoded for"
            )
        found = Reflection(reflection_tokens(options.reflection, self.outside.source, int(vocab)), options.alpha, info.context)
        if found.length(options.budget) < 1:
            raise PassError(
                f"speculate: a budget of {options.budget} cannot hold the root, one drafted token twice and the {len(found.tokens)}"
                f" tokens of the reflection; give {found.nodes(2)} or more, or a shorter reflection."
            )
        return found

    # sizes and memory

    def _draft_context(self, match: Match) -> DraftContext:
        model, _, vocab, width = match.sequences.args
        context = DraftContext(
            size=self._most(), model=str(model), vocab=int(vocab), width=int(width), models=self.outside.models,
            verify=self.options.verify, weights=self.outside.weights,
        )  # fmt: skip
        for drafter in self.drafters:
            drafter.check(context)
        return replace(context, size=self._budget(context))

    def _most(self) -> int:
        """The largest tree, or chain that is looked at twice, of the budget."""
        return 1 + self.reflection.length(self.options.budget) if self.reflection else self.options.budget

    def _budget(self, context: DraftContext) -> int:
        """The size of a tree that fits the memory; PassError below one drafted node."""
        if self.options.budget < 2:
            raise PassError(
                f"speculate: a budget of {self.options.budget} is below one drafted node; it counts the root, so give 2 or more."
            )
        if self.options.memory is None:
            return context.size
        for most in range(context.size, 1, -1):
            if sum(self._bytes(replace(context, size=most)).values()) <= self.options.memory * 1e6:
                return most
        least = sum(self._bytes(replace(context, size=2)).values()) / 1e6
        raise PassError(f"speculate: {self.options.memory:g} MB are too few for one drafted node, which needs {least:.3f} MB.")

    def _governor(self, size: int) -> State:
        return State("governor", (size, max(len(self.drafters), 1)))

    def _bytes(self, context: DraftContext) -> dict[str, int]:
        """What speculation adds to a request's memory, in bytes, by purpose."""
        nodes = self.nodes(context.size)
        found = {
            "cache": nodes * slot_bytes(self.module, context.model),
            "logits": nodes * 4 * (context.vocab + context.width),
        }
        if self.options.shape == "measured":
            found[GOVERNOR] = kept_bytes(self._governor(context.size))
        for drafter in self.drafters:
            for name, type in drafter.persistent(context).items():
                found[name] = kept_bytes(type)
            for model in drafter.needs().models:
                found[f"cache of {model}"] = context.size * slot_bytes(self.module, model)
        return found

    def report(self) -> dict[str, Any]:
        """What `inspect` shows: drafters, nodes, verifier, and bytes by purpose."""
        options = self.options
        return {
            "draft": options.draft, "nodes": self.nodes(self.size), "verify": options.verify, "shape": options.shape,
            "label": options.label, "bytes": tuple(self._bytes(self.context).items()),
        }  # fmt: skip


# ---- one loop ---------------------------------------------------------------------------------------------------------


@dataclass
class _Loop:
    """One loop on its way. inputs: the values it starts with; state: what the drafters keep from request to request."""

    program: _Program
    match: Match
    inputs: list[Node]
    state: dict[str, Node]

    def build(self) -> tuple[Node, dict[str, Node]]:
        """The rewritten loop, whose first results are those of the plain one, and what the drafters keep afterwards."""
        match, program = self.match, self.program
        with tracing(Scope(None, "a drafter's beginning")):
            begin = {n: v.node for d in program.drafters for n, v in d.begin(program.context).items()}
        start = {**self.state, **begin}
        scope = Scope(None, "a turn")
        scope.names |= {q.attrs["name"] for q in match.body.params}
        with tracing(scope):
            params = {name: scope.param(name, node.type) for name, node in start.items()}
            limit = scope.param("limit", Tensor("i32", ()))
            cells = {name: _cell(node) for name, node in params.items()}
            results = self._turn(cells, Value(limit))
            after = {name: cell.node for name, cell in cells.items()}
        taken, given = set(match.body.result_names), (*match.body.params, *params.values())
        names = [*match.body.result_names, *(unique(name, taken) for name in after)]
        if GOVERNOR in params:
            measured = params[GOVERNOR]
            planned = ops.plan(measured, size=program.size)
            plain = {**params, GOVERNOR: ops.learn(measured, match.body.results[1 + match.position])}
            done = ops.cond(
                ops.gt(planned, ops.constant(value=0, dtype="i32")), *given, planned,
                then=Function("", (*given, limit), zip(names, [*results, *after.values()], strict=True)),
                otherwise=Function("", (*given, limit), zip(names, [*match.body.results, *plain.values()], strict=True)),
            )  # fmt: skip
            turn = [ops.get(done, index=i) for i in range(len(names))]
        else:
            turn = [*results, *after.values()]
        loop = ops.loop(*self.inputs, *start.values(), body=Function("", given, zip(names, turn, strict=True)))
        first = len(match.body.params)
        return loop, {name: ops.get(loop, index=first + i) for i, name in enumerate(start) if name in self.state}

    def _turn(self, cells: dict[str, Cell], limit: Value) -> list[Node]:
        """The results of a turn with a tree: whether to go on, then the carried values of the plain loop. Changes the cells."""
        match, program = self.match, self.program
        size = program.size
        text, token = Sequences(match.body.params[match.position]), Value(match.token, "token")
        contexts = [replace(program.context, settings=self._settings(), source=i) for i in range(len(program.drafters))]
        drafts = list(zip(program.drafters, contexts, strict=True))
        measured = GOVERNOR in cells
        reflection = program.reflection
        if not measured:
            limit = p.as_value(1 + (size - 1) // len(contexts))
        if reflection:
            limit = reflection.limit(limit, text, size)
        alone = len(drafts) == 1
        tree = p.tree(token, limit * len(contexts), size * len(contexts) if measured else size)

        def ask(name: str, *inputs: Node, **attrs: Any) -> Value:
            return Value(build(name, cells[GOVERNOR].node, *inputs, **attrs))

        def draft(drafter: Drafter, context: DraftContext) -> None:
            own = tree if alone and not measured else p.tree(token, context.limit, size)
            drafter.draft(context, text.copy(), token, own, cells)
            if alone:
                tree.node = own.node
            else:
                tree.merge(own)

        def observe(drafter: Drafter, context: DraftContext) -> None:
            drafter.observe(context, text.copy(), tree, logits, hidden, cells)

        def only_if(test: Value | None, run: Callable[[Drafter, DraftContext], None], *inputs: Any) -> None:
            if test is None:
                run(*inputs)
            else:
                p.cond(test, lambda: run(*inputs), lambda: None)

        for drafter, context in drafts:
            slow = drafter.slow and not self.samples
            context.limit = ask("ask", tree.node, source=context.source, slow=slow) if measured else limit
            only_if(context.limit > 1 if measured or reflection else None, draft, drafter, context)
        if reflection:
            tree.node = build("best_chain", tree.node, *([cells[GOVERNOR].node] if measured else []))
        if measured and not self.samples:  # which samples are left out must not depend on what they are
            tree.node = build("prune", cells[GOVERNOR].node, tree.node)
        looks: dict[str, Node] = {}
        if reflection:
            logits = text.expand(reflection.repeated(tree, token, size), program.nodes(size))
            text.node = build("retract", text.node, tree.node)
            looks, logits = reflection.begin(tree, logits), logits[:size]
        else:
            logits = text.expand(tree, size)
        hidden, (again, *carried) = self._follow(text, cells, looks)
        text.node = carried[match.position]
        for drafter, context in drafts:
            if type(drafter).observe is not Drafter.observe:
                only_if(ask("attend", source=context.source) if measured else None, observe, drafter, context)
        if measured:
            cells[GOVERNOR].node = build("learn", cells[GOVERNOR].node, text.node)
        text.settle()
        carried[match.position] = text.node
        return [again, *carried]

    @property
    def samples(self) -> bool:
        """Whether children are samples that the recursive verifier tests against what they were drawn from."""
        drafters = self.program.drafters
        return self.program.options.verify == "recursive" and len(drafters) == 1 and drafters[0].samples

    def _follow(self, text: Sequences, cells: Mapping[str, Cell], looks: Mapping[str, Node]) -> tuple[Value, list[Node]]:
        """The inner loop: the plain turn on what the tree computed, while the tree goes on.

        The hidden state of the last node (zeros when no drafter needs it); whether to go on and what is carried, as the last plain
        turn says. looks: `Reflection.begin`, nothing without a second look.
        """
        match = self.match
        body = match.body
        names = {q.attrs["name"] for q in body.params}
        wanted = any(d.needs().hidden for d in self.program.drafters)
        nothing = p.full((1, self.program.context.width), 0.0)
        carried = {unique("again", names): ops.constant(value=True, dtype="bool")}
        if wanted:
            carried[unique("hidden", names)] = nothing.node
        if self.samples:
            carried[unique(Q, names)] = cells[Q].node
        carried |= {unique(name, names): node for name, node in looks.items()}
        last, *more = params = [ops.param(name=name, type=node.type) for name, node in carried.items()]
        drawn_from, seen = (more[wanted:], []) if self.samples else ([], more[wanted:])
        followed = ops.follow(body.params[match.position], match.token)

        def replaced(node: Node, inputs: tuple[Node, ...]) -> Node:
            if node is match.step:
                return followed
            if seen and node.op.name == "get" and node.inputs[0] is match.step and node.attrs["index"] == 1:
                return mixed(ops.get(followed, index=1), *seen)
            return self._chosen(inputs, drawn_from) if node is match.select else node.rebuild(*inputs)

        again, *after = body.rewrite(replaced).results
        next_token = Function("", body.params, {"token": match.token}).inline(*after)[0]
        on = ops.logical_and(again, ops.has_child(after[match.position], next_token))
        names = set(body.result_names)
        new = {last: again} | ({more[0]: ops.get(followed, index=2)} if wanted else {})
        if seen:
            new[seen[1]] = ops.add(seen[1], ops.constant(value=1, dtype="i32"))
        extra = [(unique(q.attrs["name"], names), new.get(q, q)) for q in params]
        pairs = [(unique("more", names), on), *zip(body.result_names[1:], after, strict=True), *extra]
        init = [text.node if i == match.position else q for i, q in enumerate(body.params)]
        loop = ops.loop(*init, *carried.values(), body=Function("", (*body.params, *params), pairs))
        count = len(body.params)
        hidden = Value(ops.get(loop, index=count + 1)) if wanted else nothing
        return hidden, [ops.get(loop, index=i) for i in (count, *range(count))]

    def _chosen(self, inputs: tuple[Node, ...], drawn_from: list[Node]) -> Node:
        """The choice of the next token by the verifier, from the inputs of the plain `select`."""
        options = self.program.options
        if options.verify == "typical":
            return ops.select_typical(*inputs, *(ops.constant(value=v, dtype="f32") for v in (options.epsilon, options.delta)))
        if options.verify == "recursive":
            return ops.select_recursive(*inputs, *drawn_from, rule="scores" if drawn_from else "point")
        return ops.select(*inputs)

    def _settings(self) -> dict[str, Value]:
        """What the program gives to `select`, when all of it is known before the step."""
        select = self.match.select
        if select is None or not all(self.match.known_before(n) for n in select.inputs[2:]):
            return {}
        return {name: Value(node) for name, node in zip(SETTINGS, select.inputs[2:], strict=True)}


def _cell(node: Node) -> Cell:
    """A name for a value that drafters change."""
    if isinstance(node.type, State):
        return Sequences(node) if node.type.kind == "sequences" else Cell(node)
    return Table(node)


def unique(name: str, taken: set[str]) -> str:
    """The name, or the name with a number that is not taken; it is then."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found
