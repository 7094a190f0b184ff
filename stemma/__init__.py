"""Stemma: a compiler for models and the programs that decode them.

Names are imported when first used, so that `import stemma.runtime` stays light and never meets the compiler or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemma.compiler import compile
    from stemma.ir.errors import StemmaError
    from stemma.runtime.errors import StemmaRuntimeError
    from stemma.runtime.model import Model, load

__version__ = "0.1.0"
_HOMES = {
    "compile": "stemma.compiler",
    "load": "stemma.runtime.model",
    "Model": "stemma.runtime.model",
    "StemmaRuntimeError": "stemma.runtime.errors",
    "StemmaError": "stemma.ir.errors",
}
__all__ = ["Model", "StemmaError", "StemmaRuntimeError", "__version__", "compile", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stemma' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
