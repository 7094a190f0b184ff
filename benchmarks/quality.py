"""What every weight format costs in quality, on the bundled target model: perplexity and KL on text that it was never trained on.

    nice -n 19 python -m benchmarks.quality -o benchmarks/quality.md [--cache build/quality.json] [--only gptq]

Weights of all linears but the tied embedding and head are changed, as papers do; activations are f32. Passes calibrate on the
compiler's default text; perplexity and KL are measured on other held-out modules, with the reference interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from stemma.calibration import MODULES, library_text
from stemma.frontend.hf import load_checkpoint, trace_checkpoint
from stemma.ir import Array, Module, WeightStore
from stemma.passes.base import PassContext
from stemma.passes.calibrate import embedded_weights
from stemma.passes.manager import run_pipeline
from stemma.passes.measure import Meter
from stemma.passes.raising import RAISING
from stemma.passes.registry import make_pass

MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "target"
MEASURED = ("bisect", "calendar", "fractions", "graphlib", "sched", "string", "zipapp")  # held out, and not calibrated on
UNIFORM = ("int8", "int4_g32", "int4_g64", "int4_g128", "uint4_g64", "int3_g32", "int3_g64", "uint3_g64", "int2_g64", "uint2_g64")
LOOKUP = ("lut4_g64", "lut3_g64", "lut2_g64", "lut1_g64")
ROWS: tuple[tuple[str, str], ...] = (
    *(("rounded to nearest", f"quantize{{format={f},embeddings=false}}") for f in (*UNIFORM, "ternary_g64", *LOOKUP)),
    *(("GPTQ", f"gptq{{format={f},embeddings=false}}") for f in (*UNIFORM, "ternary_g64", "lut1_g64")),
    *(("AWQ", f"awq{{format={f},embeddings=false}}") for f in ("int4_g64", "int3_g64", "int2_g64", "uint4_g64")),
    *(("AWQ, GPTQ", f"awq{{format={f},embeddings=false,round=false}}+gptq{{format={f},embeddings=false}}") for f in ("int4_g64",)),
    ("k-means, unweighted", "quantize{format=nu4_o0,embeddings=false}"),
    ("k-means, unweighted", "quantize{format=nu3_o0,embeddings=false}"),
    ("SqueezeLLM, no outliers", "squeezellm{bits=4,outliers=0,embeddings=false}"),
    ("SqueezeLLM, no outliers", "squeezellm{bits=3,outliers=0,embeddings=false}"),
    ("SqueezeLLM", "squeezellm{bits=4,embeddings=false}"),
    ("SqueezeLLM", "squeezellm{bits=3,embeddings=false}"),
    ("SqueezeLLM, compensated", "squeezellm{bits=4,compensate=true,embeddings=false}"),
    ("SqueezeLLM, compensated", "squeezellm{bits=3,compensate=true,embeddings=false}"),
    ("pruned by energy", "quantize{format=int4_g32_s50,embeddings=false}"),
    *(("GQSA", f"gqsa{{sparsity={s}}}") for s in (20, 40, 50, 60)),
    ("GQSA", "gqsa{sparsity=50,group=16}"),
    ("GQSA", "gqsa{sparsity=50,group=64}"),
    ("2:4 by magnitude", "quantize{format=int4_g64_2of4,embeddings=false}"),
    ("2:4", "two_four"),
)  # fmt: skip


def documents(text: str, count: int, length: int) -> tuple[Array, ...]:
    """Token ids of a text, in documents of one length."""
    ids = np.array(Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids[:count], np.int64)
    return tuple(ids[i : i + length] for i in range(0, len(ids) - length + 1, length))


def bits_per_weight(module: Module) -> float:
    """Of the linears' weights, with scales and all else that belongs to them."""
    forward = module["forward"]
    embedded = set(embedded_weights(forward))
    weights = {n.inputs[1] for n in forward.nodes if n.op.name == "linear" and n.inputs[1] not in embedded}
    return sum(8 * int(str(w.tensor.bytes)) for w in weights) / sum(int(str(w.tensor.elements)) for w in weights)


def measure(specification: str, module: Module, weights: WeightStore, samples: Sequence[Array], meter: Meter) -> dict[str, Any]:
    """One row of the table."""
    own = WeightStore()
    own.include(weights)
    started = time.perf_counter()
    changed = module
    for step in specification.split("+"):
        changed = make_pass(step).run(changed, PassContext(weights=own, calibration=tuple(samples)))
    seconds = time.perf_counter() - started
    meter.weights = own
    loss = meter(changed)
    linears = [n.inputs[1].dtype for n in changed["forward"].nodes if n.op.name == "linear"]
    return {
        "format": max(linears, key=linears.count), "bits": bits_per_weight(changed), "kl": loss.kl, "top1": loss.top1,
        "before": loss.perplexity_before, "perplexity": loss.perplexity_after, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="results by row, as JSON: those that it has are not measured again")
    parser.add_argument("--only", default="", help="measure only rows whose passes contain this; the others come from the cache")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibrated", type=int, default=4096, help="tokens that passes calibrate on")
    options = parser.parse_args()
    checkpoint = load_checkpoint(MODEL)
    module, weights = trace_checkpoint(checkpoint)
    module = run_pipeline(module, RAISING, PassContext(weights=weights)).module
    samples = documents(library_text(MODULES), options.calibrated, 512)
    meter = Meter(module, weights, documents(library_text(MEASURED), options.tokens, 512))
    cache = options.cache
    found: dict[str, dict[str, Any]] = json.loads(cache.read_text()) if cache and cache.exists() else {}
    for _, specification in ROWS:
        if specification not in found and options.only in specification:
            found[specification] = measure(specification, module, weights, samples, meter)
            print(specification, found[specification], flush=True)
            if cache:
                cache.write_text(json.dumps(found, indent=1))
    options.output.write_text(table(found, options.tokens, sum(map(len, samples))))


def table(found: dict[str, dict[str, Any]], tokens: int, calibrated: int) -> str:
    """The rows that were measured, as Markdown."""
    before = next(iter(found.values()))["before"]
    lines = [
        "# Quality of every weight format", "",
        f"`python -m benchmarks.quality`, {datetime.date.today()}: the bundled target model (4.5M parameters, 3.5M of them in the "
        f"linears that are changed; embedding and head stay bf16), f32 activations, {tokens} tokens of modules of Python's library "
        f"held out from training ({', '.join(MEASURED)}). Calibrated passes saw {calibrated} tokens of other held-out modules "
        f"({', '.join(MODULES)}). bf16: perplexity {before:.3f}. KL: nats per token against bf16. Bits: per weight of the changed "
        "linears, with scales, zero points, codebooks, outliers and masks. GGUF's two-level formats (q2_k, q4_k, q6_k) need rows "
        "of a multiple of 256 and do not fit this model's 640. A codebook per row weighs more here, in rows of 256 to 640, than in "
        "large models. Lookup formats of 2 to 4 bits hold the same values as the uniform ones.", "",
        "| method | format | bits | perplexity | KL | top-1 equal |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method, specification in ROWS:
        if specification in found:
            row = found[specification]
            lines.append(
                f"| {method} | {row['format']} | {row['bits']:.2f} | {row['perplexity']:.3f} | {row['kl']:.4f} "
                f"| {row['top1']:.1%} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
