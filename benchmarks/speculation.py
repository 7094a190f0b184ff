"""What each drafter brings: `python -m benchmarks.speculation [--preset balanced] [--prompts 24] [--draft NAME ...] > table.md`.

The bundled target continues prompts from source files that neither it nor a drafter was trained on. All drafters run on one
artifact, as speculated programs need no compiler. Per prompt the plain program and the speculated one run one after the other, in
turns; a row has the medians over prompts of tokens per second and of their ratio (quartiles in brackets), tokens per call of the
target, nodes per call, the share of time for drafting, and tokens that differ from the plain ones. Tables that a drafter keeps, and
what the governor measured, begin empty and are filled by other prompts (--warm), which no number includes.

--grow MB takes the target grown to so many megabytes of weights instead (benchmarks/grow.py), which computes the same: acceptance
is that of the bundled model, the cost of a call that of a large model, bound by reading its weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import stemma
from benchmarks.grow import NEURONS, grow
from stemma.codegen.program import Listed, attach
from stemma.compiler import compile
from stemma.ir import Module
from stemma.ir.trace import ModelSpec, Program, TracedProgram, trace
from stemma.passes.base import ModelInfo, PassContext
from stemma.passes.registry import make_pass
from stemma.passes.speculate import Speculate
from stemma.program import generate
from stemma.sources import Source

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HEADS = EXAMPLES / "models" / "heads"
ALL = f"draft_model+medusa{{folder={HEADS}}}+hydra{{folder={HEADS}}}+early_exit{{layers_kept=1}}"
ROWS = (
    ("prompt_lookup", 16, "measured"),
    ("lookahead", 16, "measured"),
    ("recycling", 81, "fixed"),
    ("recycling", 16, "measured"),
    ("stand", 16, "measured"),
    ("medusa", 16, "measured"),
    ("hydra", 16, "measured"),
    ("early_exit", 16, "measured"),
    ("medusa", 32, "fixed"),
    ("hydra", 32, "fixed"),
    ("draft_model{shape=chain}", 4, "measured"),
    ("draft_model{shape=tree}", 32, "fixed"),
    ("draft_model{shape=dyspec}", 32, "fixed"),
    ("draft_model{exact=true}", 32, "fixed"),
    ("draft_model{shape=rsd,width=2,length=4}", 32, "fixed"),
    ("draft_model{shape=beam,width=4}", 32, "fixed"),
    ("prompt_lookup+lookahead", 16, "measured"),
    ("prompt_lookup+recycling", 16, "measured"),
    ("prompt_lookup+stand", 16, "measured"),
    ("lookahead+stand+recycling", 16, "measured"),
    ("prompt_lookup", 4, "fixed"),
    ("prompt_lookup", 6, "fixed"),
    ("lookahead", 3, "fixed"),
    ("stand", 3, "fixed"),
    ("recycling", 2, "fixed"),
    ("recycling", 3, "fixed"),
)  # fmt: skip


@dataclass
class Row:
    """What was measured of one drafter, per prompt."""

    plain: list[float]
    fast: list[float]
    trees: int = 0
    nodes: int = 0
    followed: int = 0
    drafting: float = 0.0
    seconds: float = 0.0
    differing: int = 0

    def text(self, name: str) -> str:
        ratios = np.array(self.fast) / np.array(self.plain)
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        return (
            f"| {name} | {np.median(self.plain):.0f} | {np.median(self.fast):.0f} | {middle:.2f} [{low:.2f}-{high:.2f}] |"
            f" {self.followed / max(self.trees, 1):.2f} | {self.nodes / max(self.trees, 1):.1f} |"
            f" {self.drafting / max(self.seconds, 1e-9):.0%} | {self.differing} |"
        )


def prompts(model: stemma.Model, count: int, length: int) -> list[list[int]]:
    """Rows of tokens from held-out files, spread over all of them."""
    sys.path.insert(0, str(EXAMPLES))
    from train_bundled import collect  # the script that trained the models knows what it held out

    texts = [model.tokenizer.encode(text) for text in collect()["held_out"]]
    texts = [ids for ids in texts if len(ids) > 2 * length]
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        ids = texts[i % len(texts)]
        start = int(rng.integers(0, len(ids) - length))
        found.append(ids[start : start + length])
    return found


def context(model: stemma.Model) -> PassContext:
    infos = {m["name"]: ModelInfo(m["vocab"], m["width"], m["context"], tuple(m["eos"])) for m in model.manifest.raw["models"]}
    return PassContext(models=infos)


def programs(model: stemma.Model, options: str, program: Program = generate) -> tuple[TracedProgram, TracedProgram]:
    """A program of the library, plain and speculated."""
    around = context(model)
    specs = {name: ModelSpec(i.vocab, i.width, i.eos, i.context) for name, i in around.models.items()}
    plain = trace(program, specs)
    step = make_pass(f"speculate{{{options}}}")
    assert isinstance(step, Speculate)
    fast = step.run(attach(Module([], {}), [Listed(plain.function, plain.defaults)]), around)[program.name]
    return plain, TracedProgram(fast, plain.defaults)


def measure(model: stemma.Model, options: str, texts: list[list[int]], warm: int, tokens: int, temperature: float) -> Row:
    """texts: the first `warm` of them are not measured."""
    plain, fast = programs(model, options)
    for number, ids in enumerate(texts[:warm]):
        model.generate_ids(ids, seed=number, ignore_eos=True, program=fast, max_new_tokens=tokens, temperature=temperature)
    row = Row([], [])
    for number, ids in enumerate(texts[warm:], warm):
        found: dict[bool, Any] = {}
        for speculated in (False, True) if number % 2 else (True, False):
            given: Any = {"program": fast if speculated else plain, "max_new_tokens": tokens, "temperature": temperature}
            found[speculated] = model.generate_ids(ids, seed=number, ignore_eos=True, **given)
            s = model.last_statistics
            (row.fast if speculated else row.plain).append(s.decoded_tokens / s.decode_seconds)
            if speculated:
                row.trees, row.nodes, row.followed = row.trees + s.trees, row.nodes + s.nodes, row.followed + s.followed
                row.drafting, row.seconds = row.drafting + s.drafting_seconds, row.seconds + s.machine_seconds
        row.differing += sum(a != b for a, b in zip(found[False], found[True], strict=True))
    return row


def artifact(preset: str, folder: Path, target: Path = EXAMPLES / "models" / "target") -> Path:
    """The bundled target, or another checkpoint of it, with everything that drafters need."""
    output = folder / f"{preset}.stemma"
    step = make_pass(f'speculate{{draft="{ALL}",shape=fixed}}')
    compile(
        target, output, preset=preset, passes=(step,), variants=("native",),
        models=(Source("draft", EXAMPLES / "models" / "draft"),),
    )  # fmt: skip
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--grow", type=float, metavar="MB", help="the target with so many megabytes of weights")
    parser.add_argument("--artifact", type=Path, help="an artifact with all the models, instead of making one")
    parser.add_argument("--draft", action="append", help="options of speculate: draft=recycling,budget=64")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--warm", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args()
    rows = given.draft or [f'draft="{draft}",budget={budget},shape={shape}' for draft, budget, shape in ROWS]
    with tempfile.TemporaryDirectory() as folder:
        target = EXAMPLES / "models" / "target"
        if given.grow:
            layers = grow(target, Path(folder, "grown"), given.grow)
            print(f"The target grown to {layers} layers of {NEURONS} neurons, which compute the same.")
            target = Path(folder, "grown")
        model = stemma.load(given.artifact or artifact(given.preset, Path(folder), target), threads=given.threads)
        texts = prompts(model, given.warm + given.prompts, given.length)
        print(f"{given.prompts} prompts of {given.length} tokens, {given.tokens} new ones, temperature {given.temperature:g}:\n")
        print("| drafter | plain tok/s | speculated tok/s | ratio | tokens per call | nodes per call | drafting | differing |")
        print("|---|---|---|---|---|---|---|---|")
        for options in rows:
            print(
                measure(model, options, texts, given.warm, given.tokens, given.temperature).text(options.replace('"', "")),
                flush=True,
            )


if __name__ == "__main__":
    main()
