"""Operations of decoding programs: sequences on a model, token trees, choosing and emitting tokens, calls.

Types of the values
    State["sequences", model, count, vocab, width]   `count` token sequences in the cache of a model; `width`: of its hidden state,
                                                     0 when the model's step does not return it
    State["tree", size]                              up to `size` drafted tokens under a root; node 0 is the root
    State["output"], State["closed"]                 tokens given to the caller; closed: nothing may follow

Every operation is a function of values: `step` gives new sequences and leaves the old ones as they were (sequences share what they
have in common in the cache, so a copy is a row of slot numbers). The reference meaning of a model is a function from a list of
tokens to logits: `ctx.model(name)`, a `ReferenceModel`. Kernels keep that promise to the bit, whatever runs beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stemma.ir.errors import StemmaError, TypeMismatch
from stemma.ir.formats import Array
from stemma.ir.node import Op
from stemma.ir.ops.shape import axis_of
from stemma.ir.size import SizeLike
from stemma.ir.types import State, Tensor, Tuple, Type

I32, F32, BOOL, I64 = Tensor("i32", ()), Tensor("f32", ()), Tensor("bool", ()), Tensor("i64", ())
OUTPUT, CLOSED = State("output"), State("closed")


# ---- reference values -------------------------------------------------------------------------------------------------


class ReferenceModel:
    """A model as a function: `compute(tokens)` -> (logits f32[vocab], hidden f32[width]) after a list of tokens, memoized."""

    def __init__(self, compute: Callable[[tuple[Any, ...]], tuple[Array, Array]], vocab: int, width: int = 0) -> None:
        self.compute, self.vocab, self.width = compute, vocab, width
        self._known: dict[tuple[Any, ...], tuple[Array, Array]] = {}

    def __call__(self, tokens: tuple[Any, ...]) -> tuple[Array, Array]:
        if tokens not in self._known:
            self._known[tokens] = self.compute(tokens)
        return self._known[tokens]


@dataclass(frozen=True)
class TreeValue:
    """A token tree: parent (-1: root), token, score and source of each node, in the order they were added.

    agreed: how many other sources gave that node too.
    """

    size: int
    limit: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    scores: tuple[float, ...]
    sources: tuple[int, ...]
    agreed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "agreed", (*self.agreed, *[0] * (len(self.tokens) - len(self.agreed))))

    def child(self, parent: int, token: int) -> int:
        """The node under `parent` with that token; -1 when there is none."""
        return next((i for i, p in enumerate(self.parents) if p == parent and self.tokens[i] == token), -1)

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return tuple(reversed(found))

    def add(self, parent: int, token: int, score: float, source: int) -> tuple[TreeValue, int]:
        """The tree with that node and its number: that of an equal one; -1 when there is no room or no such parent."""
        if token < 0 or not 0 <= parent < len(self.tokens):
            return self, -1
        if (known := self.child(parent, token)) >= 0:
            agreed = [n + (i == known and source != self.sources[known]) for i, n in enumerate(self.agreed)]
            return replace(self, agreed=tuple(agreed)), known
        if len(self.tokens) >= min(self.limit, self.size):
            return self, -1
        return replace(
            self, tokens=(*self.tokens, token), parents=(*self.parents, parent), scores=(*self.scores, score),
            sources=(*self.sources, source),
        ), len(self.tokens)  # fmt: skip


@dataclass(frozen=True)
class SequencesValue:
    """Sequences on a reference model. With a tree being followed: `ran` nodes have logits, `visited` is the path taken so far."""

    model: ReferenceModel
    histories: tuple[tuple[Any, ...], ...]
    tree: TreeValue | None = None
    ran: int = 0
    visited: tuple[int, ...] = ()

    @property
    def base(self) -> tuple[Any, ...]:
        """The history before the tree's root (one sequence)."""
        return self.histories[0][: len(self.histories[0]) - len(self.visited)]


@dataclass(frozen=True)
class OutputValue:
    """Tokens emitted so far."""

    tokens: tuple[int, ...] = field(default=())


def sequences_type(type: Type, count: int | None = None) -> tuple[str, int, int, int]:
    """(model, count, vocab, width) of a sequences type; TypeMismatch for another type or another `count`."""
    if not isinstance(type, State) or type.kind != "sequences":
        raise TypeMismatch(f"{type!r} is not a set of sequences")
    model, number, vocab, width = type.args
    if count is not None and number != count:
        raise TypeMismatch(f"{number} sequences where {count} is expected")
    return str(model), int(number), int(vocab), int(width)


def tree_size(type: Type) -> int:
    """The size of a tree type; TypeMismatch for another type."""
    if not isinstance(type, State) or type.kind != "tree":
        raise TypeMismatch(f"{type!r} is not a token tree")
    return int(type.args[0])


def expect(type: Type, expected: Type, what: str) -> None:
    """TypeMismatch unless the types are equal."""
    if type != expected:
        raise TypeMismatch(f"{what} must be {expected!r}, not {type!r}")


def outputs_type(state: State, rows: SizeLike) -> Type:
    _, _, vocab, width = sequences_type(state)
    return Tuple((state, Tensor("f32", (rows, vocab)), Tensor("f32", (rows, width))))


def stack_rows(results: list[tuple[Array, Array]], model: ReferenceModel, rows: int) -> tuple[Array, Array]:
    logits, hidden = np.zeros((rows, model.vocab), np.float32), np.zeros((rows, model.width), np.float32)
    for i, (row, h) in enumerate(results[:rows]):
        logits[i] = row
        if model.width:
            hidden[i] = h
    return logits, hidden


class ProgramOp(Op, abstract=True):
    """Base of the operations of decoding programs."""

    level = "program"

    def flops(self, *_: Any, **__: Any) -> SizeLike:
        return 0


# ---- sequences --------------------------------------------------------------------------------------------------------


class Start(ProgramOp):
    """`start(prompt i32[n], model=, vocab=, width=0)`: one sequence that begins with the prompt (which may be empty).

    Nothing runs yet: the prompt goes through the model together with the first token that is stepped.
    """

    name = "start"

    def infer(self, prompt: Tensor, *, model: str, vocab: int, width: int = 0) -> Type:
        if not isinstance(prompt, Tensor) or prompt.dtype != "i32" or prompt.rank != 1:
            raise TypeMismatch(f"a prompt is i32[n], not {prompt!r}")
        return State("sequences", (model, 1, vocab, width))

    def evaluate(self, ctx: Any, prompt: Any, *, model: str, vocab: int, width: int) -> Any:
        return SequencesValue(ctx.model(model), (tuple(int(t) for t in prompt),))


class Step(ProgramOp):
    """`step(sequences, tokens i32[count]) -> (sequences, logits f32[count, vocab], hidden f32[count, width])`.

    Appends one token to each sequence and computes the logits after it. A token of -1 leaves its sequence alone; its rows are 0.
    """

    name = "step"

    def infer(self, sequences: State, tokens: Tensor) -> Type:
        _, count, _, _ = sequences_type(sequences)
        expect(tokens, Tensor("i32", (count,)), "the tokens")
        return outputs_type(sequences, count)

    def evaluate(self, ctx: Any, sequences: Any, tokens: Any) -> Any:
        histories = [(*h, int(t)) if t >= 0 else h for h, t in zip(sequences.histories, tokens, strict=True)]
        zero = (np.zeros(sequences.model.vocab, np.float32), np.zeros(sequences.model.width, np.float32))
        rows = [sequences.model(h) if t >= 0 else zero for h, t in zip(histories, tokens, strict=True)]
        logits, hidden = stack_rows(rows, sequences.model, len(rows))
        return replace(sequences, histories=tuple(histories)), logits, hidden


class Feed(ProgramOp):
    """`feed(sequences, tokens i32[n]) -> (sequences, logits f32[n, vocab], hidden f32[n, width])`: n tokens, logits of each."""

    name = "feed"

    def infer(self, sequences: State, tokens: Tensor) -> Type:
        sequences_type(sequences, 1)
        if not isinstance(tokens, Tensor) or tokens.dtype != "i32" or tokens.rank != 1:
            raise TypeMismatch(f"the tokens are i32[n], not {tokens!r}")
        return outputs_type(sequences, tokens.shape[0])

    def evaluate(self, ctx: Any, sequences: Any, tokens: Any) -> Any:
        history = sequences.histories[0]
        rows = []
        for token in tokens:
            history = (*history, int(token))
            rows.append(sequences.model(history))
        logits, hidden = stack_rows(rows, sequences.model, len(rows))
        return replace(sequences, histories=(history,)), logits, hidden


class StepMixed(ProgramOp):
    """`step_mixed(sequences, tokens i32[count, k], weights f32[count, k])`: like step, on a weighted sum of k embeddings.

    The superposed embedding of Shen et al. 2024 (Superposed Decoding). The model must have been compiled with `mix=k`.
    """

    name = "step_mixed"

    def infer(self, sequences: State, tokens: Tensor, weights: Tensor) -> Type:
        _, count, _, _ = sequences_type(sequences)
        if tokens.rank != 2 or tokens.shape[0] != count or tokens.dtype != "i32":
            raise TypeMismatch(f"the tokens must be i32[{count}, k], not {tokens!r}")
        expect(weights, Tensor("f32", tokens.shape), "the weights")
        return outputs_type(sequences, count)

    def evaluate(self, ctx: Any, sequences: Any, tokens: Any, weights: Any) -> Any:
        mixed = [tuple((int(t), float(w)) for t, w in zip(*row, strict=True)) for row in zip(tokens, weights, strict=True)]
        histories = tuple((*h, m) for h, m in zip(sequences.histories, mixed, strict=True))
        logits, hidden = stack_rows([sequences.model(h) for h in histories], sequences.model, len(histories))
        return replace(sequences, histories=histories), logits, hidden


class Fork(ProgramOp):
    """`fork(sequences, indices i32[m])`: m sequences, number i a continuation of sequences[indices[i]]. Copies no cache."""

    name = "fork"

    def infer(self, sequences: State, indices: Tensor) -> Type:
        model, _, vocab, width = sequences_type(sequences)
        if not isinstance(indices, Tensor) or indices.dtype != "i32" or indices.rank != 1 or not isinstance(indices.shape[0], int):
            raise TypeMismatch(f"the indices must be i32[m] with a fixed m, not {indices!r}")
        return State("sequences", (model, indices.shape[0], vocab, width))

    def evaluate(self, ctx: Any, sequences: Any, indices: Any) -> Any:
        if any(not 0 <= i < len(sequences.histories) for i in indices):
            raise StemmaError(f"fork: the indices {list(map(int, indices))} leave 0..{len(sequences.histories) - 1}.")
        return replace(sequences, histories=tuple(sequences.histories[int(i)] for i in indices))


class Sync(ProgramOp):
    """`sync(a, b, [table i32[vocab of b]])`: `a` with the histories of `b` (other model, same count); drops a's tree.

    What is common stays in a's cache, drafted tokens on the path included; the rest goes in with its next step. `table` translates
    tokens of b's vocabulary to a's; a token without a translation (-1) becomes token 0.
    """

    name = "sync"

    def infer(self, a: State, b: State, table: Tensor | None = None) -> Type:
        _, count, vocab, _ = sequences_type(a)
        _, _, other, _ = sequences_type(b, count)
        if table is not None:
            expect(table, Tensor("i32", (other,)), "the table")
        elif vocab != other:
            raise TypeMismatch(f"vocabularies of {vocab} and {other} tokens need a table")
        return a

    def evaluate(self, ctx: Any, a: Any, b: Any, table: Any = None) -> Any:
        histories = b.histories if table is None else tuple(tuple(max(int(table[t]), 0) for t in h) for h in b.histories)
        return SequencesValue(a.model, histories)


class Length(ProgramOp):
    """`length(sequences) -> i32[count]`: tokens in each."""

    name = "length"

    def infer(self, sequences: State) -> Type:
        return Tensor("i32", (sequences_type(sequences)[1],))

    def evaluate(self, ctx: Any, sequences: Any) -> Any:
        return np.array([len(h) for h in sequences.histories], np.int32)


class History(ProgramOp):
    """`history(sequences, start i32(), size=) -> i32[count, size]`: tokens from position `start` on, then -1."""

    name = "history"

    def infer(self, sequences: State, start: Tensor, *, size: int) -> Type:
        expect(start, I32, "the start")
        return Tensor("i32", (sequences_type(sequences)[1], size))

    def evaluate(self, ctx: Any, sequences: Any, start: Any, *, size: int) -> Any:
        out = np.full((len(sequences.histories), size), -1, np.int32)
        for i, h in enumerate(sequences.histories):
            part = h[int(start) : int(start) + size]
            out[i, : len(part)] = part
        return out


class TokenCounts(ProgramOp):
    """`token_counts(sequences, start i32()) -> f32[count, vocab]`: how often each token occurs from position `start` on."""

    name = "token_counts"

    def infer(self, sequences: State, start: Tensor) -> Type:
        _, count, vocab, _ = sequences_type(sequences)
        expect(start, I32, "the start")
        return Tensor("f32", (count, vocab))

    def evaluate(self, ctx: Any, sequences: Any, start: Any) -> Any:
        rows = [np.bincount(np.array(h[int(start) :], np.int64), minlength=sequences.model.vocab) for h in sequences.histories]
        return np.array(rows, np.float32)


# ---- output -----------------------------------------------------------------------------------------------------------


class Emit(ProgramOp):
    """`emit(output, tokens i32[n])`: gives tokens to the caller, in order; negative ones are passed over."""

    name = "emit"

    def infer(self, output: State, tokens: Tensor) -> Type:
        if output == CLOSED:
            raise TypeMismatch("tokens are emitted after the end of the program's output")
        expect(output, OUTPUT, "the output")
        if not isinstance(tokens, Tensor) or tokens.dtype != "i32" or tokens.rank != 1:
            raise TypeMismatch(f"the tokens are i32[n], not {tokens!r}")
        return OUTPUT

    def evaluate(self, ctx: Any, output: Any, tokens: Any) -> Any:
        return OutputValue((*output.tokens, *(int(t) for t in tokens if t >= 0)))


class Emitted(ProgramOp):
    """`emitted(output) -> i32()`: how many tokens were emitted."""

    name = "emitted"

    def infer(self, output: State) -> Type:
        expect(output, OUTPUT, "the output")
        return I32

    def evaluate(self, ctx: Any, output: Any) -> Any:
        return np.int32(len(output.tokens))


class Finish(ProgramOp):
    """`finish(output)`: ends the output; emitting to it is an error when the program is traced."""

    name = "finish"

    def infer(self, output: State) -> Type:
        expect(output, OUTPUT, "the output")
        return CLOSED

    def evaluate(self, ctx: Any, output: Any) -> Any:
        return output


class IsIn(ProgramOp):
    """`is_in(tokens i32[n], ids=) -> bool[n]`: membership in a fixed set, such as a model's end tokens."""

    name = "is_in"

    def infer(self, tokens: Tensor, *, ids: tuple[int, ...]) -> Type:
        if not isinstance(tokens, Tensor) or tokens.dtype != "i32":
            raise TypeMismatch(f"tokens are i32, not {tokens!r}")
        return Tensor("bool", tokens.shape)

    def evaluate(self, ctx: Any, tokens: Any, *, ids: tuple[int, ...]) -> Any:
        return np.isin(tokens, ids)


# ---- arrays -----------------------------------------------------------------------------------------------------------


class TopK(ProgramOp):
    """`top_k(x f32[..., n], k=) -> (values f32[..., k], indices i32[..., k])`: the largest of the last axis, largest first.

    Of equal values the lower index comes first; rows shorter than k are filled with -inf and -1.
    """

    name = "top_k"

    def infer(self, x: Tensor, *, k: int) -> Type:
        if not isinstance(x, Tensor) or x.dtype != "f32" or not x.rank or k < 1:
            raise TypeMismatch(f"top_k takes f32[..., n] and k >= 1, not {x!r} and {k}")
        axis_of(-1 % x.rank, x.rank)
        shape = (*x.shape[:-1], k)
        return Tuple((Tensor("f32", shape), Tensor("i32", shape)))

    def evaluate(self, ctx: Any, x: Any, *, k: int) -> Any:
        order = np.argsort(-x, axis=-1, kind="stable")[..., :k].astype(np.int32)
        values = np.take_along_axis(x, order, -1)
        short = [(0, 0)] * (x.ndim - 1) + [(0, k - order.shape[-1])]
        return np.pad(values, short, constant_values=-np.inf), np.pad(order, short, constant_values=-1)


class ArrayOp(ProgramOp):
    """`array(values=, dtype="i32")` -> dtype[n]: a constant row of numbers, such as the template of a tree."""

    name = "array"
    tags = frozenset({"leaf"})

    def infer(self, *, values: tuple[float, ...], dtype: str = "i32") -> Type:
        if dtype not in ("i32", "f32") or not all(isinstance(v, (int, float)) for v in values):
            raise TypeMismatch("an array holds i32 or f32 numbers")
        return Tensor(dtype, (len(values),))

    def evaluate(self, ctx: Any, *, values: tuple[float, ...], dtype: str) -> Any:
        return np.array(values, ctx.numpy(dtype))


class Host(ProgramOp):
    """`host(*inputs, function=, type=)`: calls a Python function of that name with arrays; its result must have `type`.

    For what only Python can do: an answer extractor, a verifier, a reward. It must depend on its arguments alone.
    """

    name = "host"

    def infer(self, *inputs: Type, function: str, type: Tensor) -> Type:
        if not all(isinstance(i, Tensor) for i in inputs):
            raise TypeMismatch("a host function takes tensors; read tokens with history()")
        return type

    def evaluate(self, ctx: Any, *inputs: Any, function: str, type: Tensor) -> Any:
        return ctx.host(function, inputs, type)


class Call(ProgramOp):
    """`call(*inputs, function=, type=)`: runs a compiled function of the module on tensors; `type` is that of its result."""

    name = "call"

    def infer(self, *inputs: Type, function: str, type: Tensor) -> Type:
        if not all(isinstance(i, Tensor) for i in inputs):
            raise TypeMismatch("a compiled function takes tensors")
        return type

    def evaluate(self, ctx: Any, *inputs: Any, function: str, type: Tensor) -> Any:
        return ctx.compiled(function, inputs)


start, step, feed, step_mixed, fork, sync = Start(), Step(), Feed(), StepMixed(), Fork(), Sync()
length, history, token_counts = Length(), History(), TokenCounts()
emit, emitted, finish, is_in = Emit(), Emitted(), Finish(), IsIn()
top_k, array, host, call = TopK(), ArrayOp(), Host(), Call()
