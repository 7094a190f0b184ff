"""The pipelines: literal lists of passes. This file is the compiler's table of contents.

plain graph -> RAISING -> preset and user passes -> LANGUAGE_MODEL or OTHER_MODEL -> code generation
"""

from __future__ import annotations

from collections.abc import Sequence

from stemma.ir import PassError
from stemma.passes.base import Pass
from stemma.passes.canonicalize import Canonicalize
from stemma.passes.fuse import Fuse, JoinLinears
from stemma.passes.incremental import Incremental
from stemma.passes.quantize import Quantize, RoundActivations
from stemma.passes.raising import RAISING

PRESETS: dict[str, tuple[Pass, ...]] = {
    # The checkpoint's weights as they are stored, f32 arithmetic: every pass is labelled identical.
    "exact": (),
    # Half the bytes of bf16, 8-bit products.
    "balanced": (Quantize(bits=8), RoundActivations(dtype="int8")),
    # A quarter of the bytes of bf16, 8-bit products.
    "small": (Quantize(bits=4, group=64), RoundActivations(dtype="int8")),
}


def pipeline(preset: str, added: Sequence[Pass], *, causal: bool, rows: int) -> tuple[Pass, ...]:
    """The whole pipeline: `added` passes run after those of the preset. PassError for an unknown preset."""
    if preset not in PRESETS:
        raise PassError(f"There is no preset {preset!r}. Choose one of {', '.join(PRESETS)}.")
    return (
        *RAISING,  # recover norms, activations, rotary embeddings, attention and its masks
        *PRESETS[preset],  # quantize
        *added,  # the user's own
        *((Incremental(rows=rows),) if causal else ()),  # derive the decode step
        Canonicalize(),  # what became trivial
        JoinLinears(),  # q, k and v; gate and up
        Fuse(),  # one kernel per group
    )
