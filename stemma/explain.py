"""Why a rule does not match a model, and why a pass on decoding programs leaves one alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemma.ir import Module, StemmaError

if TYPE_CHECKING:
    from stemma.ir.trace import Program
    from stemma.passes.base import ModelInfo, Pass


def explain_rule(name: str, model: str | Path, count: int = 5, *, programs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The best partial matches of a rule, or of each rule of a pass, in a checkpoint or a dumped module text.

    For a pass of the stage "program", "speculate{draft=...}": what it does with each of `programs` (all of the library, when none
    is named) on that checkpoint.
    """
    from stemma.calibration import read_text
    from stemma.frontend.gguf import is_gguf
    from stemma.frontend.hf import trace_checkpoint
    from stemma.ir import parse_module
    from stemma.passes.base import PassContext
    from stemma.passes.manager import run_pipeline
    from stemma.passes.raising import RAISING
    from stemma.passes.registry import all_passes, find_pass, find_rules, make_pass
    from stemma.passes.why import explain

    head, path = name.partition("{")[0].strip(), Path(model)
    if (head in all_passes() or ".py:" in head) and find_pass(head).stage == "program":
        return explain_programs(make_pass(name), path, programs)
    rules = find_rules(name)
    if path.is_file() and not is_gguf(path):
        module = parse_module(read_text(path, "module"))
    else:
        module, weights = trace_checkpoint(path)
        module = run_pipeline(module, RAISING, PassContext(weights=weights)).module
    found = [(rule.name, match) for rule in rules for match in explain(rule, module)]
    return [{"rule": rule, "text": str(match)} for rule, match in found[:count]]


def explain_programs(step: Pass, folder: Path, programs: Sequence[str]) -> list[dict[str, Any]]:
    """What a pass says of each program on its own. Models that it needs are taken to be like the one in `folder`."""
    from stemma.frontend.hf import load_checkpoint
    from stemma.library import find_program, library, model_names
    from stemma.sources import describe

    info = describe(load_checkpoint(folder), "model")
    needs = step.needs()
    chosen = [find_program(p) for p in programs] or list(library().values())
    names = ["model", *needs.models, *(p.makes() for p in needs.made), *(n for p in chosen for n in model_names(p))]
    infos = {name: info if name == "model" else replace(info, width=0) for name in names}
    found = []
    for program in chosen:
        try:
            said, done = _said(step, program, infos, folder), True
        except StemmaError as error:
            said, done = _shortened(str(error), step.name, program.name), False
        found.append({"rule": step.name, "program": program.name, "applies": done, "text": f"{program.name}: {said}"})
    return found


def _shortened(message: str, *heads: str) -> str:
    """Without the names that the line says already."""
    for head in (f"{heads[0]}: ", "no program can be speculated. ", f"{heads[1]}: "):
        message = message.removeprefix(head)
    return message


def _said(step: Pass, program: Program, infos: dict[str, ModelInfo], folder: Path) -> str:
    from stemma.codegen.program import attach
    from stemma.library import listed
    from stemma.passes.base import PassContext

    module = attach(Module([], {"kind": "causal_lm"}), listed([program], infos))
    changed = step.run(module, PassContext(source=folder, models=infos))
    reports = dict(changed.properties.get("speculation", ()))
    nodes = dict(reports.get(program.name, ())).get("nodes")
    return f"yes, {nodes} nodes at most." if nodes else "yes." if changed is not module else "it stays as it is."
