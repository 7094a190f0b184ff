"""The pipelines: literal lists of passes. This file is the compiler's table of contents.

plain graph -> RAISING -> preset and user passes of the stage "model" -> decode step, fusion       for each model
all models and the decoding programs -> user passes of the stage "program" -> code generation     once
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
    # The checkpoint's weights as they are stored, f32 arithmetic: every pass is labelled identical. For 16-bit checkpoints this is
    # LayerCast (Yuan et al. 2025, arXiv 2506.09501): 16-bit storage, 32-bit arithmetic.
    "exact": (),
    # Half the bytes of bf16, 8-bit products.
    "balanced": (Quantize(bits=8), RoundActivations(dtype="int8")),
    # A quarter of the bytes of bf16, 8-bit products.
    "small": (Quantize(bits=4, group=64), RoundActivations(dtype="int8")),
}


def pipeline(
    preset: str, added: Sequence[Pass], *, causal: bool, rows: int, hidden: bool = False, context: int = 0, mix: int = 1
) -> tuple[Pass, ...]:
    """The whole pipeline of one model: those `added` passes that are of the stage "model" run after those of the preset.

    rows, hidden, context, mix: see `Incremental`, for causal language models. PassError for an unknown preset.
    """
    if preset not in PRESETS:
        raise PassError(f"There is no preset {preset!r}. Choose one of {', '.join(PRESETS)}.")
    return (
        *RAISING,  # recover norms, activations, rotary embeddings, attention and its masks
        *PRESETS[preset],  # quantize
        *(p for p in added if p.stage == "model"),  # the user's own
        *((Incremental(rows, hidden, context, mix),) if causal else ()),  # derive the decode step
        Canonicalize(),  # what became trivial
        JoinLinears(),  # q, k and v; gate and up
        Fuse(),  # one kernel per group
    )


def program_passes(added: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes that run on the module of all models with their decoding programs."""
    return tuple(p for p in added if p.stage == "program")
