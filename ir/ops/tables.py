"""Tables of drafters that need no model: the text itself, a trie of what was seen, n-grams with probabilities.

Types of the values
    State["trie", capacity]    up to `capacity` nodes: how often each run of tokens was seen (Lookahead, Zhao et al. 2023)
    State["ngrams", order, k]  for up to 65536 contexts of 2 to `order` tokens the `k` likeliest next tokens, with averages of their
                               probabilities (Song et al. 2025, STAND)
    State["recycling", vocab, k]  of each token the `k` likeliest after it, as computed last (Luo et al. 2024, Token Recycling)

They are values: learning gives a new table. A table that is full halves all its counts and forgets what has none left.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stemma.ir.errors import TypeMismatch
from stemma.ir.ops.choose import gumbel_noise
from stemma.ir.ops.governor import GovernorValue
from stemma.ir.ops.program import F32, I32, I64, ProgramOp, expect, sequences_type, tree_size
from stemma.ir.types import State, Tensor, Tuple, Type

CONTEXTS = 1 << 16
KINDS = {"trie": 1, "ngrams": 2, "recycling": 2, "governor": 2}
"""Kinds of states that begin empty, and how many arguments (integers of at least 1) each has."""


@dataclass(frozen=True)
class TrieValue:
    """How often each run of tokens was seen."""

    capacity: int
    counts: dict[tuple[int, ...], int] = field(default_factory=dict)

    def children(self) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
        """The runs that are one token longer, by run."""
        found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for run in self.counts:
            found.setdefault(run[:-1], []).append(run)
        return found


@dataclass(frozen=True)
class NgramsValue:
    """For each context the number of distributions it has the average of, and [(token, probability)], likeliest first."""

    order: int
    k: int
    entries: dict[tuple[int, ...], tuple[int, tuple[tuple[int, float], ...]]] = field(default_factory=dict)

    def lookup(self, text: tuple[Any, ...]) -> tuple[tuple[int, float], ...]:
        """What follows the longest known context at the end of a text."""
        for length in range(min(self.order, len(text)), min(2, self.order) - 1, -1):
            if (found := self.entries.get(text[len(text) - length :])) is not None:
                return found[1]
        return ()


@dataclass(frozen=True)
class RecycledValue:
    """[(token, share among these)] of the k likeliest tokens after each token, likeliest first."""

    vocab: int
    k: int
    after: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)


def empty(kind: str, args: tuple[int, ...]) -> Any:
    """The reference value of a new state."""
    return {"trie": TrieValue, "ngrams": NgramsValue, "recycling": RecycledValue, "governor": GovernorValue}[kind](*args)


def state_args(type: Type, kind: str) -> tuple[int, ...]:
    """The arguments of a state's type; TypeMismatch for another kind."""
    if not isinstance(type, State) or type.kind != kind:
        raise TypeMismatch(f"{type!r} is not of the kind {kind!r}")
    return tuple(int(a) for a in type.args)


class EmptyState(ProgramOp):
    """`empty_state(kind=, args=) -> State[kind, *args]`: a new table: "trie" (capacity,), "ngrams" (order, k), "recycling"
    (vocab, k) or "governor" (size, sources). Persistent parameters of these types begin like this."""

    name = "empty_state"
    tags = frozenset({"leaf"})

    def infer(self, *, kind: str, args: tuple[int, ...]) -> Type:
        if kind not in KINDS or len(args) != KINDS[kind] or not all(isinstance(a, int) and a >= 1 for a in args):
            raise TypeMismatch(f"there is no empty state {kind!r} with the arguments {args}")
        return State(kind, args)

    def evaluate(self, ctx: Any, *, kind: str, args: tuple[int, ...]) -> Any:
        return empty(kind, args)


class SuffixLookup(ProgramOp):
    """`suffix_lookup(sequences of 1, token i32[1], longest=, length=) -> (i32[length], i32())`: prompt lookup (Saxena 2023).

    What followed the most recent earlier occurrence of the longest suffix (at most `longest` tokens) of the text with the token at
    its end; the text goes on with what was found when the occurrence is near its end. -1 throughout when there is none. Then the
    length of that suffix.
    """

    name = "suffix_lookup"

    def infer(self, sequences: State, token: Tensor, *, longest: int, length: int) -> Type:
        sequences_type(sequences, 1)
        expect(token, Tensor("i32", (1,)), "the token")
        if longest < 1 or length < 1:
            raise TypeMismatch("needs longest >= 1 and length >= 1")
        return Tuple((Tensor("i32", (length,)), I32))

    def evaluate(self, ctx: Any, sequences: Any, token: Any, *, longest: int, length: int) -> Any:
        text = [*sequences.histories[0], int(token[0])]
        best, after = 0, 0
        for end in range(len(text) - 1, 0, -1):  # an occurrence is text[end - n : end]
            n = 0
            while n < min(longest, end) and text[end - 1 - n] == text[-1 - n] and not isinstance(text[-1 - n], tuple):
                n += 1
            if n > best:
                best, after = n, end
        found: list[int] = []
        for i in range(length if best else 0):
            following = text[after + i] if after + i < len(text) else found[after + i - len(text)]
            if isinstance(following, tuple):
                break
            found.append(following)
        return np.array([*found, *[-1] * (length - len(found))], np.int32), np.int32(best)


# ---- trie -------------------------------------------------------------------------------------------------------------


class TrieLearn(ProgramOp):
    """`trie_learn(trie, sequences of 1, start i32(), branch=) -> trie`: counts the runs of up to `branch` tokens that end at or
    after position `start` of the text. Learning a text part by part is learning it whole; a run is counted when the run without its
    last token was there before. Mixed tokens break runs."""

    name = "trie_learn"

    def infer(self, trie: State, sequences: State, start: Tensor, *, branch: int) -> Type:
        (capacity,) = state_args(trie, "trie")
        sequences_type(sequences, 1)
        expect(start, I32, "the start")
        if not 2 <= branch <= capacity:
            raise TypeMismatch(f"branch={branch} is not between 2 and the capacity, {capacity}")
        return trie

    def evaluate(self, ctx: Any, trie: Any, sequences: Any, start: Any, *, branch: int) -> Any:
        text, counts = sequences.histories[0], dict(trie.counts)
        for end in range(max(int(start), 0), len(text)):
            while len(counts) + branch > trie.capacity:
                halved: dict[tuple[int, ...], int] = {}
                for run, n in counts.items():  # parents come before children; a run may be lost with the one before it
                    if n > 1 and (len(run) == 1 or run[:-1] in halved):
                        halved[run] = n // 2
                counts = halved
            for length in range(min(branch, end + 1), 0, -1):
                run = text[end + 1 - length : end + 1]
                if not any(isinstance(t, tuple) for t in run) and (length == 1 or run[:-1] in counts):
                    counts[run] = counts.get(run, 0) + 1
        return TrieValue(trie.capacity, counts)


class TrieDraft(ProgramOp):
    """`trie_draft(trie, sequences of 1, tree, branch=, source=0) -> tree`: adds what followed the end of the text.

    The text ends with the tree's root. For each suffix of the text of at most branch - 1 tokens that was seen, longest first, its
    continuations are added by falling frequency (ties: the lower token, the shallower node) until the tree is full. The score of a
    node is its count over that of the run before it, at most 1.
    """

    name = "trie_draft"

    def infer(self, trie: State, sequences: State, tree: State, *, branch: int, source: int = 0) -> Type:
        state_args(trie, "trie")
        sequences_type(sequences, 1)
        tree_size(tree)
        return tree

    def evaluate(self, ctx: Any, trie: Any, sequences: Any, tree: Any, *, branch: int, source: int) -> Any:
        text, below = (*sequences.histories[0], tree.tokens[0]), trie.children()
        for length in range(min(branch - 1, len(text)), 0, -1):
            heap: list[tuple[float, int, int, int, tuple[int, ...], float]] = []

            def offer(run: tuple[int, ...], node: int, value: float, depth: int) -> None:
                for longer in below.get(run, ()):
                    score = min(float(np.float32(trie.counts[longer] / trie.counts[run])), 1.0)
                    heapq.heappush(heap, (-value * score, depth, longer[-1], node, longer, score))

            if text[len(text) - length :] in trie.counts:
                offer(text[len(text) - length :], 0, 1.0, 1)
            while heap:
                value, depth, token, parent, run, score = heapq.heappop(heap)
                tree, node = tree.add(parent, token, score, source)
                if node < 0:
                    return tree
                offer(run, node, -value, depth + 1)
        return tree


# ---- n-grams ----------------------------------------------------------------------------------------------------------


def likeliest(row: Any, k: int) -> tuple[tuple[int, float], ...]:
    """The tokens of the k largest logits of a row, ties to the lower one, with their shares in the sum of e^logit of these, f32."""
    best = np.argsort(-row, kind="stable")[:k]
    p = np.exp((row[best] - row.max()).astype(np.float64)).astype(np.float32).astype(np.float64)
    p = (p / p.sum()).astype(np.float32)
    return tuple((int(t), float(share)) for t, share in zip(best, p, strict=True))


class NgramsLearn(ProgramOp):
    """`ngrams_learn(ngrams, sequences of 1, [logits f32[n, vocab]]) -> ngrams`: averages in what the model computed.

    While a tree is followed, row i of logits is node i's, and the followed nodes are learned, each after its own text; without a
    tree row 0 is that of the whole text. Without logits, those of the followed nodes as they ran. The average of c distributions
    takes in another with the weight 1 / (c + 1), tokens that one of them lacks count 0, and the k likeliest stay. Of a distribution
    only the k likeliest tokens are taken, whose probabilities then sum to 1.
    """

    name = "ngrams_learn"

    def infer(self, ngrams: State, sequences: State, logits: Tensor | None = None) -> Type:
        state_args(ngrams, "ngrams")
        _, _, vocab, _ = sequences_type(sequences, 1)
        if logits is None:
            return ngrams
        if not isinstance(logits, Tensor) or logits.dtype != "f32" or logits.rank != 2 or logits.shape[1] != vocab:
            raise TypeMismatch(f"the logits are f32[n, {vocab}], not {logits!r}")
        return ngrams

    def evaluate(self, ctx: Any, ngrams: Any, sequences: Any, logits: Any = None) -> Any:
        entries = dict(ngrams.entries)
        base = len(sequences.base)
        rows = [(node, base + i + 1) for i, node in enumerate(sequences.visited)]
        if sequences.tree is None:
            rows = [(0, base)] if logits is not None else []
        for row, end in rows:
            if logits is not None and row >= len(logits):
                continue
            seen = sequences.model(sequences.histories[0][:end])[0] if logits is None else logits[row]
            new = dict(likeliest(seen, ngrams.k))
            for length in range(min(2, ngrams.order), min(ngrams.order, end) + 1):
                context = sequences.histories[0][end - length : end]
                if any(isinstance(t, tuple) for t in context):
                    break
                if context not in entries:
                    while len(entries) >= CONTEXTS:
                        entries = {c: (n // 2, e) for c, (n, e) in entries.items() if n > 1}
                count, old = entries.get(context, (0, ()))
                known = dict(old)
                both = {t: (count * known.get(t, 0.0) + new.get(t, 0.0)) / (count + 1) for t in known | new}
                entries[context] = count + 1, tuple(sorted(both.items(), key=lambda e: (-e[1], e[0]))[: ngrams.k])
        return NgramsValue(ngrams.order, ngrams.k, entries)


class NgramsDraft(ProgramOp):
    """`ngrams_draft(ngrams, sequences of 1, tree, temperature f32(), seed i64(), sequence i64(), source=0) -> tree`.

    Adds the continuations of the text, which ends with the tree's root, by falling probability of their paths (ties: the shallower
    node, the lower token) until the tree is full; a node's children are those of the longest known context at its end. The
    probability of a child is the stored one; at a temperature the counted noise that `select` will add is added to its logarithm
    (over the temperature), so that both tend to choose the same token, and the result is shared out again among the children.
    """

    name = "ngrams_draft"

    def infer(
        self, ngrams: State, sequences: State, tree: State, temperature: Tensor, seed: Tensor, sequence: Tensor, *, source: int = 0
    ) -> Type:
        state_args(ngrams, "ngrams")
        sequences_type(sequences, 1)
        tree_size(tree)
        for type, expected, name in ((temperature, F32, "temperature"), (seed, I64, "seed"), (sequence, I64, "sequence")):
            expect(type, expected, f"the {name}")
        return tree

    def evaluate(
        self, ctx: Any, ngrams: Any, sequences: Any, tree: Any, temperature: Any, seed: Any, sequence: Any, *, source: int
    ) -> Any:
        heap: list[tuple[float, int, int, int, float]] = []

        def offer(node: int, value: float, depth: int) -> None:
            text = (*sequences.histories[0], *(tree.tokens[i] for i in tree.path(node)))
            for token, p in weighted(ngrams.lookup(text), float(temperature), int(seed), int(sequence), len(text)):
                heapq.heappush(heap, (-value * p, depth, token, node, p))

        offer(0, 1.0, 1)
        while heap:
            value, depth, token, parent, p = heapq.heappop(heap)
            tree, node = tree.add(parent, token, p, source)
            if node < 0:
                break
            offer(node, -value, depth + 1)
        return tree


def weighted(
    found: tuple[tuple[int, float], ...], temperature: float, seed: int, sequence: int, position: int
) -> list[tuple[int, float]]:
    """Stored (token, probability) with the noise of a position taken in."""
    kept = [(token, p) for token, p in found if p > 0]
    if temperature <= 0 or not kept:
        return kept
    noise = gumbel_noise(seed, sequence, position, max(token for token, _ in kept) + 1)
    x = np.array([np.log(p) / temperature + noise[token] for token, p in kept])
    e = np.exp(x - x.max())
    shares = (e / e.sum()).astype(np.float32).tolist()
    return [(token, share) for (token, _), share in zip(kept, shares, strict=True)]


# ---- recycling --------------------------------------------------------------------------------------------------------


class RecyclingLearn(ProgramOp):
    """`recycling_learn(recycling, sequences of 1) -> recycling`: after each token of the tree that ran, followed or not, what the
    model found likeliest, with shares in the sum of e^logit over these tokens; of equal tokens the last node counts."""

    name = "recycling_learn"

    def infer(self, recycling: State, sequences: State) -> Type:
        vocab, k = state_args(recycling, "recycling")
        _, _, known, _ = sequences_type(sequences, 1)
        if vocab != known or k > vocab:
            raise TypeMismatch(f"a table of {k} of {vocab} tokens does not fit a model with {known}")
        return recycling

    def evaluate(self, ctx: Any, recycling: Any, sequences: Any) -> Any:
        after = dict(recycling.after)
        if sequences.tree is not None:
            tree = sequences.tree
            for node in range(sequences.ran):
                path = tuple(tree.tokens[i] for i in tree.path(node))
                after[tree.tokens[node]] = likeliest(sequences.model((*sequences.base, *path))[0], recycling.k)
        return RecycledValue(recycling.vocab, recycling.k, after)


class RecyclingDraft(ProgramOp):
    """`recycling_draft(recycling, tree, parents=, ranks=, source=0) -> tree`: adds guesses in the form of a fixed tree.

    Guess i + 1 is the token of rank ranks[i] after guess parents[i], of which 0 is the tree's root; it is left out where its parent
    is, or where nothing is known. Its score is the token's share.
    """

    name = "recycling_draft"

    def infer(self, recycling: State, tree: State, *, parents: tuple[int, ...], ranks: tuple[int, ...], source: int = 0) -> Type:
        _, k = state_args(recycling, "recycling")
        tree_size(tree)
        if len(parents) != len(ranks) or not all(0 <= a <= i for i, a in enumerate(parents)) or not all(0 <= r < k for r in ranks):
            raise TypeMismatch("a fixed tree has a parent before each guess, and a rank of those that the table keeps")
        return tree

    def evaluate(
        self, ctx: Any, recycling: Any, tree: Any, *, parents: tuple[int, ...], ranks: tuple[int, ...], source: int
    ) -> Any:
        nodes = [0]
        for parent, rank in zip(parents, ranks, strict=True):
            known = recycling.after.get(tree.tokens[nodes[parent]], ()) if nodes[parent] >= 0 else ()
            node = -1
            if known:
                tree, node = tree.add(nodes[parent], *known[rank], source)
            nodes.append(node)
        return tree


empty_state, suffix_lookup = EmptyState(), SuffixLookup()
trie_learn, trie_draft = TrieLearn(), TrieDraft()
ngrams_learn, ngrams_draft = NgramsLearn(), NgramsDraft()
recycling_learn, recycling_draft = RecyclingLearn(), RecyclingDraft()
