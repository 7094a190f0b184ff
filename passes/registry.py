"""Finding passes and rules by name: ours, those of installed packages (entry point group `stemma.passes`), and a user's file.

make_pass("quantize{bits=4,group=64}")
make_pass("./my_pass.py:MyPass{alpha=0.5}")
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import stemma.passes
from stemma.ir import PassError
from stemma.passes.base import Pass
from stemma.passes.rewrite import Rule

GROUP = "stemma.passes"
QUOTES = "'\""


def builtin_passes() -> dict[str, type[Pass]]:
    """Our own passes by name: every `Pass` with a name in the modules of this package."""
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(stemma.passes.__path__):
        for value in vars(importlib.import_module(f"stemma.passes.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Pass) and "name" in vars(value):
                found[value.name] = value
    return found


def all_passes() -> dict[str, type[Pass]]:
    """Ours and those of installed packages, by name; PassError when a package's pass cannot be loaded or takes a name of ours."""
    found = builtin_passes()
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:
            raise PassError(f"The pass {entry.name!r} of the entry point {entry.value!r} cannot be loaded: {error}.") from error
        if found.setdefault(entry.name, loaded) is not loaded:
            raise PassError(f"The entry point {entry.value!r} names its pass {entry.name!r}, which exists already. Rename it.")
        _checked(loaded, entry.value)
    return found


def find_pass(name: str) -> type[Pass]:
    """The pass called `name`, or the class of a `file.py:Class`. PassError that lists what there is."""
    path, colon, class_name = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _checked(_from_file(Path(path), class_name), name)
    passes = all_passes()
    if name in passes:
        return passes[name]
    raise PassError(_unknown("pass", name, passes) + " A pass of your own is written ./file.py:Class.")


def _from_file(path: Path, class_name: str) -> Any:
    module = load_file(path, f"the pass {class_name!r}")
    if not hasattr(module, class_name):
        own = [
            n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Pass) and v.__module__ == module.__name__
        ]
        raise PassError(f"The file {path} has no class {class_name!r}; its passes are: {', '.join(own) or 'none'}.")
    return getattr(module, class_name)


def load_file(path: Path, what: str) -> types.ModuleType:
    """A user's Python file, run as a module; PassError when it is missing or fails. what: to be found in it, for the message."""
    if not path.is_file():
        raise PassError(f"There is no file {path} to take {what} from.")
    key = f"stemma_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise PassError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise PassError(f"The file {path} fails when it is loaded: {type(error).__name__}: {error}.") from error
    return module


def _checked(loaded: Any, where: str) -> type[Pass]:
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and is_dataclass(loaded)):
        raise PassError(f"{where} is not a pass. Write a frozen dataclass that derives from stemma.passes.Pass or RulePass.")
    if not isinstance(getattr(loaded, "name", None), str):
        raise PassError(f'The pass {where} has no name. Give it a line such as: name: ClassVar[str] = "my_pass".')
    return loaded


def make_pass(specification: str) -> Pass:
    """A pass with its options from `name{option=value, other=value}`; PassError names the valid options and their types.

    Values: true or false, numbers, words or quoted strings, and comma-separated values in parentheses for tuples.
    """
    text = specification.strip()
    name, brace, rest = text.partition("{")
    if brace and not rest.endswith("}"):
        raise PassError(f"The pass {specification!r} opens its options with {{ but does not close them with }}.")
    cls = find_pass(name.strip())
    options: dict[str, Any] = {}
    valid = {f.name: f for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    for item in split_options(rest[:-1]):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in valid:
            known = ", ".join(f"{f.name}={_default(f)}" for f in valid.values())
            what = f"no option {key!r}" if equals else f"options written option=value, not {item!r}"
            close = difflib.get_close_matches(key, valid, 1) if equals else []
            said = (f"Its options: {known}." if known else "It has none.") + (f" Did you mean {close[0]}?" if close else "")
            raise PassError(f"The pass {cls.name!r} takes {what}. {said}")
        if key in options:
            raise PassError(f"The option {key!r} of the pass {cls.name!r} is given twice.")
        options[key] = _value(cls.name, key, value, hints[key])
    missing = [f.name for f in valid.values() if f.default is MISSING and f.default_factory is MISSING and f.name not in options]
    if missing:
        raise PassError(f"The pass {cls.name!r} needs a value for {', '.join(missing)}: {cls.name}{{{missing[0]}=...}}.")
    return cls(**options)


def split_options(text: str) -> list[str]:
    """Comma-separated items; commas inside parentheses, braces and quotes belong to their item."""
    items, depth, quote, current = [], 0, "", ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in QUOTES:
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and not depth:
            items.append(current)
            current = ""
            continue
        current += c
    return [i for i in (*items, current) if i.strip()]


def _value(owner: str, key: str, text: str, hint: Any) -> Any:
    """`text` as the type of a dataclass field: bool, int, float, str, tuples of those, and None where the type allows it."""
    origin = typing.get_origin(hint)
    choices = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in choices:
            return None
        for choice in choices:
            if choice is not type(None):
                try:
                    return _value(owner, key, text, choice)
                except PassError:
                    continue
    elif origin is typing.Literal:
        if _unquoted(text) in choices:
            return _unquoted(text)
        raise PassError(f"The option {key!r} of the pass {owner!r} is one of {', '.join(map(str, choices))}, not {text!r}.")
    elif hint is tuple or origin is tuple:
        inner = text[1:-1] if text[:1] in "([" and text[-1:] in ")]" else text
        item = choices[0] if choices else str
        return tuple(_value(owner, key, part.strip(), item) for part in split_options(inner))
    elif hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif hint is str:
        return _unquoted(text)
    elif hint in (int, float):
        try:
            value = hint(text)
            if value == value:  # NaN would pass every check of a range
                return value
        except ValueError:
            pass
    name = getattr(hint, "__name__", str(hint))
    raise PassError(f"The option {key!r} of the pass {owner!r} takes a value of the type {name}, not {text!r}.")


def _unquoted(text: str) -> str:
    return str(ast.literal_eval(text)) if len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES else text


def _default(field: Field[Any]) -> object:
    if field.default is not MISSING:
        return field.default
    return "..." if field.default_factory is MISSING else field.default_factory()


def describe() -> list[dict[str, Any]]:
    """What `stemma passes` lists: name, label, options with their defaults, first line of the docstring, names of the rules."""
    found = []
    for name, cls in sorted(all_passes().items()):
        doc = (inspect.getdoc(cls) or "").partition("\n")[0]
        options = {f.name: _default(f) for f in fields(cls)}
        found.append({"name": name, "label": cls.label, "options": options, "doc": doc, "rules": [r.name for r in rules_of(cls)]})
    return found


def rules_of(cls: type[Pass]) -> tuple[Rule, ...]:
    """The rules of a pass; none when it is not made of rules."""
    return tuple(getattr(cls, "rules", ()))


def all_rules() -> dict[str, Rule]:
    """Every rule of every pass by name."""
    return {r.name: r for cls in all_passes().values() for r in rules_of(cls)}


def find_rules(name: str) -> list[Rule]:
    """The rule called `name`, or all rules of the pass called `name`; PassError that lists similar names."""
    rules = all_rules()
    if name in rules:
        return [rules[name]]
    path, colon, last = name.rpartition(":")
    passes: Mapping[str, type[Pass]] = all_passes()
    if name in passes or (colon and path.endswith(".py")):
        found = rules_of(find_pass(name))
        if found:
            return list(found)
        raise PassError(f"The pass {name!r} is not made of rules: nothing can be explained. Passes with rules: {_ruled(passes)}.")
    raise PassError(_unknown("rule or pass", name, [*rules, *passes]))


def _ruled(passes: Mapping[str, type[Pass]]) -> str:
    return ", ".join(n for n, cls in sorted(passes.items()) if rules_of(cls))


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 3)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(names)}."
    return f"There is no {what} {name!r}. {hint}"
