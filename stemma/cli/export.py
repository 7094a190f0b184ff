"""`stemma export model.stemma --c FOLDER`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemma.cli.output import console, handled, human_bytes, json_option, show


@handled
def export_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, model.stemma.")],
    c: Annotated[Path, typer.Option("--c", help="The folder to write a C header, library, weights and an example to.")],
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Write what a C program needs to run the model: stemma.h, a shared library, weights, programs, main.c."""
    from stemma.runtime.export import export_c

    made = export_c(model, c)
    sizes = {name: (made.folder / name).stat().st_size for name in made.files}

    def text() -> None:
        for name, size in sizes.items():
            console.print(f"{made.folder / name}  {human_bytes(size)}", markup=False)
        if made.note:
            console.print(made.note, markup=False)
        library = next(name for name in sizes if name.endswith(".so"))
        console.print(
            f"Build the example there: cc main.c -o example -L. -l{library[3:-3]} -Wl,-rpath,'$ORIGIN' && ./example . 32 0 1 2 3",
            markup=False,
        )

    show({"folder": str(made.folder), "files": sizes, "note": made.note}, text)
