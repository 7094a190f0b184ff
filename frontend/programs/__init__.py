"""The library of decoding programs. Each is traced for the models of an artifact; PROGRAMS has them by name."""

from collections.abc import Mapping
from types import MappingProxyType

from stemma.frontend.programs.beam import beam_search, diverse_beam_search
from stemma.frontend.programs.cautious import cautious
from stemma.frontend.programs.constrained import constrained, constrained_beam
from stemma.frontend.programs.contrastive import contrastive_search
from stemma.frontend.programs.generate import generate
from stemma.frontend.programs.parallel import best_of_n, first_finish, self_consistency, short_m_at_k
from stemma.frontend.programs.steps import a_star, particle_filter, step_beam
from stemma.frontend.programs.superposed import superposed
from stemma.frontend.programs.switching import entropy_adaptive, leader_follows
from stemma.ir.trace import Program

_ALL = (
    generate, beam_search, diverse_beam_search, contrastive_search, cautious, superposed,  # one text
    best_of_n, self_consistency, first_finish, short_m_at_k,  # several, one of which is chosen
    particle_filter, step_beam, a_star,  # step by step, led by a score
    constrained, constrained_beam,
    entropy_adaptive, leader_follows,  # two models
)  # fmt: skip
PROGRAMS: Mapping[str, Program] = MappingProxyType({p.name: p for p in _ALL})

__all__ = [
    "PROGRAMS", "a_star", "beam_search", "best_of_n", "cautious", "constrained", "constrained_beam", "contrastive_search",
    "diverse_beam_search", "entropy_adaptive", "first_finish", "generate", "leader_follows", "particle_filter", "self_consistency",
    "short_m_at_k", "step_beam", "superposed",
]  # fmt: skip
