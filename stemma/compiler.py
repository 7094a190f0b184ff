"""The whole way from a checkpoint to an artifact: trace, rewrite, generate, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stemma.ir import Array, BudgetError, Module, StemmaError

if TYPE_CHECKING:
    from stemma.frontend.hf import Checkpoint
    from stemma.passes.manager import PassRecord
    from stemma.passes.measure import Loss

Progress = Callable[[str, int, int], None]
CALIBRATION_MODULES = ("heapq", "textwrap", "csv", "shlex", "statistics")  # held out when the bundled models were trained
DOCUMENT_TOKENS = 128  # calibration text is cut into documents of this length


@dataclass(frozen=True)
class Budget:
    """Bounds on the measured loss of a compile; None: no bound.

    max_kl: mean KL divergence in nats per token. max_perplexity: factor by which perplexity may grow. min_top1: share of positions
    that must keep their most likely token.
    """

    max_kl: float | None = None
    max_perplexity: float | None = None
    min_top1: float | None = None

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
    targets: Sequence[str] = ("cpu",),
    preset: str = "exact",
    passes: Sequence[str] = (),
    calibration: str | Path | None = None,
    calibration_tokens: int = 256,
    budget: Budget = Budget(),
    rows: int = 512,
    variants: Sequence[str] | None = None,
    verify_each: bool = False,
    dump: str | Path | None = None,
    start_after: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compile the checkpoint folder `source` into the artifact `output`.

    passes: specifications of passes to add ("name{option=value}" or "file.py:Class{...}"), run on the plain model after raising.
    calibration: a text file to measure losses on; by default the source of a few modules of Python's library. variants: CPU
    instruction sets ("native": the best of this machine); default all. dump, start_after, verify_each: see `passes.manager`.
    Raises StemmaError subclasses; `output` is then left as it was.
    """
    from stemma.codegen.artifact import check_output
    from stemma.codegen.build import build, target_backend
    from stemma.frontend.hf import load_checkpoint, trace_checkpoint
    from stemma.passes.base import PassContext
    from stemma.passes.manager import run_pipeline
    from stemma.passes.measure import Meter
    from stemma.passes.pipelines import pipeline
    from stemma.passes.registry import make_pass

    started = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    output = Path(output)
    check_output(output)
    target_backend(targets)  # what can be wrong with the options is said before any work
    added = [make_pass(specification) for specification in passes]
    pipeline(preset, added, causal=True, rows=rows)
    text = _read(calibration) if calibration is not None else None
    report("reading the checkpoint", 0, 1)
    checkpoint = load_checkpoint(source)
    report("tracing the model", 0, 1)
    module, weights = trace_checkpoint(checkpoint)
    steps = pipeline(preset, added, causal=module.properties["kind"] == "causal_lm", rows=rows)
    notes = list(checkpoint.notes)
    documents: tuple[Array, ...] = ()
    if any(step.label == "lossy" for step in steps) and module.properties["kind"] == "causal_lm":
        documents = calibration_documents(checkpoint, module, text, calibration_tokens, notes)
    context = PassContext(weights=weights, calibration=documents)
    meter = Meter(module, weights, documents) if any(step.label == "lossy" for step in steps) else None

    def measure(step: Any, changed: Module) -> Mapping[str, Any]:
        assert meter is not None
        report(f"measuring {step.name}", 0, 1)
        loss = meter(changed)
        budget.check(loss, step.name)
        return asdict(loss)

    result = run_pipeline(
        module, steps, context, dump=Path(dump) if dump else None, start_after=start_after, verify_each=verify_each,
        measure=measure, progress=lambda step, number, count: report("rewriting", number, count),
    )  # fmt: skip
    losses = [r.loss for r in result.records if r.loss]
    built = build(
        result.module, weights, output, targets=targets, variants=variants, extra_files={f.name: f for f in checkpoint.files},
        manifest_extra={
            "passes": [r.as_json() for r in result.records],
            "loss": losses[-1] if losses else None,
            "preset": preset,
            "source": {"folder": Path(source).resolve().name, "architecture": module.properties.get("architecture")},
        },
        progress=report,
    )  # fmt: skip
    return Report(output, built.bytes, time.perf_counter() - started, result.records, losses[-1] if losses else None, tuple(notes))


def calibration_documents(
    checkpoint: Checkpoint, module: Module, text: str | None, tokens: int, notes: list[str]
) -> tuple[Array, ...]:
    """Token ids of calibration text (None: of Python's library) by DOCUMENT_TOKENS; StemmaError when too short."""
    tokenizer = next((f for f in checkpoint.files if f.name == "tokenizer.json"), None)
    if tokenizer is None:
        notes.append("There is no tokenizer, so losses were measured on seeded random tokens.")
        rng = np.random.default_rng(0)
        ids = rng.integers(0, int(module.properties["vocab"]), tokens)
    else:
        from tokenizers import Tokenizer

        text = library_text() if text is None else text
        ids = np.array(Tokenizer.from_file(str(tokenizer)).encode(text).ids[:tokens], np.int64)
        if len(ids) < 2:
            raise StemmaError(f"The calibration text has {len(ids)} tokens; at least two are needed to measure a loss.")
    return tuple(ids[i : i + DOCUMENT_TOKENS] for i in range(0, len(ids), DOCUMENT_TOKENS) if len(ids[i : i + DOCUMENT_TOKENS]) > 1)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StemmaError(f"The calibration text {path} cannot be read: {error}.") from None


def library_text() -> str:
    """The source of a few modules of Python's standard library."""
    import importlib
    import inspect

    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in CALIBRATION_MODULES)


def explain_rule(name: str, model: str | Path, count: int = 5) -> list[dict[str, Any]]:
    """The best partial matches of a rule, or of each rule of a pass, in a checkpoint folder or a dumped module text."""
    from stemma.frontend.hf import trace_checkpoint
    from stemma.ir import parse_module
    from stemma.passes.base import PassContext
    from stemma.passes.manager import run_pipeline
    from stemma.passes.raising import RAISING
    from stemma.passes.registry import find_rules
    from stemma.passes.why import explain

    rules = find_rules(name)
    path = Path(model)
    if path.is_file():
        module = parse_module(_read(path))
    else:
        module, weights = trace_checkpoint(path)
        module = run_pipeline(module, RAISING, PassContext(weights=weights)).module
    found = [(rule.name, match) for rule in rules for match in explain(rule, module)]
    return [{"rule": rule, "text": str(match)} for rule, match in found[:count]]
