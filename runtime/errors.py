"""Errors of the runtime. Each message is one plain paragraph: what happened, where, what to do."""

from __future__ import annotations


class StemmaRuntimeError(Exception):
    """Base of every error that loading or running an artifact raises on purpose."""


class ArtifactError(StemmaRuntimeError):
    """A file is not a usable artifact: foreign, truncated, corrupt, too old, too new, or made for something else."""


class DeviceError(StemmaRuntimeError):
    """This machine cannot run the kernels, or a kernel reported a failure."""


class InputError(StemmaRuntimeError):
    """A caller passed names, shapes, types or values that the model does not take."""
