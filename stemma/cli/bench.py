"""`stemma bench model.stemma`"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stemma.cli.output import console, handled, human_bytes, json_option, progress, show, table

if TYPE_CHECKING:
    from stemma.runtime.roofline import KernelTime


@handled
def bench_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, model.stemma.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt to prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to take the median of.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: every processor this process may use.")] = None,
    variant: Annotated[str | None, typer.Option(help="Instruction set to use instead of the best one.")] = None,
    huge_pages: Annotated[bool, typer.Option(help="Copy the weights into huge pages when loading.")] = True,
    roofline: Annotated[bool, typer.Option(help="Also print each kernel's time and share of the ceiling.")] = False,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Measure tokens per second and the share of this machine's roofline."""
    import stemma
    from stemma.runtime.roofline import measure_ceilings
    from stemma.runtime.roofline import roofline as kernel_times

    loaded = stemma.load(model, threads=threads, variant=variant, huge_pages=huge_pages)
    if loaded.kind != "causal_lm":
        raise stemma.StemmaRuntimeError(f"{model} is not a causal language model: there are no tokens per second to measure.")
    prompt_tokens = max(1, min(prompt_tokens, loaded.context - new_tokens))
    prompt = [i % loaded.vocab for i in range(1, prompt_tokens + 1)]
    bandwidths, prefill, decode, between = [], [], [], []
    with progress() as update:
        for number in range(rounds):
            update("measuring", number, rounds)
            ceilings = measure_ceilings(loaded.device)
            bandwidths.append(ceilings.bandwidth)
            loaded.generate_ids(prompt, max_new_tokens=1, ignore_eos=True)
            prefill.append(loaded.last_statistics.prefill_tokens_per_second)
            loaded.generate_ids(prompt[:1], max_new_tokens=new_tokens, ignore_eos=True)
            decode.append(loaded.last_statistics.decode_tokens_per_second)
            between.append(loaded.last_statistics.between_steps_microseconds)
    read = loaded.manifest.weights_bytes
    share = statistics.median(d * read / b for d, b in zip(decode, bandwidths, strict=True))
    kernels = kernel_times(loaded, ceilings, context=min(128, loaded.context - 1)) if roofline else []
    data = {
        "model": str(model), "variant": loaded.variant, "threads": loaded.threads, "weight_bytes": read, "rounds": rounds,
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode), "decode_min": min(decode), "decode_max": max(decode),
        "between_steps_microseconds": statistics.median(between), "read_bandwidth": statistics.median(bandwidths),
        "share_of_bandwidth": share, "kernels": [vars(k) | {"share": k.share} for k in kernels],
    }  # fmt: skip

    def text() -> None:
        rows = [
            (f"prefill of {prompt_tokens}, tokens/s", *_spread(prefill)),
            (f"decode of {new_tokens}, tokens/s", *_spread(decode)),
            ("between steps, microseconds/token", *_spread(between)),
            ("read bandwidth, GB/s", *_spread([b / 1e9 for b in bandwidths])),
        ]
        table(("", "median", "min", "max"), rows, f"{loaded.manifest.name}, {loaded.variant}, {loaded.threads} threads")
        console.print(f"Decoding reads {human_bytes(read)} of weights per token: {share:.0%} of the measured bandwidth.")
        if kernels:
            print_roofline(kernels)

    show(data, text)


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def print_roofline(kernels: Sequence[KernelTime]) -> None:
    """One row per kind of kernel, the largest first; the last row is the sum."""
    groups: dict[tuple[str, str], list[float]] = {}
    for k in kernels:
        sums = groups.setdefault((k.name, k.what), [0.0] * 5)
        for i, value in enumerate((1, k.flops / 1e6, k.bytes / 1e6, k.predicted * 1e6, k.seconds * 1e6)):
            sums[i] += value
    ordered = sorted(groups.items(), key=lambda item: -item[1][4])
    named = [(f"{name} ({what})" if what else name, sums) for (name, what), sums in ordered]
    named.append(("all", [sum(column) for column in zip(*groups.values(), strict=True)]))
    rows = [(name, int(v[0]), *v[1:], f"{v[3] / v[4]:.0%}" if v[4] else "-") for name, v in named]
    table(("kernel", "launches", "MFLOP", "MB", "floor us", "measured us", "share"), rows)
