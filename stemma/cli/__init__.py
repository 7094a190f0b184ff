"""The `stemma` command. Each subcommand lives in one file and imports what it needs when it runs."""

from __future__ import annotations

import typer

from stemma.cli.bench import bench_command
from stemma.cli.compile import compile_command
from stemma.cli.export import export_command
from stemma.cli.inspect import inspect_command
from stemma.cli.listing import ops_command, passes_command, programs_command, targets_command, why_command
from stemma.cli.run import run_command
from stemma.cli.verify import verify_command

app = typer.Typer(
    name="stemma",
    help="Compile models into small artifacts that run anywhere, and never change results silently.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compile")(compile_command)
app.command("run")(run_command)
app.command("export")(export_command)
app.command("inspect")(inspect_command)
app.command("bench")(bench_command)
app.command("verify")(verify_command)
app.command("passes")(passes_command)
app.command("programs")(programs_command)
app.command("ops")(ops_command)
app.command("targets")(targets_command)
app.command("why")(why_command)


def main() -> None:
    """Entry point of the console script and of `python -m stemma`."""
    app()
