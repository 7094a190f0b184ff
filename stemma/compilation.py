"""The steps of a compile: every model through its own pipeline, all of them in one module, then the programs on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemma.calibration import Calibration
from stemma.codegen.program import attach, program_table, programs_of
from stemma.ir import MAIN, Array, Module, StemmaError, WeightStore, merge_models
from stemma.library import listed, mixed_tokens, models_used, reads_hidden, summary
from stemma.passes.base import Label, ModelInfo, Needs, Pass, PassContext
from stemma.passes.calibrate import Calibrated
from stemma.passes.heads import Heads
from stemma.passes.manager import PassRecord, run_pipeline
from stemma.passes.measure import Loss, Meter
from stemma.passes.pipelines import pipeline, program_passes
from stemma.sources import Source, describe, head_weights, making, related

if TYPE_CHECKING:
    from stemma.frontend.hf import Checkpoint
    from stemma.ir.trace import Program

Progress = Callable[[str, int, int], None]
Check = Callable[[Loss, str], None]
LABELS: tuple[Label, ...] = ("identical", "distribution", "lossy")


@dataclass
class Compilation:
    """A compile under way: what it was given, and what it has found out so far (`models` and `programs` are called in this order).

    records: of the passes on the main model and on the programs. infos: every model by name. entries: what the manifest says of
    further models. workspace: see `PassContext`. needs: of the program passes; hidden becomes true when a program reads hidden
    states. mix: tokens that programs mix in one row.
    """

    checkpoint: Checkpoint
    others: Sequence[tuple[Source, Checkpoint]]
    chosen: Sequence[Program]
    added: Sequence[Pass]
    needs: Needs
    preset: str
    rows: int
    calibration: Calibration
    verify_each: bool
    dump: Path | None
    workspace: Path | None
    report: Progress
    records: list[PassRecord] = field(default_factory=list)
    infos: dict[str, ModelInfo] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)
    mix: int = 1

    def __post_init__(self) -> None:
        """Says what is wrong with models and programs before any long work: all of it is in configurations and tokenizers."""
        checkpoint = self.checkpoint
        self.notes += checkpoint.notes
        if checkpoint.kind != "causal_lm":
            if self.others or self.chosen or program_passes(self.added):
                raise StemmaError(f"{checkpoint.folder} is a {checkpoint.architecture}: only causal language models have programs.")
            return
        self.infos[MAIN] = describe(checkpoint, "model")
        for source, other in self.others:
            drafts = source.name in self.needs.models
            self.infos[source.name], entry = related(source.name, checkpoint, other, drafts=drafts, notes=self.notes)
            self.infos[source.name] = replace(self.infos[source.name], width=0)
            self.entries[source.name] = entry
        self.infos |= {p.makes(): replace(self.infos[MAIN], width=0) for p in (*self.needs.made, *self.added) if p.makes()}
        for kind, folder in self.needs.heads:
            head_weights(kind, folder, checkpoint.beside)
        traced = listed(self.chosen, self.infos)
        self.mix = mixed_tokens(traced)
        if not self.needs.hidden:
            hidden = reads_hidden(traced)
            self.needs = replace(self.needs, hidden=hidden)
            if not hidden:
                self.infos[MAIN] = replace(self.infos[MAIN], width=0)

    @property
    def causal(self) -> bool:
        return self.checkpoint.kind == "causal_lm"

    def models(self, start_after: str | None, check: Check) -> tuple[Module, WeightStore]:
        """All models, compiled and merged. check: is given every measured loss of the main model, with the name of the pass."""
        parts = {MAIN: self._main(start_after, check)}
        for source, checkpoint in self.others:
            parts[source.name] = self._other(source, checkpoint)
        module, weights = merge_models(parts)
        if not self.causal:
            return module, weights
        step = module["step"]
        widths = dict(zip(step.result_names, step.results, strict=True))
        width = widths["hidden"].shape[-1] if self.needs.hidden else 0
        if width != self.infos[MAIN].width:
            self.infos[MAIN] = replace(self.infos[MAIN], width=int(str(width)))
        served = tuple((name, m.vocab, m.width, m.eos, m.context) for name, m in self.infos.items())
        return module.replace(models=served), weights

    def _main(self, start_after: str | None, check: Check) -> tuple[Module, WeightStore]:
        self.report("tracing the model", 0, 1)
        module, records, weights = self._compiled(
            self.checkpoint, self.preset, (*self.added, *making(self.needs)), self.dump, True, start_after, check
        )
        self.records += records
        return module, weights

    def _other(self, source: Source, checkpoint: Checkpoint) -> tuple[Module, WeightStore]:
        self.report(f"tracing the model {source.name}", 0, 1)
        shared = [p for p in self.added if not (p.makes() or isinstance(p, Heads))]  # those make more of the main model
        preset, added = (self.preset, shared) if source.preset is None else (source.preset, [])
        folder = self.dump / source.name if self.dump is not None else None
        module, records, weights = self._compiled(checkpoint, preset, added, folder, False, None, lambda loss, name: None)
        losses = [r.loss for r in records if r.loss]
        self.entries[source.name] |= {
            "source": origin(checkpoint), "preset": preset, "passes": [r.as_json() for r in records],
            "loss": losses[-1] if losses else None,
        }  # fmt: skip
        return module, weights

    def _compiled(
        self, checkpoint: Checkpoint, preset: str, added: Sequence[Pass], dump: Path | None, main: bool, start_after: str | None,
        check: Check,
    ) -> tuple[Module, tuple[PassRecord, ...], WeightStore]:  # fmt: skip
        """One model through its pipeline."""
        from stemma.frontend.hf import trace_checkpoint
        from stemma.frontend.safetensors import read_header

        module, weights = trace_checkpoint(checkpoint)
        for step in added:
            if isinstance(step, Heads):
                for name, entry in read_header(head_weights(step.kind, step.folder, checkpoint.beside)).items():
                    weights.add(name, entry.type, entry.load, entry.rows)
        bounds = [m.context for m in self.infos.values()]
        context = max(bounds) if len(bounds) > 1 and all(bounds) else 0
        steps = pipeline(
            preset, added, causal=self.causal, rows=self.rows, hidden=main and self.needs.hidden, context=context,
            mix=self.mix if main else 1,
        )  # fmt: skip
        lossy = any(step.label == "lossy" for step in steps)
        documents: tuple[Array, ...] = ()
        samples: tuple[Array, ...] = ()
        if self.causal and any(isinstance(step, Calibrated) for step in steps):
            documents, samples = self.calibration.split(checkpoint, int(module.properties["vocab"]), self.notes)
        elif self.causal and lossy:
            documents = samples = self.calibration.documents(checkpoint, int(module.properties["vocab"]), self.notes)
        meter = Meter(module, weights, documents) if lossy else None

        def measure(step: Pass, changed: Module) -> Mapping[str, Any]:
            assert meter is not None
            self.report(f"measuring {step.name}", 0, 1)
            loss = meter(changed)
            check(loss, step.name)
            return asdict(loss)

        result = run_pipeline(
            module, steps,
            PassContext(
                weights=weights, calibration=samples, workspace=self.workspace, report=self.report, notes=self.notes,
                source=checkpoint.home,
            ),
            dump=dump, start_after=start_after, verify_each=self.verify_each, measure=measure,
            progress=lambda step, number, count: self.report("rewriting", number, count),
        )  # fmt: skip
        return result.module, result.records, weights

    def programs(self, module: Module, weights: WeightStore) -> Module:
        """The module with the programs attached, after the passes of the stage "program"."""
        if not self.causal:
            return module
        module = attach(module, listed(self.chosen, self.infos))
        steps = program_passes(self.added)
        before = {p.function.name: p.function for p in programs_of(module)}
        result = run_pipeline(
            module, steps, PassContext(weights=weights, source=self.checkpoint.home, models=dict(self.infos)),
            dump=self.dump / "programs" if self.dump is not None else None, verify_each=self.verify_each,
            progress=lambda step, number, count: self.report("rewriting the programs", number, count),
        )  # fmt: skip
        self.records += result.records
        worst: Label = max((r.label for r in result.records if r.modified), key=LABELS.index, default="identical")
        found = programs_of(result.module)
        plain = {p.plain for p in found}
        for name, function in ((p.function.name, p.function) for p in found):
            self.labels[name] = "identical" if name in plain or before.get(name) is function else worst
        return result.module

    @property
    def loss(self) -> Mapping[str, Any] | None:
        """The last measured loss of the main model, None when nothing was lossy."""
        losses = [r.loss for r in self.records if r.loss]
        return losses[-1] if losses else None

    def manifest(self, module: Module) -> dict[str, Any]:
        """What the manifest says of passes, losses, sources, further models and programs."""
        docs = {p.name: summary(p) for p in self.chosen}
        docs |= {p.plain: f"{p.function.name} without speculation" for p in programs_of(module) if p.plain}
        speculation = {name: dict(report) for name, report in module.properties.get("speculation", ())}
        return {
            "passes": [r.as_json() for r in self.records], "loss": self.loss, "preset": self.preset,
            "source": origin(self.checkpoint), "further_models": self.entries,
            "not_speculated": list(module.properties.get("not_speculated", ())),
            "programs": {
                p.function.name: program_table(p)
                | {
                    "doc": docs.get(p.function.name, ""), "models": models_used(p), "label": self.labels[p.function.name],
                    "speculation": _plain_data(speculation.get(p.function.name)),
                }
                for p in programs_of(module)
            },
        }  # fmt: skip


def _plain_data(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a pass reports on a program's speculation, as JSON: pairs by name become objects."""
    return None if report is None else {k: dict(v) if isinstance(v, tuple) else v for k, v in report.items()}


def origin(checkpoint: Checkpoint) -> dict[str, str]:
    """Where a model comes from, for the manifest."""
    return {"folder": checkpoint.folder.resolve().name, "architecture": checkpoint.architecture}
