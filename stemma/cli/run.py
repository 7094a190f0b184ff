"""`stemma run model.stemma -p "..."`"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stemma.cli.output import console, handled, json_option, show
from stemma.cli.quality import quality

if TYPE_CHECKING:
    from stemma.runtime import Model
    from stemma.runtime.sampling import Statistics


@handled
def run_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, model.stemma.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to continue; - reads standard input.")],
    program: Annotated[
        str, typer.Option(help="The decoding program to run; `stemma inspect` lists those of an artifact.")
    ] = "generate",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: always the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample among the k most likely tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample among the most likely tokens of this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the most likely one.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.0, help="Divide the logits of tokens seen before by this.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="Another option of the program, name=value, repeatable.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text, repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")] = None,
    speculation: Annotated[bool, typer.Option(help="Draft tokens ahead, where the artifact was compiled for it.")] = True,
    chat: Annotated[bool | None, typer.Option(help="Wrap the prompt in the chat template. Default: when there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: every processor this process may use.")] = None,
    variant: Annotated[str | None, typer.Option(help="Instruction set to use instead of the best one.")] = None,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Generate text, streaming it as it comes; then speed and, for lossy artifacts, the measured cost in quality."""
    import io
    import sys

    import stemma

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few characters shows ? for the others

    loaded = stemma.load(model, threads=threads, variant=variant)
    given = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None} | parse_options(loaded, program, options or ())
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if prompt == "-" else prompt
    if chat or (chat is None and loaded.has_chat_template):
        text = loaded.chat([{"role": "user", "content": text}])
    if not speculation and program in loaded.programs:
        program = loaded.programs[program].plain or program
    pieces = []
    for piece in loaded.stream(text, program=program, stop=stop, **chosen):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    statistics = loaded.last_statistics

    def summary() -> None:
        console.print()
        console.print(
            f"[{statistics.prompt_tokens} prompt tokens at {statistics.prefill_tokens_per_second:.0f}/s, "
            f"{statistics.new_tokens} new at {statistics.decode_tokens_per_second:.1f}/s, "
            f"{loaded.variant}, {loaded.threads} threads]",
            style="dim", markup=False,
        )  # fmt: skip
        if statistics.trees:
            console.print(f"[speculation: {speculation_line(statistics)}]", style="dim", markup=False)
        loss = loaded.manifest.raw.get("loss")
        if loss:
            console.print(f"[quality: {quality(loss)}]", style="dim", markup=False)

    data = {
        "text": "".join(pieces), "program": program, "prompt_tokens": statistics.prompt_tokens,
        "new_tokens": statistics.new_tokens, "prefill_tokens_per_second": statistics.prefill_tokens_per_second,
        "decode_tokens_per_second": statistics.decode_tokens_per_second, "loss": loaded.manifest.raw.get("loss"),
        "speculation": speculation_data(statistics),
    }  # fmt: skip
    show(data, summary)


def parse_options(model: Model, program: str, given: Sequence[str]) -> dict[str, Any]:
    """Options written name=value, as the types that the program declares; StemmaRuntimeError for what it does not take."""
    from stemma.runtime import StemmaRuntimeError

    spec = model.programs.get(program)
    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise StemmaRuntimeError(f"An option is written name=value, not {item!r}.")
        if spec is None:
            return {}  # the runtime says that there is no such program
        parameter = spec.option(name)
        if parameter is None:
            known = [p.name for p in spec.options]
            close = get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise StemmaRuntimeError(f"The program {program!r} has no option {name!r}; it has: {', '.join(known) or 'none'}.{hint}")
        if parameter.shape:
            found[name] = value  # the runtime makes tokens of it
            continue
        words = {"true": True, "false": False}
        try:
            if parameter.dtype == "bool":
                found[name] = words[value.lower()]
            else:
                found[name] = float(value) if parameter.dtype == "f32" else int(value)
        except (ValueError, KeyError):
            kind = {"bool": "true or false", "f32": "a number"}.get(parameter.dtype, "an integer")
            raise StemmaRuntimeError(f"The option {name!r} of the program {program!r} is {kind}, not {value!r}.") from None
    return found


def speculation_data(statistics: Statistics) -> dict[str, float] | None:
    """What speculation did; None when nothing was speculated. nodes_per_tree: rows that one call of the model ran."""
    if not statistics.trees:
        return None
    return {
        "trees": statistics.trees, "accepted_length": statistics.followed_per_tree,
        "nodes_per_tree": statistics.nodes / statistics.trees, "drafting_share": statistics.drafting_share,
    }  # fmt: skip


def speculation_line(statistics: Statistics) -> str:
    """The same in words."""
    return (
        f"{statistics.followed_per_tree:.2f} tokens per call of the model, of {statistics.nodes / statistics.trees:.1f} nodes run, "
        f"{statistics.drafting_share:.0%} of the time drafting"
    )
