"""Drafting with the target itself, less the neurons that a token's gates do not pick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stemma.passes.base import Needs
from stemma.passes.contextual_sparsity import ContextualSparsity
from stemma.passes.drafters.draft_model import DraftModel


@dataclass(frozen=True)
class Sparse(DraftModel):
    """The target with contextual sparsity drafts, the whole one corrects every few tokens (Sirius, Zhou et al. 2024,
    arXiv:2409.03856, whose corrections rewrite the cache; here the sparse model has one of its own, and no token differs).

    keep: the share of neurons. The other options are those of draft_model.
    """

    model: str = "sparse"
    shape: str = "chain"  # type: ignore[assignment]
    length: int = 4
    keep: float = 0.3
    name: ClassVar[str] = "sparse"
    slow: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(made=(ContextualSparsity(self.keep, self.model),))
