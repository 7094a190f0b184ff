"""`stemma passes | ops | targets | why`: what there is, and why a rule does not match."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from stemma.cli.output import console, handled, json_option, show, table


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
    from stemma.backends.registry import describe

    found = describe()
    show(found, lambda: table(("target", "compiles here", "runs here", "notes"), [tuple(t.values()) for t in found]))


@handled
def why_command(
    rule: Annotated[str, typer.Argument(help="A rule or a pass; `stemma passes` lists the passes.")],
    model: Annotated[Path, typer.Argument(help="A checkpoint folder, or a module text written by --dump.")],
    count: Annotated[int, typer.Option(min=1, help="How many partial matches to show.")] = 5,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Show the places that a rule almost matches, and why it does not."""
    from stemma.compiler import explain_rule

    found = explain_rule(rule, model, count)

    def text() -> None:
        if not found:
            console.print(f"No operation of the model resembles the rule {rule}.", markup=False)
        for match in found:
            console.print(match["text"], markup=False)

    show(found, text)
