"""The runtime: loads an artifact and runs it, with numpy and the standard library (and `tokenizers` for text)."""

from __future__ import annotations

from stemma.runtime.artifact import Artifact
from stemma.runtime.errors import ArtifactError, DeviceError, InputError, StemmaRuntimeError
from stemma.runtime.model import Model, load
from stemma.runtime.sampling import SamplingOptions, Statistics

__all__ = [
    "Artifact",
    "ArtifactError",
    "DeviceError",
    "InputError",
    "Model",
    "SamplingOptions",
    "Statistics",
    "StemmaRuntimeError",
    "load",
]
