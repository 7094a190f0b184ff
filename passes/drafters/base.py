"""What a drafter is: a frozen dataclass that traces how a tree of guesses is made, in the language of decoding programs.

    @dataclass(frozen=True)
    class Repeat(Drafter):
        '''Guess that the last token comes again.'''

        name: ClassVar[str] = "repeat"

        def draft(self, context, text, token, tree, state):
            context.extend(tree, [0], token, [1.0])

    stemma compile MODEL --speculate "./mine.py:Repeat"

`text` has everything before `token`, which is the root of `tree` (node 0). What a drafter keeps between turns are `state` cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from stemma.ir import PassError, Type, WeightStore, size
from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.ir.trace_scope import Cell
from stemma.passes.base import ModelInfo, Needs


class Table(Cell):
    """An array that a drafter keeps: read and set `value`."""

    hint = "table"

    @property
    def value(self) -> Value:
        return Value(self.node)

    @value.setter
    def value(self, value: Value) -> None:
        self.node = value.node


State = Mapping[str, Any]
"""What a drafter keeps, by name: `Table` for arrays, `Sequences` for sequences, `Cell` for other states."""


@dataclass
class DraftContext:
    """What a drafter may know while it is traced.

    size: nodes of a tree, root included. model, vocab, width: of the text's model. models: all, by name. settings: what the
    program gives to `select` (temperature, seed, ...), by name; empty when they are not known before the step. source: its
    number. limit: nodes that this tree may have, i32(). verify: the verifier. weights: a drafter may add constant tables.
    """

    size: int
    model: str
    vocab: int
    width: int
    models: Mapping[str, ModelInfo]
    verify: str = "identical"
    weights: WeightStore = field(default_factory=WeightStore)
    settings: Mapping[str, Value] = field(default_factory=dict)
    source: int = 0
    limit: Value | int = 0

    def extend(self, tree: Tree, parents: Any, tokens: Any, scores: Any) -> Value:
        """Adds guesses of this drafter to a tree; the numbers of their nodes, i32[m] (-1: no room)."""
        return tree.extend(parents, tokens, scores, source=self.source)

    def likely(self, logits: Value, positions: Value, sharpness: float = 1.0) -> Value:
        """Probabilities f32[n, vocab] that the program chooses each token, guessed from a drafter's logits.

        At a temperature the noise that the program will add at those positions (i32[n]) is known, because it is counted: it is
        added here too, so that both choose the same token where their distributions are close (a Gumbel coupling). The verifiers
        recursive and typical draw otherwise.
        """
        if not self.settings:
            return p.softmax(logits * sharpness)
        temperature, seed, sequence = (self.settings[name] for name in ("temperature", "seed", "sequence"))

        def sampled() -> Value:
            scaled = logits / temperature
            coupled = self.verify in ("identical", "reflective")
            if not coupled:
                return p.softmax(scaled)
            return p.softmax((scaled + p.noise(seed, sequence, positions, self.vocab)) * sharpness)

        found: Value = p.cond(temperature > 0.0, sampled, lambda: p.softmax(logits * sharpness))
        return found

    def noise(self, positions: Value) -> Value:
        """Gumbel noise f32[n, vocab] for drafting samples; 0 when the program takes the likeliest token."""
        if not self.settings:
            return p.full((positions.shape[0], self.vocab), 0.0)
        temperature, seed, sequence = (self.settings[name] for name in ("temperature", "seed", "sequence"))
        return p.noise(seed, sequence, positions, self.vocab) * p.where(temperature > 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Drafter:
    """Base of all drafters. slow: every node that it drafts takes time, as a model runs for it."""

    name: ClassVar[str]
    slow: ClassVar[bool] = False

    @property
    def samples(self) -> bool:
        """Whether the guesses after a node are samples without replacement, whose distributions it keeps under `Q` in `state` when
        the verifier is "recursive"."""
        return False

    def needs(self) -> Needs:
        """Models and functions that must be compiled."""
        return Needs()

    def check(self, context: DraftContext) -> None:
        """PassError when the drafter cannot work with these models."""

    def persistent(self, context: DraftContext) -> Mapping[str, Type]:
        """Types of what is kept from request to request; zeros or empty states at first."""
        return {}

    def begin(self, context: DraftContext) -> Mapping[str, Value | Cell]:
        """What is kept from turn to turn of one request, as it begins."""
        return {}

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        """Extends the tree. text: what came before the token i32[1], which is the root."""
        raise NotImplementedError

    def observe(self, context: DraftContext, text: Sequences, tree: Tree, logits: Value, hidden: Value, state: State) -> None:
        """Learns from a turn. text: with the followed nodes; logits f32[size, vocab]: of the tree's nodes, after the last one
        anything; hidden f32[1, width]: of the last node that was followed, zeros when no drafter `needs` it."""

    def given(self, context: DraftContext, name: str) -> ModelInfo:
        """A model that is needed; PassError when it is not there."""
        if name not in context.models:
            there = ", ".join(context.models) or "none"
            raise PassError(
                f"The drafter {self.name!r} needs the model {name!r}; there are: {there}. Give one with --model {name}=CHECKPOINT."
            )
        return context.models[name]

    def written(self) -> str:
        """The drafter with its options, as they are given."""
        options = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return self.name + (f"{{{options}}}" if options else "")


Q = "draft_distributions"
"""What drafters of samples keep for the recursive verifier: f32[size + 1, vocab], the distribution that each node's children are
samples of; the last row is for nodes that do not exist."""


@dataclass(frozen=True)
class Layer:
    """The next layer of a tree: place of the parent in the layer before, token (-1: none), probability after the parent, and
    probability of the path; all [width]."""

    places: Value
    tokens: Value
    scores: Value
    paths: Value


def best_layer(paths: Value, likely: Value, width: int, least: float = 0.0) -> Layer:
    """The likeliest `width` children of a layer of nodes that have a path probability of at least `least`.

    paths f32[n]: probability of the path to each node (0: no node). likely f32[n, vocab]: of each token after it.
    """
    scores, tokens = p.top_k(likely, width)
    best, at = p.top_k(flat(paths[:, None] * scores), width)
    kept = (best > 0.0) & (best >= least)
    return Layer(at // width, p.where(kept, flat(tokens)[at], -1), flat(scores)[at], p.where(kept, best, 0.0))


def flat(x: Value) -> Value:
    """All elements as one row."""
    return x.reshape(size.product(x.shape))
