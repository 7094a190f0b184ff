"""Running the command line in this process, for the tests of commands and of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from stemma.cli import app


def run(*arguments: object, text: str | None = None) -> Result:
    """The result of `stemma ARGUMENTS`; an exception that is not an exit is raised, as a user would see it as a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeeded(*arguments: object, text: str | None = None) -> str:
    """Standard output of a command that succeeds."""
    result = run(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments: object) -> Any:
    """What the command prints with --json."""
    return json.loads(succeeded(*arguments, "--json"))


def refused(*arguments: object, code: int = 1, text: str | None = None) -> str:
    """The message of a command that fails as it should: one paragraph after "error:", and nothing else on standard error."""
    result = run(*arguments, text=text)
    assert result.exit_code == code, result.output
    return paragraph(result.stderr)


def paragraph(text: str) -> str:
    """The one paragraph of an error, without its head."""
    assert "Traceback" not in text
    start, _, message = text.partition("error: ")
    message = message.strip()
    assert start == "" and "\n" not in message and message.endswith((".", "?", ".cpp")) and len(message) < 1500, text
    return message


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file under a folder."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
