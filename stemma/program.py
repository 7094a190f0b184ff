"""Decoding programs: write one with `from stemma import program as p`, or take one of the library (`p.beam_search`).

`p.PROGRAMS` are all programs of the library by name. The module docstring of `stemma.ir.trace` says how to write one.
"""

from stemma.frontend.programs import *  # noqa: F403
from stemma.frontend.programs import __all__ as _library
from stemma.ir.trace import *  # noqa: F403
from stemma.ir.trace import __all__ as _tracer
from stemma.ir.trace_constraint import Automaton

__all__ = [*_library, *_tracer, "Automaton"]  # noqa: PLE0605
