"""Drafting with a small model: chains, fixed trees, dynamic trees, and trees of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from stemma.ir import Array, PassError, SizeLike
from stemma.ir import trace as p
from stemma.ir.trace import Sequences, Tree, Value
from stemma.ir.trace_scope import Cell
from stemma.passes.base import ModelInfo, Needs
from stemma.passes.drafters.base import DraftContext, Drafter, Q, State, best_layer, flat
from stemma.passes.drafters.shapes import RANKS, likeliest

OVERLAP = 0.05  # the least share of the target's tokens that the draft model must know
LOWEST = float("-inf")


@dataclass(frozen=True)
class DraftModel(Drafter):
    """Guesses of a smaller model (Leviathan et al. 2023), which runs on the growing tree. length: layers at most.

    shape: "chain", which ends at a path probability below `least`; "tree", the fixed tree of a budget (Sequoia, Chen et al. 2024);
    "dyspec", the tree of the likeliest paths (DySpec, Xiong et al. 2024, arXiv:2410.11744) by layers of at most `width` nodes with
    a path probability of 1 / budget or more, or with exact=true node by node, which gives the very best tree; "rsd", `width`
    samples without replacement after every node, and "beam", `width` samples of each layer (RSD-C and RSD-S, Jeon et al. 2024,
    arXiv:2402.14160). sharpness: log-probabilities are multiplied by it, as a token that both models choose (greedily, or with the
    same noise) is more certain than a token that is drawn.
    """

    model: str = "draft"
    shape: Literal["chain", "tree", "dyspec", "rsd", "beam"] = "dyspec"
    length: int = 8
    width: int = 16
    least: float = 0.0
    exact: bool = False
    sharpness: float = 2.0
    name: ClassVar[str] = "draft_model"
    slow: ClassVar[bool] = True

    @property
    def samples(self) -> bool:
        return self.shape in ("rsd", "beam")

    def needs(self) -> Needs:
        return Needs(models=(self.model,))

    def check(self, context: DraftContext) -> None:
        table = self.info(context).from_target
        if table is not None and (share := float((table >= 0).mean())) < OVERLAP:
            raise PassError(
                f"The models {self.model!r} and {context.model!r} have {share:.1%} of their tokens in common; drafting needs"
                f" {OVERLAP:.0%} or more. Choose a draft model with a tokenizer of the same family."
            )

    def info(self, context: DraftContext) -> ModelInfo:
        return self.given(context, self.model)

    @property
    def text_name(self) -> str:
        return f"{self.model}_text"

    def begin(self, context: DraftContext) -> Mapping[str, Value | Cell]:
        info = self.info(context)
        spec = p.ModelSpec(info.vocab, info.width, info.eos, info.context)
        begun: dict[str, Value | Cell] = {self.text_name: p.Model(self.model, spec).start(p.array([], "i32"))}
        if self.samples and context.verify == "recursive":
            begun[Q] = p.full((context.size + 1, context.vocab), 0.0)
        return begun

    def draft(self, context: DraftContext, text: Sequences, token: Value, tree: Tree, state: State) -> None:
        grown = Grown(context, self.info(context), text, token, tree, state[self.text_name], self.sharpness)
        shapes = {"chain": self.layers, "tree": self.fixed, "dyspec": self.nodes if self.exact else self.layers}
        shapes.get(self.shape, self.sampled)(context, grown, state)

    def fixed(self, context: DraftContext, grown: Grown, state: State) -> None:
        """Layer by layer the ranks of the fixed tree."""
        nodes, logits = p.array([0]), grown.expand(1)
        levels = likeliest(context.size - 1, RANKS, self.length)
        for depth, level in enumerate(levels):
            places, ranks = p.array([place for place, _ in level]), p.array([rank for _, rank in level])
            scores, tokens = p.top_k(grown.likely(logits, depth), len(RANKS))
            at = places * len(RANKS) + ranks
            nodes = grown.extend(nodes[places], flat(tokens)[at], flat(scores)[at])
            if depth + 1 < len(levels):
                logits = grown.expand(len(level))

    def layers(self, context: DraftContext, grown: Grown, state: State) -> None:
        """Layer by layer the likeliest paths; at width 1 a chain."""
        width = 1 if self.shape == "chain" else min(self.width, context.size - 1)
        least = self.least if self.shape == "chain" else 1.0 / context.size

        def layer(nodes: Value, paths: Value, logits: Value, depth: Value, count: Value) -> tuple[object, ...]:
            best = best_layer(paths, grown.likely(logits, depth), width, least)
            after = grown.extend(nodes[best.places], best.tokens, best.scores)
            added = (after >= 0).int().sum()
            more = (added > 0) & (depth + 1 < self.length) & (count + added < context.limit)
            return more, after, best.paths, p.cond(more, lambda: grown.expand(width), lambda: logits), depth + 1, count + added

        root = p.array([0] + [-1] * (width - 1))
        p.loop(layer, root, p.where(root >= 0, 1.0, 0.0), grown.expand(width), p.as_value(0), p.as_value(1))

    def nodes(self, context: DraftContext, grown: Grown, state: State) -> None:
        """Always the likeliest path of all that the tree does not have: its end becomes a node, and the model runs on that."""
        size, width = context.size, min(self.width, context.vocab)

        def add(ends: Value, scores: Value, tokens: Value, paths: Value, depths: Value, last: Value) -> tuple[object, ...]:
            """[size, width]: path probability (-1: none, or in the tree), probability and token of each node's best children."""
            best, found = p.top_k(grown.likely(grown.expand(1), depths[last]), width)
            ends = ends.put(last, p.where(depths[last] < self.length, paths[last] * best[0], -1.0))
            scores, tokens = scores.put(last, best[0]), tokens.put(last, found[0])
            at = flat(ends).argmax()
            node = grown.extend((at // width)[None], flat(tokens)[at][None], flat(scores)[at][None])[0]
            new = p.maximum(node, 0)
            paths, depths = paths.put(new, flat(ends)[at]), depths.put(new, depths[at // width] + 1)
            return (
                (node >= 0) & (new + 1 < context.limit),
                flat(ends).put(at, -1.0).reshape(size, width),
                scores,
                tokens,
                paths,
                depths,
                new,
            )

        none, zeros = p.full((size, width), -1.0), p.full(size, 0)
        p.loop(add, none, none, none.int(), zeros.float() + 1.0, zeros, p.as_value(0))

    def sampled(self, context: DraftContext, grown: Grown, state: State) -> None:
        """Samples without replacement: the largest of log q + Gumbel noise, of each node or of a layer."""
        nodes, paths, above, logits = p.array([0]), p.full(1, 0.0), p.full(1, 0.0), grown.expand(1)
        width, count = min(self.width, context.size - 1), 1
        for depth in range(self.length):
            likely = grown.likely(logits, depth)
            drawn = p.log(likely)
            if Q in state:
                state[Q].value = state[Q].value.put(p.where(nodes < 0, context.size, nodes), likely)
                drawn = drawn + context.noise(grown.positions(depth, likely.shape[0]))
            if self.shape == "beam":
                total = conditioned(paths[:, None] + drawn, above) if Q in state else paths[:, None] + drawn
                each, tokens = p.top_k(total, width)
                above, at = p.top_k(flat(each), width)
                tokens = p.where(above > float("-inf"), flat(tokens)[at], -1)
                places = at // width
            else:
                each, tokens = p.top_k(drawn, width)
                places, tokens = p.array([i // width for i in range(width * len(nodes))]), flat(tokens)
                above = flat(each)
            scores = flat(likely)[places * context.vocab + p.maximum(tokens, 0)]
            paths = p.where(tokens >= 0, paths[places] + p.log(scores), float("-inf"))
            nodes = grown.extend(nodes[places], tokens, scores)
            count += len(nodes)
            if count >= context.size or depth + 1 == self.length:
                break
            logits = grown.expand(len(nodes))


def conditioned(perturbed: Value, above: Value) -> Value:
    """Perturbed log-probabilities f32[n, vocab] of children, so that the largest of each row is the node's own, above f32[n].

    -log(exp(-above) - exp(-largest) + exp(-perturbed)), stable: Kool et al. 2019 (arXiv:1903.06059), appendix B.3.
    """
    largest = perturbed.max(-1)[:, None]
    v = above[:, None] - perturbed + p.log(1.0 - p.exp(p.minimum(perturbed - largest, 0.0)))
    return above[:, None] - p.maximum(v, 0.0) - p.log(1.0 + p.exp(-abs(v)))


class Grown:
    """A tree that grows in the target's tokens, and the same tree in those of the draft model, which runs on it."""

    def __init__(
        self, context: DraftContext, info: ModelInfo, text: Sequences, token: Value, tree: Tree, own: Sequences, sharpness: float
    ) -> None:
        self.sharpness = sharpness
        self.context, self.tree, self.own, self.same = context, tree, own, tree
        self.length = text.length()
        self.table: Value | None = None
        if info.from_target is not None:
            self.table = p.array(one_to_one(info.from_target))
            self.same = p.tree(p.maximum(self.table[token], 0), context.size, context.size)
        own.sync(text, self.table)

    def expand(self, fresh: int) -> Value:
        """Runs the new nodes; logits of the first `fresh` of them in the target's vocabulary, f32[fresh, vocab]."""
        logits = self.own.expand(self.same, fresh)
        if self.table is None:
            return logits
        return p.where(self.table >= 0, logits[:, p.maximum(self.table, 0)], LOWEST)

    def likely(self, logits: Value, depth: Value | int) -> Value:
        """Probabilities of the program's choice after nodes of a depth (the root's: 0)."""
        return self.context.likely(logits, self.positions(depth, logits.shape[0]), self.sharpness)

    def positions(self, depth: Value | int, count: SizeLike) -> Value:
        """The length of the text at which a choice after nodes of a depth is made, i32[count]."""
        return (self.length + 1 + depth).broadcast_to(count)

    def extend(self, parents: Value, tokens: Value, scores: Value) -> Value:
        """Adds children; their numbers, which are equal in both trees."""
        nodes = self.context.extend(self.tree, parents, tokens, scores)
        if self.table is not None:
            self.same.extend(parents, p.where(nodes >= 0, self.table[p.maximum(tokens, 0)], -1), scores)
        return nodes


def one_to_one(table: Array) -> Array:
    """The table with -1 for all but the first of the entries that are equal."""
    first = np.unique(table, return_index=True)[1]
    return np.where(np.isin(np.arange(len(table)), first), table, -1)
