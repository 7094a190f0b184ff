"""What a pass is: a frozen dataclass whose fields are its options, with a label that says how exact it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from stemma.ir import Array, Module, WeightStore

Label = Literal["identical", "distribution", "lossy"]


@dataclass
class PassContext:
    """What a pass may use besides the module.

    weights: the named weights; a pass may add new ones. calibration: integer arrays [tokens], one per calibration document.
    fired: how often each rule fired; the manager reads and clears it around every pass.
    """

    weights: WeightStore = field(default_factory=WeightStore)
    calibration: tuple[Array, ...] = ()
    fired: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    Subclasses are frozen dataclasses: their fields are the options of `--pass "name{option=value}"`. `label` is `identical` (the
    reference semantics, exact arithmetic, give the same results), `distribution` (sampling follows the same
    distribution) or `lossy` (measured). `requires` and `ensures` name properties of a module that must hold before and hold after
    (passes/properties.py).
    """

    name: ClassVar[str]
    label: ClassVar[Label] = "identical"
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()

    def run(self, module: Module, context: PassContext) -> Module:
        """The transformed module; the same object when nothing applied."""
        raise NotImplementedError

    def options(self) -> Mapping[str, object]:
        """The options and their values, for the manifest."""
        return {option.name: getattr(self, option.name) for option in fields(self)}
