"""Finding decoding programs: those of the library by name, and a user's own in a file.

find_program("generate")        find_program("beam{width=8}")        find_program("./mine.py:my_program")
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stemma.codegen.program import Listed
from stemma.ir import Node, StemmaError, walk
from stemma.ir.size import UNBOUNDED
from stemma.ir.trace import Model, ModelSpec, Program, trace
from stemma.passes.base import ModelInfo
from stemma.passes.registry import load_file, split_options

STEPS = frozenset({"step", "feed", "step_mixed", "expand", "follow"})  # operations that give (sequences, logits, hidden)


def library() -> dict[str, Program]:
    """The programs that come with Stemma, by name."""
    from stemma.frontend.programs import PROGRAMS

    return dict(PROGRAMS)


def find_program(specification: str | Program) -> Program:
    """A program by its name in the library or `file.py:function`, with fixed options in braces; StemmaError if there is none."""
    if isinstance(specification, Program):
        return specification
    text = specification.strip()
    name, brace, rest = text.partition("{")
    if brace and not rest.endswith("}"):
        raise StemmaError(f"The program {specification!r} opens its options with {{ but does not close them with }}.")
    found = _named(name.strip())
    return found.fix(**_options(found, rest[:-1])) if brace else found


def _named(name: str) -> Program:
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        own = {n: v for n, v in vars(load_file(Path(path), f"the program {function!r}")).items() if isinstance(v, Program)}
        if function in own:
            return own[function]
        raise StemmaError(f"The file {path} has no program {function!r}; its programs are: {', '.join(own) or 'none'}. "
                          "A program is a function with the decorator @program.")  # fmt: skip
    programs = library()
    if name in programs:
        return programs[name]
    close = difflib.get_close_matches(name, programs, 3)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(sorted(programs))}."
    raise StemmaError(f"There is no program {name!r}. {hint} A program of your own is written ./file.py:function.")


def _options(program: Program, text: str) -> dict[str, Any]:
    known = {n: p for n, p in inspect.signature(program.run).parameters.items() if p.kind is p.KEYWORD_ONLY}
    options: dict[str, Any] = {}
    for item in split_options(text):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in known:
            what = f"no option {key!r}" if equals else f"options written option=value, not {item!r}"
            raise StemmaError(f"The program {program.name!r} takes {what}. Its options: {', '.join(known) or 'none'}.")
        try:
            options[key] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def summary(program: Program) -> str:
    """The first sentence of a program's docstring."""
    paragraph = " ".join((inspect.getdoc(program.run) or "").partition("\n\n")[0].split())
    return re.split(r"(?<!al)(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]


def describe() -> list[dict[str, Any]]:
    """What `stemma programs` lists: name, options with their defaults, models, first sentence of the docstring."""
    found = []
    for name, program in sorted(library().items()):
        signature = inspect.signature(program.run, eval_str=True).parameters
        options = {n: program.fixed.get(n, p.default) for n, p in signature.items() if p.kind is p.KEYWORD_ONLY}
        found.append({"name": name, "options": options, "models": model_names(program), "doc": summary(program)})
    return found


def model_names(program: Program) -> list[str]:
    """The models that a program takes, in the order of its parameters."""
    return [n for n, p in inspect.signature(program.run, eval_str=True).parameters.items() if p.annotation is Model]


def listed(programs: Sequence[Program], models: Mapping[str, ModelInfo]) -> list[Listed]:
    """The programs traced for these models; TraceError at the user's line, StemmaError when two have one name."""
    specs = {n: ModelSpec(m.vocab, m.width, m.eos, m.context or UNBOUNDED) for n, m in models.items()}
    found: list[Listed] = []
    for program in programs:
        wanted = model_names(program)
        for name in wanted:
            if name not in specs:
                have = ", ".join(specs)
                raise StemmaError(
                    f"The program {program.name!r} needs a model called {name!r}; given: {have}. Add --model {name}=FOLDER."
                )
        traced = trace(program, {n: s for n, s in specs.items() if n in wanted})
        if any(f.function.name == program.name for f in found):
            raise StemmaError(f"Two programs are called {program.name!r}. Rename one.")
        found.append(Listed(traced.function, traced.defaults))
    return found


def models_used(program: Listed) -> list[str]:
    """Names of the models whose sequences a program starts, in the order it meets them."""
    names = (str(n.attrs["model"]) for n in walk(program.function) if n.op.name == "start")
    return list(dict.fromkeys(names))


def reads_hidden(programs: Sequence[Listed]) -> bool:
    """Whether a program reads the hidden states of the model called "model"."""
    return any(_is_hidden(n) for p in programs for n in walk(p.function))


def _is_hidden(node: Node) -> bool:
    if node.op.name != "get" or node.attrs["index"] != 2 or node.inputs[0].op.name not in STEPS:
        return False
    state: Any = node.inputs[0].inputs[0].type
    return bool(state.args[0] == "model")


def mixed_tokens(programs: Sequence[Listed]) -> int:
    """The most tokens that a program mixes in one row of the model called "model"; 1: none does."""
    found = [1]
    for program in programs:
        for node in walk(program.function):
            state: Any = node.inputs[0].type if node.op.name == "step_mixed" else None
            if state is not None and state.args[0] == "model":
                found.append(int(str(node.inputs[1].shape[1])))
    return max(found)
