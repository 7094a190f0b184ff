"""The library of decoding programs. Each is traced for the models of an artifact; PROGRAMS has them by name."""

from collections.abc import Mapping
from types import MappingProxyType

from stemma.frontend.programs.generate import generate
from stemma.ir.trace import Program

PROGRAMS: Mapping[str, Program] = MappingProxyType({p.name: p for p in (generate,)})

__all__ = ["PROGRAMS", "generate"]
