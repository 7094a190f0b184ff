"""Rerunning the exactness claims of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stemma.runtime import Model, StemmaRuntimeError, load
from stemma.runtime.manifest import ProgramSpec

Progress = Callable[[str, int, int], None]
LENGTHS = (1, 2, 5, 17)  # prompt lengths that cross the tile sizes of the kernels
TEMPERATURES = (0.0, 0.7, 1.0)
BATCHES = (1, 4)


@dataclass(frozen=True)
class Trial:
    """How much is decoded to compare speculated programs with plain ones: prompts, their seeds, and new tokens of each."""

    prompts: int
    seeds: tuple[int, ...]
    tokens: int


QUICK = Trial(4, (1, 2), 24)
THOROUGH = Trial(1000, (1,), 128)


@dataclass(frozen=True)
class Claim:
    """One claim, whether it held, and what was compared."""

    claim: str
    held: bool
    detail: str


def verify_artifact(
    path: str | Path, *, threads: int | None = None, trial: Trial = QUICK, progress: Progress | None = None
) -> list[Claim]:
    """Check the hashes of every member, and for language models that the bits of the logits and the generated tokens do not depend
    on the batch, the chunking, the thread count or the call, and that speculation changes no token. StemmaRuntimeError when the
    artifact cannot be loaded at all."""
    report = progress or (lambda stage, done, total: None)
    model = load(path, threads=threads)
    claims = [_hashes(model, report)]
    if model.manifest.kind == "causal_lm":
        report("comparing bits", 0, 1)
        claims += list(_bits(model, path))
        claims += list(_programs(model, trial, report))
    return claims


def _hashes(model: Model, report: Progress) -> Claim:
    report("hashing", 0, 1)
    try:
        total = model.check()
    except StemmaRuntimeError as error:
        return Claim("every member has its recorded hash", False, str(error))
    return Claim("every member has its recorded hash", True, f"{total} bytes")


def _bits(model: Model, path: str | Path) -> Iterator[Claim]:
    rng = np.random.default_rng(0)
    longest = min(max(LENGTHS), model.context)
    prompts = [rng.integers(0, model.vocab, min(n, longest)) for n in LENGTHS]
    alone = [model.forward(p[None])[0] for p in prompts]

    def equal(claim: str, others: list[NDArray[np.float32]]) -> Claim:
        differing = sum(int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32))) for a, b in zip(alone, others, strict=True))
        total = sum(a.size for a in alone)
        return Claim(claim, differing == 0, f"{differing} of {total} logits differ")

    batch = [model.forward(np.stack([p, *(rng.integers(0, model.vocab, (6, len(p))))]))[0] for p in prompts]
    yield equal("logits do not depend on the batch (alone, in a batch of 7)", batch)
    yield equal("logits do not depend on chunking (one call, token by token)", [model.forward(p[None], rows=1)[0] for p in prompts])
    if model.threads > 1:
        single = load(path, threads=1, variant=model.variant)
        yield equal(f"logits do not depend on threads (1, {model.threads})", [single.forward(p[None])[0] for p in prompts])
        single.close()


def _programs(model: Model, trial: Trial, report: Progress) -> Iterator[Claim]:
    """Claims on every decoding program: alone and in a batch, plain and speculated."""
    entries = model.manifest.raw["programs"]
    plain = {spec.plain for spec in model.programs.values()}
    prompts = make_prompts(model, trial)
    count = max(1, min(trial.tokens, model.context - max(map(len, prompts))))
    for name, spec in model.programs.items():
        if spec.host or name in plain:
            if spec.host:
                yield Claim(f"{name} decodes the same in any batch", True, f"not run: it calls {', '.join(spec.host)} in Python")
            continue
        if missing := [p.name for p in spec.options if p.default is None]:
            yield Claim(f"{name} decodes the same in any batch", True, f"not run: it needs {', '.join(missing)}")
            continue
        if (label := entries[name].get("label", "identical")) != "identical":
            yield Claim(f"{name} decodes the same as plain, and in any batch", True, f"not claimed: its label is {label}")
            continue
        report(f"running {name}", 0, 1)
        few = prompts[: QUICK.prompts]
        for temperature in TEMPERATURES[:2] if spec.option("temperature") else (None,):
            options = _options(spec, temperature, 7, min(count, QUICK.tokens))
            together = model.generate_ids(few, program=name, **options)
            apart = [model.generate_ids(p, program=name, **options) for p in few]
            differing = sum(a != b for a, b in zip(together, apart, strict=True))
            at = "" if temperature is None else f" (temperature {temperature})"
            yield Claim(f"{name} decodes the same in any batch{at}", differing == 0, f"{differing} of {len(few)} differ")
        if spec.plain is not None:
            yield _speculated(model, spec, prompts, trial, count, report)


def make_prompts(model: Model, trial: Trial) -> list[list[int]]:
    """Seeded random prompts of the lengths in LENGTHS, in turns."""
    rng = np.random.default_rng(1)
    longest = max(1, model.context // 2)
    return [rng.integers(0, model.vocab, min(LENGTHS[i % len(LENGTHS)], longest)).tolist() for i in range(trial.prompts)]


def _options(spec: ProgramSpec, temperature: float | None, seed: int, count: int) -> dict[str, object]:
    """Those of these options that the program takes."""
    wanted = {"temperature": temperature, "seed": seed, "max_new_tokens": count}
    return {name: value for name, value in wanted.items() if value is not None and spec.option(name) is not None}


def _speculated(model: Model, spec: ProgramSpec, prompts: list[list[int]], trial: Trial, count: int, report: Progress) -> Claim:
    """Whether a program gives the same tokens with speculation and without."""
    claim = f"{spec.name} decodes the same with and without speculation"
    runs = differing = followed = trees = 0
    temperatures = TEMPERATURES if spec.option("temperature") else (None,)
    seeds = trial.seeds if spec.option("seed") else trial.seeds[:1]
    cases = [(t, s) for t in temperatures for s in (seeds if t else seeds[:1])]
    for number, (temperature, seed) in enumerate(cases):
        options = _options(spec, temperature, seed, count)
        report(f"comparing {spec.name}", number, len(cases))
        wanted = model.generate_ids(prompts, program=spec.plain, **options)
        for batch in BATCHES:
            got = model.generate_ids(prompts, program=spec.name, batch_size=batch, **options)
            differing += sum(a != b for a, b in zip(got, wanted, strict=True))
            runs += len(prompts)
            trees, followed = trees + model.last_statistics.trees, followed + model.last_statistics.followed
    gain = f", {followed / trees:.2f} tokens per call of the model" if trees else ""
    what = f"{differing} of {runs} answers differ; temperatures {', '.join(str(t) for t in temperatures)}, batches of 1 and 4{gain}"
    return Claim(claim, differing == 0, what)
