"""How many bytes speculation needs: for the positions of its trees, and for what it keeps from request to request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stemma.ir import Module, PassError, Size, State, Tensor, Type, dtype, size
from stemma.ir.ops.governor import AGREED, BUCKETS, DEPTHS, RECENT
from stemma.ir.ops.tables import CONTEXTS


def kept_bytes(type: Type) -> int:
    """Bytes of a value that a drafter keeps: of a tensor its elements, of a state at most those of its native structures when full.

    PassError for a state that cannot be kept.
    """
    if isinstance(type, Tensor):
        return int(size.bounds(type.elements)[1]) * dtype(type.dtype).bits // 8
    if not isinstance(type, State) or type.kind not in STATES:
        raise PassError(f"speculate: {type!r} cannot be kept; there are: tensors and the states {', '.join(STATES)}.")
    return STATES[type.kind](*(int(a) for a in type.args))


def slot_bytes(module: Module, model: str) -> int:
    """Bytes of one position in the caches of a model; 0 when the module does not have its step."""
    name = "step" if model == "model" else f"{model}_step"
    if name not in [f.name for f in module]:
        return 0
    total = 0
    for cache in module[name].params:
        if any(isinstance(s, Size) and str(s) == "slots" for s in cache.shape):
            total += size.evaluate(cache.tensor.bytes, {"slots": 1})
    return total


def _trie(capacity: int) -> int:
    """20 bytes a run and the empty one, in an array that doubles; a hash table of at most 4 words of 8 bytes for each."""
    return 2 * 20 * (capacity + 1) + 8 * max(4 * capacity, 64) + 4096


def _ngrams(order: int, k: int) -> int:
    """Of each context its counts, its tokens, and the tokens and shares after it, in arrays that double; 4 hash entries of each."""
    return CONTEXTS * (2 * (16 + 4 * (order + 1) + 12 * k) + 4 * 4) + 4096


def _recycling(vocab: int, k: int) -> int:
    """A token and its share."""
    return 8 * vocab * k


def _governor(size: int, sources: int) -> int:
    """Of each drafter the acceptance by class and how often each was tried, what its first 64 nodes bring; the seconds of calls."""
    return sources * (16 * DEPTHS * AGREED * RECENT * BUCKETS + 8 * RECENT * 65 + 512) + 32768


STATES: Mapping[str, Callable[..., int]] = {"trie": _trie, "ngrams": _ngrams, "recycling": _recycling, "governor": _governor}
"""Upper bounds by kind; the structures are those of backends/cpu/machine/{tables,governor}.hpp."""
