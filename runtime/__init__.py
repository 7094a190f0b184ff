"""The runtime: loads an artifact and runs it, with numpy and the standard library (and `tokenizers` for text).

Names are imported when first used: a device imports `stemma.runtime.errors`, and must not get the whole runtime, and itself,
with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemma.runtime.artifact import Artifact
    from stemma.runtime.errors import ArtifactError, DeviceError, InputError, StemmaRuntimeError
    from stemma.runtime.model import Model, Run, load
    from stemma.runtime.sampling import Statistics

__all__ = [
    "Artifact",
    "ArtifactError",
    "DeviceError",
    "InputError",
    "Model",
    "Run",
    "Statistics",
    "StemmaRuntimeError",
    "load",
]
_HOMES = {"Artifact": "artifact", "Model": "model", "Run": "model", "load": "model", "Statistics": "sampling"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stemma.runtime' has no attribute {name!r}")
    value = getattr(import_module(f"stemma.runtime.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
