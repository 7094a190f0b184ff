"""What a pass is: a frozen dataclass whose fields are its options, with a label that says how exact it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from stemma.ir import Array, Module, WeightStore

Label = Literal["identical", "distribution", "lossy"]
Stage = Literal["model", "program"]


@dataclass(frozen=True)
class ModelInfo:
    """A model that the programs of a module may step: its function is `step` for "model", else NAME_step.

    width: of its hidden state, 0 when the step does not return it. eos: its end tokens. context: the longest sequence.
    to_target: i32[vocab], the token of "model" with the same bytes, or -1; from_target: i32[vocab of "model"], the other way.
    Both are None when the tokens are the same.
    """

    vocab: int
    width: int
    context: int
    eos: tuple[int, ...]
    to_target: Array | None = None
    from_target: Array | None = None


@dataclass(frozen=True)
class Needs:
    """What a pass of the stage "program" wants compiled besides the programs' models.

    models: names that the caller must give a checkpoint for. made: passes on "model" that make a further model of it (see
    `Pass.makes`). heads: (kind, file or folder, "" for the places where checkpoints have them), functions named `kind` that guess
    from hidden states. hidden: whether the step of "model" returns its hidden state.
    """

    models: tuple[str, ...] = ()
    made: tuple[Pass, ...] = ()
    heads: tuple[tuple[str, str], ...] = ()
    hidden: bool = False


@dataclass
class PassContext:
    """What a pass may use besides the module.

    weights: the named weights; a pass may add new ones. calibration: integer arrays [tokens], one per calibration document.
    workspace: a folder for results that an interrupted compile finds again; None: a temporary one. report: is told what a long pass
    does, how much is done and of how much. notes: sentences for the user. source: the tokenizer's folder. models: what the programs
    may step, by name; empty before the stage "program".
    fired: how often each rule fired; choices: rows (name -> value) of what a pass chose, to be shown and kept in the artifact. The
    manager reads and clears both around every pass.
    """

    weights: WeightStore = field(default_factory=WeightStore)
    calibration: tuple[Array, ...] = ()
    workspace: Path | None = None
    report: Callable[[str, int, int], None] = lambda stage, done, total: None
    notes: list[str] = field(default_factory=list)
    source: Path | None = None
    models: dict[str, ModelInfo] = field(default_factory=dict)
    fired: Counter[str] = field(default_factory=Counter)
    choices: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    Subclasses are frozen dataclasses: their fields are the options of `--pass "name{option=value}"`. `label` is `identical` (the
    reference semantics, exact arithmetic, give the same results), `distribution` (sampling follows the same
    distribution) or `lossy` (measured). `requires` and `ensures` name properties of a module that must hold before and hold after
    (passes/properties.py). `stage`: "model" passes rewrite one model's graph; "program" passes run once at the end, on the module
    of all models with the decoding programs attached.
    """

    name: ClassVar[str]
    label: ClassVar[Label] = "identical"
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    stage: ClassVar[Stage] = "model"

    def validate(self) -> None:
        """PassError for options that fit no model at all: asked before any work, and again before the pass runs."""

    def needs(self) -> Needs:
        """What a pass of the stage "program" wants to find in the module."""
        return Needs()

    def makes(self) -> str:
        """The name of the further model that the pass makes of "model", as NAME_forward beside `forward`; "" for none."""
        return ""

    def run(self, module: Module, context: PassContext) -> Module:
        """The transformed module; the same object when nothing applied."""
        raise NotImplementedError

    def options(self) -> Mapping[str, object]:
        """The options and their values, for the manifest."""
        return {option.name: getattr(self, option.name) for option in fields(self)}
