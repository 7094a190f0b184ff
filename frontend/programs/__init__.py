"""The library of decoding programs. Each is traced for the models of an artifact; PROGRAMS has them by name."""

from collections.abc import Mapping
from types import MappingProxyType

from stemma.frontend.programs.beam import beam_search, diverse_beam_search
from stemma.frontend.programs.generate import generate
from stemma.frontend.programs.parallel import best_of_n, first_finish, self_consistency, short_m_at_k
from stemma.frontend.programs.steps import a_star, particle_filter, step_beam
from stemma.ir.trace import Program

_ALL = (
    generate, beam_search, diverse_beam_search, best_of_n, self_consistency, first_finish, short_m_at_k, particle_filter, step_beam,
    a_star,
)  # fmt: skip
PROGRAMS: Mapping[str, Program] = MappingProxyType({p.name: p for p in _ALL})

__all__ = [
    "PROGRAMS", "a_star", "beam_search", "best_of_n", "diverse_beam_search", "first_finish", "generate", "particle_filter",
    "self_consistency", "short_m_at_k", "step_beam",
]  # fmt: skip
