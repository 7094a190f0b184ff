"""Drafting with the first layers of the target itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.passes import early_exit as passes
from stemma.passes.base import Needs
from stemma.passes.drafters.draft_model import DraftModel


@dataclass(frozen=True)
class EarlyExit(DraftModel):
    """The target stopped after some layers (Zhang et al. 2023, Draft & Verify; Elhoushi et al. 2024, LayerSkip), which shares its
    weights. layers: how many. The other options are those of draft_model."""

    model: str = "early"
    layers_kept: int = 1
    name: ClassVar[str] = "early_exit"
    slow: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(made=(passes.EarlyExit(self.layers_kept, self.model),))
