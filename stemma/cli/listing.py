"""`stemma passes | programs | ops | targets | why`: what there is, and why a rule does not match."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stemma.cli.output import console, handled, json_option, show, table

if TYPE_CHECKING:
    from stemma.backends.base import Backend


@handled
def passes_command(as_json: Annotated[bool, json_option()] = False) -> None:
    """List the passes: label, options with defaults, and what they do."""
    from stemma.passes.pipelines import PRESETS
    from stemma.passes.registry import describe

    found = describe()

    def text() -> None:
        rows = [(p["name"], p["label"], ", ".join(f"{k}={v}" for k, v in p["options"].items()), p["doc"]) for p in found]
        table(("pass", "label", "options", "what it does"), rows)
        console.print(f"\nPresets: {', '.join(PRESETS)}.")

    show(found, text)


@handled
def programs_command(as_json: Annotated[bool, json_option()] = False) -> None:
    """List the decoding programs of the library, for `compile --program`: what each does and the options it takes."""
    from stemma.library import describe

    found = describe()

    def text() -> None:
        rows = [(p["name"], ", ".join(f"{k}={v}" for k, v in p["options"].items()), p["doc"]) for p in found]
        table(("program", "options", "what it does"), rows)

    show(found, text)


@handled
def ops_command(as_json: Annotated[bool, json_option()] = False) -> None:
    """List the operations of the IR."""
    from stemma.ir import OPS

    found = []
    for name, op in sorted(OPS.items()):
        parameters = [str(p.replace(annotation=inspect.Parameter.empty)) for p in inspect.signature(op.infer).parameters.values()]
        doc = " ".join((op.__doc__ or "").split())
        found.append({"name": name, "level": op.level, "parameters": parameters, "composite": op.decompose is not None, "doc": doc})
    show(found, lambda: table(("op", "level", "what it is"), [(o["name"], o["level"], o["doc"]) for o in found]))


@handled
def targets_command(as_json: Annotated[bool, json_option()] = False) -> None:
    """List the targets and what this machine can do with them."""
    from stemma.backends import registry

    found = [_target(registry.get(name)) for name in registry.names()]
    columns = ("target", "artifacts", "this machine")
    show(found, lambda: table(columns, [(t["name"], "yes" if t["artifacts"] else "no", t["machine"]) for t in found]))


def _target(backend: Backend) -> dict[str, object]:
    from stemma.ir import StemmaError

    name = backend.name
    if backend.toolchain is None:
        return {"name": name, "artifacts": False, "machine": "runs in the compiler, writes nothing"}
    try:
        machine = backend.toolchain.describe()
    except StemmaError as error:
        machine = str(error)
    return {"name": name, "artifacts": True, "machine": machine}


@handled
def why_command(
    rule: Annotated[str, typer.Argument(help="A rule or a pass; `stemma passes` lists the passes. speculate{draft=...} too.")],
    model: Annotated[Path, typer.Argument(help="A checkpoint folder, or a module text written by --dump.")],
    count: Annotated[int, typer.Option(min=1, help="How many partial matches to show.")] = 5,
    programs: Annotated[
        list[str] | None, typer.Option("--program", help="For speculate: only this program, repeatable. Default: the library.")
    ] = None,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Show the places that a rule almost matches, and why it does not; of speculate, why it leaves a program alone."""
    from stemma.explain import explain_rule

    found = explain_rule(rule, model, count, programs=programs or ())

    def text() -> None:
        if not found:
            console.print(f"No operation of the model resembles the rule {rule}.", markup=False)
        for match in found:
            console.print(match["text"], markup=False)

    show(found, text)
