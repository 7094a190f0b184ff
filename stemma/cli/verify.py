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
    thorough: Annotated[
        bool, typer.Option(help="Compare 1,000 answers of 128 tokens with and without speculation, at each temperature.")
    ] = False,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Rerun every exactness claim of an artifact: hashes, equal bits for any batch, chunking and threads, speculated or plain."""
    from stemma.claims import QUICK, THOROUGH, verify_artifact

    with progress() as update:
        claims = verify_artifact(model, threads=threads, trial=THOROUGH if thorough else QUICK, progress=update)
    failed = [c for c in claims if not c.held]

    def text() -> None:
        table(("claim", "held", "detail"), [(c.claim, "yes" if c.held else "NO", c.detail) for c in claims])
        console.print("Every claim held." if not failed else f"{len(failed)} claims did not hold.", markup=False)

    show({"held": not failed, "claims": [vars(c) for c in claims]}, text)
    if failed:
        raise typer.Exit(1)
