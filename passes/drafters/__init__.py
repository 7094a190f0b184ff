"""Drafters by name: `make_drafters("recycling+draft_model{length=4}")`."""

from __future__ import annotations

from stemma.passes.drafters.base import DraftContext, Drafter, Q, State, Table
from stemma.passes.drafters.registry import all_drafters, make_drafters

__all__ = ["DraftContext", "Drafter", "Q", "State", "Table", "all_drafters", "make_drafters"]
