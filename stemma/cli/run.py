"""`stemma run model.stemma -p "..."`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemma.cli.output import console, handled, json_option, show
from stemma.cli.quality import quality


@handled
def run_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, model.stemma.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample among the most likely tokens of this total probability.")
    ] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the most likely one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.0, help="Divide the logits of tokens seen before by this.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text, repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
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
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if prompt == "-" else prompt
    if chat or (chat is None and loaded.has_chat_template):
        text = loaded.chat([{"role": "user", "content": text}])
    pieces = []
    for piece in loaded.stream(
        text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=stop, seed=seed,
    ):  # fmt: skip
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
        loss = loaded.manifest.raw.get("loss")
        if loss:
            console.print(f"[quality: {quality(loss)}]", style="dim", markup=False)

    data = {
        "text": "".join(pieces), "prompt_tokens": statistics.prompt_tokens, "new_tokens": statistics.new_tokens,
        "prefill_tokens_per_second": statistics.prefill_tokens_per_second,
        "decode_tokens_per_second": statistics.decode_tokens_per_second, "loss": loaded.manifest.raw.get("loss"),
    }  # fmt: skip
    show(data, summary)
