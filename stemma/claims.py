"""Rerunning the exactness claims of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stemma.runtime import Model, StemmaRuntimeError, load

Progress = Callable[[str, int, int], None]
LENGTHS = (1, 2, 5, 17)  # prompt lengths that cross the tile sizes of the kernels


@dataclass(frozen=True)
class Claim:
    """One claim, whether it held, and what was compared."""

    claim: str
    held: bool
    detail: str


def verify_artifact(path: str | Path, *, threads: int | None = None, progress: Progress | None = None) -> list[Claim]:
    """Check the hashes of every member, and for language models that the bits of the logits and the generated tokens do not depend
    on the batch, the chunking, the thread count or the call. StemmaRuntimeError when the artifact cannot be loaded at all."""
    report = progress or (lambda stage, done, total: None)
    model = load(path, threads=threads)
    claims = [_hashes(model, report)]
    if model.manifest.kind == "causal_lm":
        report("comparing bits", 0, 1)
        claims += list(_bits(model, path))
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
    count = max(1, min(16, model.context - longest))
    for temperature in (0.0, 0.8):
        options = {"max_new_tokens": count, "temperature": temperature, "seed": 7}
        together = model.generate_ids([list(map(int, p)) for p in prompts], **options)
        apart = [model.generate_ids(list(map(int, p)), **options) for p in prompts]
        differing = sum(a != b for a, b in zip(together, apart, strict=True))
        yield Claim(
            f"generated tokens do not depend on the batch (temperature {temperature})",
            differing == 0,
            f"{differing} of {len(prompts)} differ",
        )
