"""The whole way from a checkpoint to an artifact: trace, rewrite, generate, write."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stemma.ir import BudgetError

if TYPE_CHECKING:
    from stemma.ir.trace import Program
    from stemma.passes.base import Pass
    from stemma.passes.manager import PassRecord
    from stemma.passes.measure import Loss
    from stemma.sources import Source

Progress = Callable[[str, int, int], None]
DEFAULT_PROGRAM = "generate"


@dataclass(frozen=True)
class Budget:
    """Bounds on the measured loss of a compile; None: no bound.

    max_kl: mean KL divergence in nats per token. max_perplexity: factor by which perplexity may grow. min_top1: share of positions
    that must keep their most likely token.
    """

    max_kl: float | None = None
    max_perplexity: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        for name, bound in vars(self).items():
            if bound is not None and not bound >= 0:
                raise BudgetError(f"{name}={bound} is no bound: give a number of at least 0.")

    def check(self, loss: Loss, what: str) -> None:
        """BudgetError when `loss` is outside."""
        broken = []
        if self.max_kl is not None and not (loss.kl is not None and loss.kl <= self.max_kl):
            broken.append(f"the KL divergence is {loss.kl} nats per token, allowed {self.max_kl}")
        if self.max_perplexity is not None:
            ratio = (loss.perplexity_after or np.inf) / (loss.perplexity_before or 1.0)
            if not ratio <= self.max_perplexity:
                broken.append(f"perplexity grows by a factor of {ratio:.4f}, allowed {self.max_perplexity}")
        if self.min_top1 is not None and not (loss.top1 is not None and loss.top1 >= self.min_top1):
            broken.append(f"the most likely token is the same at {loss.top1} of the positions, required {self.min_top1}")
        if broken:
            raise BudgetError(f"After the pass {what!r}, {'; '.join(broken)}. Nothing was written. Allow more, or use more bits.")


@dataclass(frozen=True)
class Report:
    """What a compile made. bytes: size of the artifact; seconds: wall time; loss: of the last lossy pass, None when exact."""

    path: Path
    bytes: int
    seconds: float
    records: tuple[PassRecord, ...]
    loss: Mapping[str, Any] | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "path": str(self.path), "bytes": self.bytes, "seconds": round(self.seconds, 3), "loss": self.loss,
            "passes": [r.as_json() for r in self.records], "notes": list(self.notes),
        }  # fmt: skip


def compile(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    targets: Sequence[str] = ("cpu",),
    preset: str = "exact",
    passes: Sequence[str | Pass] = (),
    models: Mapping[str, str | Path | Source] | Sequence[str | Source] = (),
    programs: Sequence[str | Program] | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    budget: Budget = Budget(),
    rows: int = 512,
    variants: Sequence[str] | None = None,
    verify_each: bool = False,
    dump: str | Path | None = None,
    start_after: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compile the checkpoint `source`, a Hugging Face folder or a GGUF file, into the artifact `output`.

    tokenizer: a folder with the tokenizer.json to use instead of the checkpoint's.
    passes: specifications of passes to add ("name{option=value}" or "file.py:Class{...}"), run on the plain model after raising,
    or at the end when they are of the stage "program". models: further checkpoints for the programs, {"draft": folder} or
    "draft=folder,preset=exact"; they go through the same passes. programs: decoding programs, from the library by name or
    "file.py:function"; by default `generate` for language models. calibration: a text file to measure losses and calibrate on; by
    default the source of a few modules of Python's library. calibration_tokens: how much of it passes calibrate on (8192; losses
    are measured on others), or, when none does, losses are measured on (256). variants: CPU instruction sets ("native": the best of
    this machine); default all.
    dump, start_after, verify_each: see `passes.manager`; further models and the programs have folders of their own in `dump`.
    What calibration has finished is kept beside `output` until the compile succeeds: the same call goes on from there.
    Raises StemmaError subclasses; `output` is then left as it was.
    """
    from stemma.calibration import DOCUMENT_TOKENS, Calibration, read_text
    from stemma.codegen.artifact import amend, check_output
    from stemma.codegen.build import build, target_backend
    from stemma.compilation import Compilation
    from stemma.frontend.hf import load_checkpoint
    from stemma.library import find_program
    from stemma.passes.pipelines import pipeline
    from stemma.passes.registry import make_pass
    from stemma.program_loss import PROMPTS, measure_programs, program_quality
    from stemma.sources import further_models, needs_of

    started = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    output = Path(output)
    check_output(output)
    target_backend(targets)  # what can be wrong with the options is said before any work
    added = [make_pass(p) if isinstance(p, str) else p for p in passes]
    for step in added:
        step.validate()
    others = further_models(models)
    for name in (preset, *(s.preset or preset for s in others)):
        pipeline(name, added, causal=True, rows=rows)
    needs = needs_of(added, [s.name for s in others])
    wanted = [find_program(p) for p in programs or ()]
    text = read_text(calibration) if calibration is not None else None
    report("reading the checkpoint", 0, 1)
    checkpoint = load_checkpoint(source, tokenizer)
    workspace = output.with_name(f".{output.name}.calibration")
    if programs is None and checkpoint.kind == "causal_lm":
        wanted = [find_program(DEFAULT_PROGRAM)]
    work = Compilation(
        checkpoint, [(s, load_checkpoint(s.folder)) for s in others], wanted, added, needs, preset, rows,
        Calibration(text, calibration_tokens), verify_each, Path(dump) if dump else None, workspace, report,
    )  # fmt: skip
    made = output
    try:
        module, weights = work.models(start_after, budget.check)
        module = work.programs(module, weights)
        if "lossy" in work.labels.values():  # what is measured on the artifact belongs into it: until then it has another name
            made = output.with_name(f".{output.name}.{os.getpid()}.unmeasured")
        build(
            module, weights, made, targets=targets, variants=variants, extra_files={f.name: f for f in checkpoint.files},
            manifest_extra=work.manifest(module), progress=report,
        )  # fmt: skip
        if made != output:
            report("measuring programs", 0, 1)
            found = measure_programs(
                made, Calibration(text, DOCUMENT_TOKENS * PROMPTS).documents(checkpoint, int(module.properties["vocab"]), [])
            )
            amend(made, lambda manifest: [manifest["programs"][name].update(loss=loss) for name, loss in found.items()])
            os.replace(made, output)
            work.notes += [f"{name}: {program_quality(loss)}" for name, loss in found.items()]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(workspace)) from None
    finally:
        if made != output:
            made.unlink(missing_ok=True)
        if not _results(workspace):
            shutil.rmtree(workspace, ignore_errors=True)
    shutil.rmtree(workspace, ignore_errors=True)
    seconds = time.perf_counter() - started
    return Report(output, output.stat().st_size, seconds, tuple(work.records), work.loss, tuple(work.notes))


def _results(workspace: Path) -> bool:
    """Whether a calibration has finished anything there."""
    return any(workspace.rglob("*.json"))


def _kept(workspace: Path) -> str:
    """What to tell who interrupts a compile."""
    if not _results(workspace):
        return ""
    return f"What was calibrated so far is kept in {workspace}: the same command goes on from there."
