"""States of decoding programs while they are traced: sequences of a model, token trees, the output; and choosing tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stemma.ir import size as sizes
from stemma.ir.node import Node
from stemma.ir.ops.choose import SETTING_TYPES, SETTINGS
from stemma.ir.ops.program import sequences_type
from stemma.ir.trace_scope import Cell, Scope, build, fail, scope
from stemma.ir.trace_values import Number, Value, as_value


class Tree(Cell):
    """A token tree that is being drafted; `extend` and `merge` change it."""

    hint = "tree"

    def extend(self, parents: Any, tokens: Any, scores: Any, source: int = 0) -> Value:
        """Adds children; the numbers of their nodes, i32[m] (-1: no room)."""
        inputs = (as_value(parents, "i32").node, as_value(tokens, "i32").node, as_value(scores, "f32").node)
        node = build("tree_extend", self.node, *inputs, source=source)
        self.node = build("get", node, index=0)
        return Value(build("get", node, index=1))

    def merge(self, other: Tree) -> None:
        """Takes in the nodes of another tree with the same root."""
        self.node = build("tree_merge", self.node, other.node)

    def nodes(self) -> tuple[Value, Value, Value]:
        """(count i32(), tokens i32[size], parents i32[size]), filled with -1."""
        node = build("tree_nodes", self.node)
        return Value(build("get", node, index=0)), Value(build("get", node, index=1)), Value(build("get", node, index=2))


def tree(root: Any, limit: Value | int, size: int) -> Tree:
    """A tree of its root i32[1], which may grow to min(limit, size) nodes."""
    return Tree(build("tree", as_value(root, "i32").node, as_value(limit, "i32").node, size=size))


class Sequences(Cell):
    """`count` token sequences of a model. Methods that append or choose change it in place; `fork` and `copy` give another."""

    hint = "text"

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._hidden: Value | None = None

    @property
    def model(self) -> str:
        return sequences_type(self.node.type)[0]

    @property
    def count(self) -> int:
        return sequences_type(self.node.type)[1]

    @property
    def vocab(self) -> int:
        return sequences_type(self.node.type)[2]

    @property
    def hidden(self) -> Value:
        """Hidden states of the last step in this region, f32[count, width]."""
        if self._hidden is None or self._hidden.home is not scope():
            fail("there is no step before this in the region; `hidden` belongs to the last step.")
        return self._hidden

    def _tokens(self, tokens: Any) -> Node:
        given = as_value(tokens, "i32")
        return given.node if given.rank else given.reshape(1).node

    def _advance(self, node: Node) -> Value:
        self.node = build("get", node, index=0)
        self._hidden = Value(build("get", node, index=2))
        return Value(build("get", node, index=1))

    def step(self, tokens: Any) -> Value:
        """Appends a token to each (-1: none); the logits after it, f32[count, vocab]."""
        return self._advance(build("step", self.node, self._tokens(tokens)))

    def feed(self, tokens: Any) -> Value:
        """Appends a row of n tokens to the one sequence; the logits after each, f32[n, vocab]."""
        return self._advance(build("feed", self.node, self._tokens(tokens)))

    def step_mixed(self, tokens: Value, weights: Value) -> Value:
        """Steps on weighted sums of k embeddings: tokens i32[count, k], weights f32[count, k]."""
        return self._advance(build("step_mixed", self.node, tokens.node, weights.node))

    def copy(self) -> Sequences:
        """Other sequences that begin as these."""
        return Sequences(self.node)

    def fork(self, indices: Any) -> Sequences:
        """Other sequences: number i begins as sequence indices[i] of these."""
        return Sequences(build("fork", self.node, as_value(indices, "i32").node))

    def keep(self, indices: Any) -> None:
        """In place: number i goes on as what was sequence indices[i]."""
        self.node = build("fork", self.node, as_value(indices, "i32").node)

    def sync(self, other: Sequences, table: Value | None = None) -> None:
        """Takes over the histories of another model's sequences; `table` i32[other's vocabulary] translates tokens."""
        self.node = build("sync", self.node, other.node, *(() if table is None else (table.node,)))

    def length(self) -> Value:
        """Tokens in each, i32[count]."""
        return Value(build("length", self.node))

    def history(self, start: Value | int, size: int) -> Value:
        """Tokens from position `start` on, i32[count, size], filled with -1."""
        return Value(build("history", self.node, as_value(start, "i32").node, size=size))

    def counts(self, start: Value | int = 0) -> Value:
        """How often each token occurs from position `start` on, f32[count, vocab]."""
        return Value(build("token_counts", self.node, as_value(start, "i32").node))

    def expand(self, drafted: Tree, fresh: int) -> Value:
        """Runs the new nodes of a tree; the logits of the first `fresh` of them."""
        return self._advance(build("expand", self.node, drafted.node, fresh=fresh))

    def node_top_k(self, k: int, size: int) -> tuple[Value, Value]:
        """The k likeliest tokens after each expanded node: (logits f32[size, k], tokens i32[size, k]), filled with -inf and -1."""
        node = build("node_top_k", self.node, k=k, size=size)
        return Value(build("get", node, index=0)), Value(build("get", node, index=1))

    def follow(self, token: Any) -> Value:
        """What step gives, read from the expanded tree."""
        return self._advance(build("follow", self.node, self._tokens(token)))

    def has_child(self, token: Any) -> Value:
        """Whether the expanded tree goes on with that token."""
        return Value(build("has_child", self.node, self._tokens(token)))

    def settle(self) -> None:
        """Keeps the path that was followed, and forgets the rest of the tree."""
        self.node = build("settle", self.node)

    def path(self, size: int) -> Value:
        """The nodes followed so far, i32[size], filled with -1."""
        return Value(build("followed_path", self.node, size=size))


@dataclass(frozen=True)
class ModelSpec:
    """What a program must know of a model. width: of its hidden state, 0 when its step does not return it."""

    vocab: int
    width: int = 0
    eos: tuple[int, ...] = ()
    context: int = sizes.UNBOUNDED


@dataclass(frozen=True)
class Model:
    """A model that a program may step."""

    name: str
    spec: ModelSpec

    @property
    def vocab(self) -> int:
        return self.spec.vocab

    @property
    def width(self) -> int:
        """Of its hidden state; 0 when its step does not return it."""
        return self.spec.width

    @property
    def eos(self) -> tuple[int, ...]:
        """Its end tokens."""
        return self.spec.eos

    def start(self, prompt: Any) -> Sequences:
        """One sequence that begins with the prompt i32[n]; nothing runs before its first step."""
        attrs = {"model": self.name, "vocab": self.spec.vocab, "width": self.spec.width}
        return Sequences(build("start", as_value(prompt, "i32").node, **attrs))

    def is_end(self, tokens: Any) -> Value:
        """Which of the tokens end a text."""
        return Value(build("is_in", as_value(tokens, "i32").node, ids=self.spec.eos))


# ---- output and choice ------------------------------------------------------------------------------------------------


class Output(Cell):
    """The tokens that the program gives to its caller."""

    hint = "output"


def _output() -> Output:
    here: Scope | None = scope()
    while here is not None:
        for cell in here.cells:
            if isinstance(cell, Output):
                return cell
        here = here.parent
    fail("there is no output here.")


def emit(tokens: Any) -> None:
    """Gives tokens (a scalar or a row) to the caller; negative ones are passed over."""
    given, output = as_value(tokens, "i32"), _output()
    output.node = build("emit", output.node, (given if given.rank else given.reshape(1)).node)


def emitted() -> Value:
    """How many tokens were emitted, i32."""
    return Value(build("emitted", _output().node))


def finish() -> None:
    """Ends the output; emitting after this is an error when the program is traced."""
    output = _output()
    output.node = build("finish", output.node)


_SETTINGS: tuple[Number, ...] = (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0, 0)


def select(logits: Value, text: Sequences, **settings: Value | Number) -> Value:
    """The next token of each sequence, i32[count]. Settings, all optional: temperature (0: the likeliest), top_k, top_p, min_p,
    repetition_penalty, presence_penalty, seed and sequence (of the counted noise; row i has the noise of sequence + i)."""
    if unknown := settings.keys() - set(SETTINGS):
        fail(f"select has no setting {', '.join(sorted(unknown))}; its settings: {', '.join(SETTINGS)}.")
    values = []
    for name, default, expected in zip(SETTINGS, _SETTINGS, SETTING_TYPES, strict=True):
        values.append(as_value(settings.get(name, default), expected.dtype).node)
    return Value(build("select", logits.node, text.node, *values))
