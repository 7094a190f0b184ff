"""`stemma compile CHECKPOINT -o model.stemma`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemma.cli.output import console, handled, human_bytes, json_option, print_choices, progress, show, table
from stemma.cli.quality import quality


@handled
def compile_command(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder (config.json, *.safetensors, tokenizer.json), or a GGUF file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The artifact to write, model.stemma.")],
    target: Annotated[str, typer.Option(help="Comma-separated targets; `stemma targets` lists them.")] = "cpu",
    preset: Annotated[
        str, typer.Option(help="exact: the checkpoint's weights, f32 arithmetic. balanced: int8. small: int4.")
    ] = "exact",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with the tokenizer.json to use instead of the checkpoint's.")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="A further model for the programs, repeatable: draft=FOLDER or draft=FOLDER,preset=exact."),
    ] = None,
    programs: Annotated[
        list[str] | None,
        typer.Option(
            "--program",
            help="A decoding program, repeatable: a name of `stemma programs` or ./file.py:function. Default: generate.",
        ),
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help='A pass to add, repeatable: "quantize{bits=4,group=64}" or "./my_pass.py:MyPass{alpha=0.5}".'),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to measure losses on and to calibrate on. Default: Python's own library source.")
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens to calibrate on (default 8192), or, if no pass does, to measure losses on (default 256)."),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Fail when the mean KL divergence (nats per token) is above this.")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="Fail when perplexity grows by more than this factor.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Fail when the share of equal most likely tokens is below this.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=65536, help="Most tokens of one native call; longer prompts are split.")] = 512,
    variants: Annotated[str | None, typer.Option(help="CPU instruction sets, comma-separated, or native. Default: all.")] = None,
    verify_each: Annotated[bool, typer.Option(help="Compare results before and after every pass (small models only).")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write the module after every pass into this folder.")] = None,
    start_after: Annotated[str | None, typer.Option(help="Skip the passes up to this pass or dump file.")] = None,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Compile a checkpoint into an artifact that runs without torch and without the compiler."""
    from stemma.compiler import Budget, compile

    with progress() as update:
        report = compile(
            source, output, tokenizer=tokenizer, targets=target.split(","), preset=preset, passes=passes or (),
            models=models or (), programs=programs, calibration=calibration, calibration_tokens=calibration_tokens,
            budget=Budget(max_kl, max_perplexity, min_top1), rows=rows,
            variants=variants.split(",") if variants else None, verify_each=verify_each, dump=dump,
            start_after=start_after, progress=update,
        )  # fmt: skip

    def text() -> None:
        changing = [r for r in report.records if r.label != "identical" and r.modified]
        losses = [(r.name, quality(r.loss)) for r in changing if r.loss]
        console.print(f"Wrote {report.path} ({human_bytes(report.bytes)}) in {report.seconds:.1f} s.", markup=False)
        if losses:
            table(("lossy pass", "cost against the checkpoint, on calibration text"), losses)
        if not changing:
            console.print("Every pass is labelled identical: the artifact computes what the checkpoint says.")
        for record in report.records:
            print_choices(record.as_json())
        for note in report.notes:
            console.print(f"note: {note}", markup=False)

    show(report.as_json(), text)
