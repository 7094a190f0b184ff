"""The `stemma` command. Each subcommand lives in one file and imports what it needs when it runs."""

from __future__ import annotations

import typer

from stemma.cli import bench, compile, inspect, listing, run, verify

app = typer.Typer(
    name="stemma",
    help="Compile models into small artifacts that run anywhere, and never change results silently.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compile")(compile.compile_command)
app.command("run")(run.run_command)
app.command("inspect")(inspect.inspect_command)
app.command("bench")(bench.bench_command)
app.command("verify")(verify.verify_command)
app.command("passes")(listing.passes_command)
app.command("ops")(listing.ops_command)
app.command("targets")(listing.targets_command)
app.command("why")(listing.why_command)


def main() -> None:
    """Entry point of the console script and of `python -m stemma`."""
    app()
