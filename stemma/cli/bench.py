"""`stemma bench model.stemma`"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stemma.cli.output import console, handled, human_bytes, json_option, progress, show, table

if TYPE_CHECKING:
    from stemma.runtime import Model
    from stemma.runtime.roofline import Roofline

PROMPTS, PROMPT_TOKENS = 4, 64  # excerpts of text that speculation is measured on


@handled
def bench_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, model.stemma.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt to prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to take the median of.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: every processor this process may use.")] = None,
    variant: Annotated[str | None, typer.Option(help="Instruction set to use instead of the best one.")] = None,
    huge_pages: Annotated[bool, typer.Option(help="Copy the weights into huge pages when loading.")] = True,
    program: Annotated[str, typer.Option(help="The speculated program to compare with its plain form.")] = "generate",
    temperature: Annotated[float, typer.Option(min=0.0, help="Of that comparison.")] = 0.0,
    roofline: Annotated[bool, typer.Option(help="Also print each kernel's time and share of the ceiling.")] = False,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Measure tokens per second, the share of this machine's roofline, and what speculation brings."""
    import stemma
    from stemma.runtime.roofline import measure_ceilings
    from stemma.runtime.roofline import roofline as kernel_times

    loaded = stemma.load(model, threads=threads, variant=variant, huge_pages=huge_pages)
    if loaded.kind != "causal_lm":
        raise stemma.StemmaRuntimeError(f"{model} is not a causal language model: there are no tokens per second to measure.")
    for name in dict.fromkeys(("generate", program)):
        if name not in loaded.programs:
            known = ", ".join(loaded.programs)
            raise stemma.StemmaRuntimeError(f"{loaded.manifest.name} has no program {name!r}; its programs: {known}.")
    base = loaded.programs["generate"].plain or "generate"
    new_tokens = min(new_tokens, loaded.context - 1)
    prompt_tokens = max(1, min(prompt_tokens, loaded.context - new_tokens))
    prompt = [i % loaded.vocab for i in range(1, prompt_tokens + 1)]
    bandwidths, prefill, decode, between = [], [], [], []
    with progress() as update:
        for number in range(rounds):
            update("measuring", number, rounds)
            ceilings = measure_ceilings(loaded.device)
            bandwidths.append(ceilings.bandwidth)
            loaded.generate_ids(prompt, program=base, max_new_tokens=1, ignore_eos=True)
            prefill.append(loaded.last_statistics.prefill_tokens_per_second)
            loaded.generate_ids(prompt[:1], program=base, max_new_tokens=new_tokens, ignore_eos=True)
            decode.append(loaded.last_statistics.decode_tokens_per_second)
            between.append(loaded.last_statistics.between_steps_microseconds)
        speculation = _speculation(loaded, program, temperature, new_tokens, rounds, update)
    read = loaded.manifest.weights_bytes
    share = statistics.median(d * read / b for d, b in zip(decode, bandwidths, strict=True))
    step = kernel_times(loaded, ceilings, context=min(128, loaded.context - 1)) if roofline else None
    data = {
        "model": str(model), "variant": loaded.variant, "threads": loaded.threads, "weight_bytes": read, "rounds": rounds,
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode), "decode_min": min(decode), "decode_max": max(decode),
        "between_steps_microseconds": statistics.median(between), "read_bandwidth": statistics.median(bandwidths),
        "share_of_bandwidth": share, "speculation": speculation, **(roofline_data(step) if step else {}),
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
        if speculation is not None:
            _print_speculation(speculation)
        if step is not None:
            print_roofline(step)

    show(data, text)


def _speculation(
    loaded: Model, name: str, temperature: float, new_tokens: int, rounds: int, update: Callable[[str, int, int], None]
) -> dict[str, Any] | None:
    """The program with and without speculation on the same prompts, in turns; None when it is not speculated."""
    spec = loaded.programs[name]
    if spec.plain is None:
        return None
    prompts = _excerpts(loaded, min(PROMPT_TOKENS, max(1, loaded.context - new_tokens)))
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": temperature}
    options = {key: value for key, value in options.items() if spec.option(key) is not None}
    speeds: dict[str, list[float]] = {spec.plain: [], name: []}
    trees = nodes = followed = 0
    drafting = seconds = 0.0
    for number in range(rounds):
        update("speculating", number, rounds)
        for which, speed in speeds.items():
            decoded = spent = 0.0
            for prompt in prompts:
                loaded.generate_ids(prompt, program=which, **options)
                s = loaded.last_statistics
                decoded, spent = decoded + s.decoded_tokens, spent + s.decode_seconds
                trees, nodes, followed = trees + s.trees, nodes + s.nodes, followed + s.followed
                drafting += s.drafting_seconds if s.trees else 0.0
                seconds += s.machine_seconds if s.trees else 0.0
            speed.append(decoded / spent if spent else 0.0)
    plain, fast = speeds.values()
    return {
        "program": name, "temperature": temperature, "prompts": len(prompts), "plain_tokens_per_second": statistics.median(plain),
        "speculated_tokens_per_second": statistics.median(fast), "plain": plain, "speculated": fast,
        "accepted_length": followed / trees if trees else 0.0, "nodes_per_tree": nodes / trees if trees else 0.0,
        "drafting_share": drafting / seconds if seconds else 0.0,
    }  # fmt: skip


def _excerpts(loaded: Model, length: int) -> list[list[int]]:
    """Prompts of `length` tokens: of Python's library where there is a tokenizer, else of repeated random tokens."""
    if "tokenizer.json" in loaded.artifact:
        from stemma.calibration import MODULES, library_text

        texts = [loaded.tokenizer.encode(library_text([name])) for name in MODULES[:PROMPTS]]
        return [ids[len(ids) // 2 :][:length] for ids in texts]
    return [[(i % 16 + 16 * k) % loaded.vocab for i in range(length)] for k in range(PROMPTS)]


def _print_speculation(found: dict[str, Any]) -> None:
    rows = [("plain, tokens/s", *_spread(found["plain"])), ("speculated, tokens/s", *_spread(found["speculated"]))]
    table(("", "median", "min", "max"), rows, f"{found['program']} at temperature {found['temperature']}, in turns")
    ratio = found["speculated_tokens_per_second"] / (found["plain_tokens_per_second"] or 1.0)
    console.print(
        f"Speculation: {ratio:.2f} times as fast, {found['accepted_length']:.2f} tokens per call of the model of "
        f"{found['nodes_per_tree']:.1f} nodes, {found['drafting_share']:.0%} of the time drafting."
    )


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def roofline_data(step: Roofline) -> dict[str, Any]:
    """As JSON."""
    kernels = [vars(k) | {"share": k.share} for k in step.kernels]
    return {"kernels": kernels, "step_seconds": step.seconds, "explained": step.explained}


def print_roofline(step: Roofline) -> None:
    """One row per kind of kernel, the largest first; then their sum, and how much of a whole step that is."""
    kernels = step.kernels
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
    console.print(f"The kernels are {step.explained:.1%} of a step, which takes {step.seconds * 1e6:.4g} us.")
