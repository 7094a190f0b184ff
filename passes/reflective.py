"""Reflective verification: the model looks at a drafted chain twice in one call, the second time after a short text of its own.

    root  d1 ... dk  r1 ... rm  d1 ... dk      one path of 1 + 2k + m nodes; r: the reflection
    l0    l1 ... lk        m0   m1 ... mk      logits: the second look m_i guesses the same token as l_i

The token after node i is chosen from log((1 - alpha) softmax(l_i) + alpha softmax(m_i)); only nodes of the first copy are followed.
Wang et al. 2025, Think Before You Accept: Semantic Reflective Verification for Faster Speculative Decoding (arXiv:2505.18629).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stemma.ir import Node, PassError, ops
from stemma.ir import trace as p
from stemma.ir.ops.reflect import mix_logits
from stemma.ir.trace import Sequences, Tree, Value


@dataclass(frozen=True)
class Reflection:
    """tokens: the reflection. alpha: the weight of the second look. context: tokens that the model can take."""

    tokens: tuple[int, ...]
    alpha: float
    context: int

    def length(self, nodes: int) -> int:
        """The longest chain below the root of which a call of `nodes` nodes can hold two copies; 0 or less: none."""
        return (nodes - 1 - len(self.tokens)) // 2

    def nodes(self, size: int) -> int:
        """Nodes of a call in which a chain of `size` nodes, root included, is looked at twice."""
        return 2 * size - 1 + len(self.tokens)

    def limit(self, limit: Value, text: Sequences, size: int) -> Value:
        """The limit of a tree, i32(): 1, the root alone, where the context has no room for a second look."""
        return p.where(text.length()[0] + self.nodes(size) <= min(self.context, 2**31 - 1), limit, 1)

    def repeated(self, chain: Tree, token: Value, size: int) -> Tree:
        """The chain, the reflection and the chain again below the token i32[1]; the token alone when the chain is no longer."""
        nodes, more = self.nodes(size), len(self.tokens)
        count, tokens, _ = chain.nodes()
        at = p.arange(nodes - 1) + 1
        again = at - more - count + 1  # which node of the chain is repeated
        known = p.concat(tokens, p.array(self.tokens))
        place = p.where(at < count, at, p.where(again < 1, at - count + len(tokens), again))
        drafted = p.where(again < count, known[p.minimum(place, len(known) - 1)], -1)
        tree = p.tree(token, p.where(count > 1, nodes, 1), nodes)
        tree.extend(p.arange(nodes - 1), drafted, p.full(nodes - 1, 1.0))
        return tree

    def begin(self, chain: Tree, logits: Value) -> dict[str, Node]:
        """What the loop that follows the chain carries: logits f32[nodes, vocab] of all nodes, which of them is the second look at
        the node that is followed next, i32[1], and its weight, f32()."""
        count = chain.nodes()[0]
        mirror = (count - 1 + len(self.tokens)).reshape(1)
        return {"looks": logits.node, "mirror": mirror.node, "weight": p.where(count > 1, self.alpha, 0.0).node}


def mixed(logits: Node, looks: Node, mirror: Node, weight: Node) -> Node:
    """The logits f32[1, vocab] of both looks at a node, from those of the first."""
    return mix_logits(logits, ops.take(looks, mirror, axis=0), weight)


def reflection_tokens(text: str, folder: Path | None, vocab: int) -> tuple[int, ...]:
    """The ids of a text by the tokenizer in a checkpoint's folder; PassError when there is none, or the text has no tokens."""
    path = None if folder is None else folder / "tokenizer.json"
    if path is None or not path.is_file():
        where = "no checkpoint is at hand" if path is None else f"there is no {path}"
        raise PassError(f"speculate: the reflection is encoded by the checkpoint's tokenizer, and {where}.")
    from tokenizers import Tokenizer

    try:
        ids = tuple(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids)
    except Exception as error:  # tokenizers has no error class of its own
        raise PassError(f"speculate: the tokenizer in {path} cannot be read: {error}.") from None
    if not ids or max(ids) >= vocab:
        what = "no tokens" if not ids else f"the token {max(ids)}, which the model does not have"
        raise PassError(f"speculate: the reflection {text!r} has {what}.")
    return ids
