"""The backends by name. An entry point of the group `stemma.backends` adds one from another distribution."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points

from stemma.backends.base import Backend
from stemma.ir import CompileError

BUILTIN = {
    "cpu": "stemma.backends.cpu.backend:CpuBackend",
    "reference": "stemma.backends.reference.backend:ReferenceBackend",
    "null": "stemma.backends.null.backend:NullBackend",
}
GROUP = "stemma.backends"


def names() -> tuple[str, ...]:
    """Every known backend, ours first."""
    return tuple(dict.fromkeys([*BUILTIN, *(e.name for e in entry_points(group=GROUP))]))


@lru_cache(maxsize=None)
def get(name: str) -> Backend:
    """The backend called `name`, made once; CompileError when there is none or its module does not load."""
    places = {e.name: e.value for e in entry_points(group=GROUP)} | BUILTIN
    if name not in places:
        raise CompileError(f"There is no backend {name!r}. Known: {', '.join(names())}.")
    module, _, attribute = places[name].partition(":")
    try:
        made = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise CompileError(f"The backend {name!r} cannot be loaded from {places[name]}: {error}.") from None
    if not isinstance(made, Backend):
        raise CompileError(f"The backend {name!r} at {places[name]} is not a stemma.backends.base.Backend.")
    return made
