"""The pass manager: runs a pipeline, verifies around every pass, times it, records it, dumps every state, compares results.

result = run_pipeline(module, (Canonicalize(), Raise()), context, dump=Path("dump"), verify_each=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stemma.ir import Module, PassError, StemmaError, interpret, parse_module, print_module, verify
from stemma.passes.base import Label, Pass, PassContext
from stemma.passes.compare_programs import changed_answers
from stemma.passes.properties import PROPERTIES
from stemma.passes.selftest import largest_difference, make_inputs, make_weights

IDENTICAL = 1e-9  # relative difference that verify_each allows an identical pass, in float64
Inputs = Mapping[str, Sequence[Mapping[str, Any]]]  # function name -> argument sets


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. `difference`: the largest relative change of a result that verify_each saw, None when it did not run."""

    name: str
    options: Mapping[str, object]
    label: Label
    seconds: float
    modified: bool
    nodes: int
    fired: Mapping[str, int] = field(default_factory=dict)
    loss: Mapping[str, float] | None = None
    difference: float | None = None
    choices: tuple[Mapping[str, Any], ...] = ()

    def as_json(self) -> dict[str, object]:
        """The entry in the artifact's manifest."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return {
            "name": self.name, "options": options, "label": self.label, "seconds": round(self.seconds, 4),
            "modified": self.modified, "nodes": self.nodes, "fired": dict(self.fired),
            "loss": None if self.loss is None else dict(self.loss), "choices": [dict(row) for row in self.choices],
        }  # fmt: skip

    def __str__(self) -> str:
        fired = ", ".join(f"{n} {c}" for n, c in self.fired.items())
        return f"{self.name:24s} {self.seconds * 1e3:8.1f} ms  {self.nodes:6d} nodes  {fired or ('' if self.modified else '-')}"


@dataclass(frozen=True)
class PipelineResult:
    """The transformed module and one record per pass that ran, or whose lossy result was read from a dump."""

    module: Module
    records: tuple[PassRecord, ...]


def run_pipeline(
    module: Module,
    passes: Sequence[Pass],
    context: PassContext | None = None,
    *,
    dump: Path | None = None,
    start_after: str | None = None,
    verify_each: Inputs | bool = False,
    measure: Callable[[Pass, Module], Mapping[str, float]] | None = None,
    progress: Callable[[Pass, int, int], None] | None = None,
) -> PipelineResult:
    """Run `passes` in order.

    dump: a folder that receives 00_frontend.txt, 01_<pass>.txt, ...; each file can be read back.
    start_after: the name of a pass, or of a dump file such as "03_raise_norm.txt" in `dump`: the passes up to and including it are
        skipped, and when a file is named, the module is read from it. The lossy ones of these are recorded and measured as well.
    verify_each: argument sets by function name, or True to make them up: results before and after every pass are compared with
        the interpreter in float64. A pass labelled identical that changes one by more than 1e-9 is an error; others only record it.
    measure: called with every lossy pass and the module it made; returns the loss to record, or raises when it is too large.
    progress: called with the pass, its number and the count before each pass.

    Raises PassError naming the pass that failed, broke a promise or left a module that does not verify.
    """
    context = context or PassContext()
    first = 0
    records = []
    if start_after is not None:
        given = module
        first, module = _resume(module, passes, start_after, dump)
        if module is not given:
            records = _skipped(passes[:first], module, start_after, context, measure)
    elif dump is not None:
        _write(dump, 0, "frontend", module, "by frontend")
    _verified(module, "the module given to the pipeline")
    for number, step in enumerate(passes[first:], first + 1):
        if progress is not None:
            progress(step, number, len(passes))
        _promised(step, "requires", step.requires, module)
        context.fired.clear()
        context.choices.clear()
        started = time.perf_counter()
        try:
            step.validate()
            new = step.run(module, context)
        except PassError as error:
            reason = str(error).removeprefix(f"{step.name}: ")  # which the reader is told anyway
            raise PassError(f"The pass {step.name!r} failed{'.' if reason == str(error) else ':'} {reason}") from error
        except StemmaError as error:
            raise type(error)(f"In the pass {step.name!r}: {error}") from error
        seconds = time.perf_counter() - started
        _verified(new, f"what the pass {step.name!r} made")
        _promised(step, "ensures", step.ensures, new)
        change = None if verify_each is False or new is module else _compare(step, module, new, verify_each, context)
        loss = measure(step, new) if measure is not None and step.label == "lossy" and new is not module else None
        nodes = sum(len(f.nodes) for f in new)
        records.append(
            PassRecord(
                step.name,
                step.options(),
                step.label,
                seconds,
                new is not module,
                nodes,
                dict(context.fired),
                loss,
                change,
                tuple(context.choices),
            )  # fmt: skip
        )
        module = new
        if dump is not None:
            _write(dump, number, step.name, module, f"by {step.name}, {seconds * 1e3:.1f} ms")
    return PipelineResult(module, tuple(records))


def _resume(module: Module, passes: Sequence[Pass], start_after: str, dump: Path | None) -> tuple[int, Module]:
    names = [p.name for p in passes]
    if start_after.endswith(".txt"):
        if dump is None:
            raise PassError(f"To start after the dump file {start_after!r}, name the folder of the dumps as well.")
        stem = start_after[:-4]
        number, _, name = stem.partition("_")
        if not number.isdigit() or not (int(number) == 0 or names[int(number) - 1 : int(number)] == [name]):
            raise PassError(f"{start_after!r} is not a state of this pipeline, whose passes are: {', '.join(names)}.")
        return int(number), read_dump(dump / start_after)
    if names.count(start_after) != 1:
        raise PassError(f"The pipeline has {names.count(start_after)} passes called {start_after!r}; it has {', '.join(names)}.")
    return names.index(start_after) + 1, module


def _skipped(
    passes: Sequence[Pass], module: Module, start_after: str, context: PassContext,
    measure: Callable[[Pass, Module], Mapping[str, float]] | None,
) -> list[PassRecord]:  # fmt: skip
    """Records of the lossy passes whose result was read from a dump; PassError when that needs weights which only they can make."""
    if missing := [name for name in module.weights() if name not in context.weights]:
        makers = sorted({name.rpartition(":")[2] for name in missing if ":" in name} & {p.name for p in passes})
        raise PassError(
            f"{start_after!r} reads the weight {missing[0]!r}, which the checkpoint does not have."
            f" Start before the pass that makes it{' (' + ', '.join(makers) + ')' if makers else ''}."
        )
    nodes, lossy = sum(len(f.nodes) for f in module), [p for p in passes if p.label == "lossy"]
    return [
        PassRecord(p.name, p.options(), p.label, 0.0, True, nodes, loss=measure(p, module) if measure and p is lossy[-1] else None)
        for p in lossy
    ]


def read_dump(path: Path) -> Module:
    """The module in a dump file; PassError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PassError(f"The dump {path} cannot be read: {error.strerror}.") from None
    return parse_module(text)


def _write(dump: Path, number: int, name: str, module: Module, note: str) -> None:
    try:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{number:02d}_{name}.txt").write_text(print_module(module, note), encoding="utf-8")
    except OSError as error:
        raise PassError(f"The state after {name!r} cannot be written to {dump}: {error.strerror}.") from None


def _verified(module: Module, what: str) -> None:
    try:
        verify(module)
    except StemmaError as error:
        raise type(error)(f"The verifier rejects {what}. {error}") from error


def _promised(step: Pass, kind: str, names: frozenset[str], module: Module) -> None:
    for name in sorted(names):
        if name not in PROPERTIES:
            raise PassError(f"The pass {step.name!r} {kind} the unknown property {name!r}; known: {', '.join(sorted(PROPERTIES))}.")
        problem = PROPERTIES[name](module)
        if problem is not None:
            verb = "requires a module that is" if kind == "requires" else "promised a module that is"
            raise PassError(f"The pass {step.name!r} {verb} {name!r}, but {problem}.")


def _compare(step: Pass, before: Module, after: Module, verify_each: Inputs | bool, context: PassContext) -> float | None:
    """Largest relative change of any result of a function that both modules have with the same parameters, and share of the answers
    of decoding programs that differ; None when there is none.

    PassError when a pass labelled identical changed one.
    """
    worst: float | None = None
    missing = any(n not in context.weights for m in (before, after) for n in m.weights())
    weights = make_weights(Module((*before, *(f for f in after if f not in before.functions)))) if missing else context.weights
    programs = before.properties.get("programs", ())
    for function in before:
        if function.name in programs:
            continue
        match = next((f for f in after if f.name == function.name), None)
        if match is None or match is function or match.params != function.params:
            continue
        names = [n for n in function.result_names if n in match.result_names]
        for arguments in _arguments(function.name, before, verify_each):
            values, sizes = {k: v for k, v in arguments.items() if k != "sizes"}, arguments.get("sizes")
            old, new = (interpret(f, values, weights, sizes=sizes) for f in (function, match))
            name, error = largest_difference(old, new, names)
            if step.label == "identical" and not error <= IDENTICAL:
                raise PassError(
                    f"The pass {step.name!r} is labelled identical, but it changed the result {name!r} of {function.name!r} by "
                    f"{error:.3g} (relative, float64; allowed {IDENTICAL:g}). Run it with a dump and compare the two states."
                )
            worst = max(worst or 0.0, error)
    if programs:
        differing, total, name = changed_answers(before, after)
        if step.label == "identical" and differing:
            raise PassError(
                f"The pass {step.name!r} is labelled identical, but {differing} of {total} answers of programs differ with "
                f"the reference interpreter, first of {name!r}. Run it with a dump and compare the two states."
            )
        worst = max(worst or 0.0, differing / total) if total else worst
    return worst


def _arguments(name: str, module: Module, verify_each: Inputs | bool) -> Sequence[Mapping[str, Any]]:
    if not isinstance(verify_each, bool):
        return verify_each.get(name, ())
    function = module[name]
    made = []
    for pick in (0, 1):  # a small and a slightly larger value for every dimension, all different
        sizes = {d.name: min(d.hi, max(d.lo, (2, 5)[pick] + k)) for k, d in enumerate(function.dims())}
        inputs = make_inputs(function, sizes)
        inputs |= {k: v % 2 for k, v in inputs.items() if v.dtype.kind in "iu"}  # an index into any axis of two or more
        made.append({**inputs, "sizes": sizes})
    return made
