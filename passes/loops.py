"""Which loops of decoding programs can be speculated: those that step one sequence once a turn. Why others cannot, in words."""

from __future__ import annotations

from dataclasses import dataclass

from stemma.ir import Function, Node, State, walk

STEPS = frozenset({"step", "feed", "step_mixed"})
CHANGES = frozenset({"start", "fork", "feed", "step_mixed", "sync", "expand", "follow", "settle"})
DOES = {
    "start": "starts a sequence", "fork": "forks sequences", "feed": "feeds several tokens at once",
    "sync": "follows another model", "step_mixed": "steps mixed tokens", "expand": "runs a token tree of its own",
    "follow": "follows a token tree of its own", "settle": "follows a token tree of its own",
}  # fmt: skip


class Unfit(Exception):
    """A loop or program cannot be speculated; the message is the reason."""


@dataclass(frozen=True)
class Match:
    """A loop that can be speculated.

    step: the `step` in its body. position: which of the carried values the sequence is. token: what is stepped, a value of the
    turn's beginning. select: the choice of the next token, None when it is not one `select` on the stepped sequence.
    """

    loop: Node
    step: Node
    position: int
    token: Node
    select: Node | None

    @property
    def body(self) -> Function:
        found: Function = self.loop.attrs["body"]
        return found

    @property
    def sequences(self) -> State:
        type = self.body.params[self.position].type
        assert isinstance(type, State)
        return type

    def known_before(self, node: Node) -> bool:
        """Whether a value of the body is known before the step."""
        return self.step not in Function("", (), {"value": node}).nodes


def steps_models(function: Function) -> bool:
    """Whether a function or a region in it runs a model."""
    return any(n.op.name in STEPS or n.op.name == "expand" for n in walk(function))


def match_loop(loop: Node, choice: bool) -> Match:
    """How a loop is speculated; Unfit with the reason when it is not. `choice`: its `select` must be found, to be replaced."""
    body: Function = loop.attrs["body"]
    for node in body.nodes:
        if node.op.name in CHANGES:
            raise Unfit(f"its loop {DOES[node.op.name]}{at(node)}")
    steps = [n for n in body.nodes if n.op.name == "step"]
    regions = [v for n in body.nodes for v in n.attrs.values() if isinstance(v, Function)]
    inside = [n for region in regions for n in walk(region) if n.op.name in STEPS | CHANGES]
    if not steps:
        raise Unfit(
            f"the step{at(inside[0])} is inside a loop or a branch of its loop{at(loop)}: it must happen once in every turn"
        )
    if len(steps) > 1:
        raise Unfit(f"its loop steps {len(steps)} times a turn{at(steps[0])}{at(steps[1], 'and')}")
    if inside:
        raise Unfit(f"its loop steps sequences{at(steps[0])}, and also inside of a loop or branch{at(inside[0])}")
    step = steps[0]
    sequences, token = step.inputs
    assert isinstance(sequences.type, State)
    if sequences.type.args[1] != 1:
        raise Unfit(f"its loop steps {sequences.type.args[1]} sequences together{at(step)}")
    if sequences not in body.params:
        raise Unfit(f"the sequence that is stepped{at(step)} is not the one that the loop carries")
    position = body.params.index(sequences)
    after = body.results[1 + position]
    if not (after.op.name == "get" and after.inputs[0] is step and after.attrs["index"] == 0):
        raise Unfit(f"the sequence that its loop carries on is not always the one that was stepped{at(step)}")
    selects = [n for n in body.nodes if n.op.name == "select" and n.inputs[1] is after]
    if choice and len(selects) != 1:
        what = f"{len(selects)} times" if selects else "in another way than by select"
        raise Unfit(f"its loop chooses tokens {what}{at(step)}, and other verifiers than identical replace the one select")
    return Match(loop, step, position, token, selects[0] if len(selects) == 1 else None)


def at(node: Node, word: str = "at") -> str:
    """ " at LINE" when the user's line is known."""
    return f" {word} {node.origin.line}" if node.origin.line else ""
