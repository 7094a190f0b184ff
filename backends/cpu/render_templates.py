"""Rendering of the CPU kernel templates: Jinja2 text to C++ text, with every missing seam an error."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).resolve().parent / "templates"


@cache
def environment() -> jinja2.Environment:
    """The one Jinja2 environment of the CPU backend."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **seams: object) -> str:
    """Returns the C++ text of `template` (a file name in templates/) with its seams filled.

    Raises `jinja2.UndefinedError` for a missing seam and `jinja2.TemplateNotFound` for an unknown template.
    """
    return environment().get_template(template).render(**seams)
