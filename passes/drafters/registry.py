"""Finding drafters by name: ours, and classes of a user's file.

make_drafters("recycling")
make_drafters("lookahead+draft_model{shape=tree, width=4}")
make_drafters("./mine.py:Mine{alpha=0.5}")
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import stemma.passes.drafters
from stemma.ir import PassError
from stemma.passes.drafters.base import Drafter


def all_drafters() -> dict[str, type[Drafter]]:
    """Our drafters by name: every `Drafter` with a name in the modules of this package."""
    found: dict[str, type[Drafter]] = {}
    for module in pkgutil.iter_modules(stemma.passes.drafters.__path__):
        for value in vars(importlib.import_module(f"stemma.passes.drafters.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Drafter) and "name" in vars(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def make_drafters(specification: str) -> tuple[Drafter, ...]:
    """The drafters of `name{option=value}+file.py:Class+...`; PassError lists what there is."""
    parts = _parts(specification)
    if not all(parts):
        raise PassError(f"In the drafters {specification!r} one is empty; there are: {', '.join(all_drafters())}.")
    return tuple(_make(part) for part in parts)


def _parts(text: str) -> list[str]:
    """What stands between plus signs outside of braces."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c == "{") - (c == "}")
        if c == "+" and not depth:
            parts.append(current)
            current = ""
        else:
            current += c
    return [part.strip() for part in (*parts, current)]


def _make(specification: str) -> Drafter:
    from stemma.passes.registry import _value, split_options  # passes are found by importing every module, this one too

    name, brace, rest = specification.partition("{")
    if brace and not rest.endswith("}"):
        raise PassError(f"The drafter {specification!r} opens its options with {{ but does not close them with }}.")
    cls = _find(name.strip())
    options: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    valid = {f.name: f for f in fields(cls)}
    for item in split_options(rest[:-1]):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in valid:
            known = ", ".join(f"{f.name}={f.default}" for f in valid.values())
            raise PassError(f"The drafter {cls.name!r} has no option {key!r}. Its options: {known or 'none'}.")
        options[key] = _value(cls.name, key, value, hints[key])
    return cls(**options)


def _find(name: str) -> type[Drafter]:
    from stemma.passes.registry import load_file

    path, colon, class_name = name.rpartition(":")
    if colon and path.endswith(".py"):
        found = getattr(load_file(Path(path), f"the drafter {class_name!r}"), class_name, None)
        if not (isinstance(found, type) and issubclass(found, Drafter) and is_dataclass(found) and "name" in vars(found)):
            raise PassError(
                f"{name} is not a drafter. Write a frozen dataclass with a name that derives from stemma.passes.drafters.Drafter."
            )
        return found
    known = all_drafters()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(known)}."
        raise PassError(f"There is no drafter {name!r}. {hint} One of your own is written ./file.py:Class.")
    return known[name]
