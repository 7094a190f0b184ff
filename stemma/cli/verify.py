"""`stemma verify model.stemma`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemma.cli.output import console, handled, json_option, progress, show, table


@handled
def verify_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, model.stemma.")],
    threads: Annotated[int | None, typer.Option(min=1, help="Compare one thread with this many. Default: all.")] = None,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Rerun every exactness claim of an artifact: hashes, and equal bits for any batch, chunking, threads and call."""
    from stemma.claims import verify_artifact

    with progress() as update:
        claims = verify_artifact(model, threads=threads, progress=update)
    failed = [c for c in claims if not c.held]

    def text() -> None:
        table(("claim", "held", "detail"), [(c.claim, "yes" if c.held else "NO", c.detail) for c in claims])
        console.print("Every claim held." if not failed else f"{len(failed)} claims did not hold.", markup=False)

    show({"held": not failed, "claims": [vars(c) for c in claims]}, text)
    if failed:
        raise typer.Exit(1)
