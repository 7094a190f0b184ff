"""What every command shares: plain or JSON output, progress, and errors that end in one paragraph and a non-zero exit."""

from __future__ import annotations

import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

P = ParamSpec("P")
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
TELL_AGAIN = 20.0  # seconds between lines on a long stage, where there is no terminal
PIPE_WIDTH = 160  # columns of tables that no terminal bounds
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _State:
    json = False


def json_option() -> Any:
    """The `--json` option of a command."""

    def remember(value: bool) -> bool:
        _State.json = value
        return value

    return typer.Option("--json", help="Print one JSON object instead of text.", callback=remember, is_eager=True)


def handled(function: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors that Stemma raises on purpose into one paragraph and exit code 1; Ctrl-C into exit code 130."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            _fail(f"Interrupted. {str(interrupt) or 'Nothing was left half-written.'}", INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output has gone: nothing to tell it
            raise typer.Exit(1) from None
        except Exception as error:
            if not _is_ours(error):
                raise
            _fail(str(error), 1)

    return wrapper


def _is_ours(error: Exception) -> bool:
    """Errors of the compiler or of the runtime, without importing either for a command that does not use it."""
    return any(base.__name__ in ("StemmaError", "StemmaRuntimeError") for base in type(error).__mro__)


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line: where in Python it was raised means nothing to who typed a command."""
    errors.print(f"warning: {message}", markup=False)


def _fail(message: str, code: int) -> None:
    if _State.json:
        print(json.dumps({"error": message}))
    else:
        errors.print("error:", style="bold red", end=" ")
        errors.print(message, markup=False)
    raise typer.Exit(code)


def show(data: Any, text: Callable[[], None]) -> None:
    """Print `data` as JSON, or call `text` to print it for people."""
    if _State.json:
        print(json.dumps(data, indent=2, default=str))
    else:
        text()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a plain table; numbers are right-aligned."""
    if title:
        console.print(title, style="bold")
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(r[index], (int, float)) or r[index] in ("", "-") for r in rows)
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(_cell(v) for v in row))
    console.print(grid, markup=False)


def print_choices(record: Mapping[str, Any]) -> None:
    """The table of what a pass chose, when it chose something. record: a pass as the manifest has it."""
    rows = record.get("choices") or ()
    if rows:
        columns = list(rows[0])
        table(columns, [[row[c] for c in columns] for row in rows], f"What {record['name']} chose")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (stage, done, total): a bar on a terminal, plain lines elsewhere, nothing with --json; with the time left."""
    if _State.json:
        yield lambda stage, done, total: None
        return
    if not console.is_terminal:
        seen: set[str] = set()
        current, began, told, first = "", 0.0, 0.0, 0  # the stage since when, when it was last told of, how much was done then

        def line(stage: str, done: int, total: int) -> None:
            nonlocal current, began, told, first
            now = time.monotonic()
            if stage != current:
                current, began, told, first = stage, now, now, done
                if stage not in seen:
                    seen.add(stage)
                    console.print(f"{stage} ...", markup=False)
            elif now - told >= TELL_AGAIN and first < done < total:
                told = now
                left = (now - began) * (total - done) / (done - first)
                console.print(f"{stage}: {done / total:.0%}, about {_duration(left)} left", markup=False)

        yield line
        return
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for earlier in tasks.values():
                    bar.update(earlier, completed=bar.tasks[earlier].total or 1)
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update
        for task in tasks.values():
            bar.update(task, completed=bar.tasks[task].total or 1)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def human_bytes(count: float) -> str:
    """A byte count in decimal units: 1.31 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError
