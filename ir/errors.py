"""Errors of the compiler. Each message is one plain paragraph: what happened, where, what to do."""

from __future__ import annotations


class StemmaError(Exception):
    """Base of every error that the compiler raises on purpose."""


class TypeMismatch(StemmaError):
    """An op was given inputs or attributes that its type rule rejects."""


class TraceError(StemmaError):
    """A decoding program cannot be traced; the message names the user's line."""


class VerifyError(StemmaError):
    """A module breaks a rule of its level; the message shows the node and its neighbours."""


class ParseError(StemmaError):
    """The text form of a module cannot be read; the message names the line."""


class UnsupportedError(StemmaError):
    """A frontend met operators it cannot lower; the message lists every one of them once."""


class CheckpointError(StemmaError):
    """A checkpoint folder is incomplete, damaged or disagrees with itself."""


class PassError(StemmaError):
    """A pass was misused, did not apply, or broke a promise."""


class BudgetError(StemmaError):
    """A lossy pass cost more than the user allows."""


class CompileError(StemmaError):
    """Code generation, the toolchain or the writing of the artifact failed."""
