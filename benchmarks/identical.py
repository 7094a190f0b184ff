"""The proof: speculated programs emit the same bytes as plain ones. `python -m benchmarks.identical [--answers 1000] > table.md`.

For each drafter, answers of 128 tokens of the bundled target to prompts from held-out files, greedy and sampled at 0.7 and 1.0, one
half one by one and the other in batches of 8; and answers under a constraint (a regular expression), plain and speculated.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import stemma
from benchmarks.speculation import HEADS, artifact, programs, prompts
from stemma.ir.trace import Program, TracedProgram
from stemma.program import constrained, generate

TEMPERATURES = (0.0, 0.7, 1.0)
PATTERN = r"(def [a-z_]{1,12}\(self(, [a-z]{1,8}){0,3}\):\n(        [a-z_]{1,10} = [a-z0-9_\.]{1,16}\n){1,8}){1,4}"
DRAFTERS = (
    "prompt_lookup", "lookahead", "recycling", "stand", f"medusa{{folder={HEADS}}}", f"hydra{{folder={HEADS}}}", "early_exit",
    "draft_model{shape=chain}", "draft_model{shape=tree}", "draft_model", "draft_model{exact=true}",
    "draft_model{shape=rsd,width=2,length=4}", "draft_model{shape=beam,width=4}", "lookahead+stand+recycling",
)  # fmt: skip


class Trial:
    """Answers of one program: the plain ones are computed once."""

    def __init__(self, model: stemma.Model, program: Program, texts: list[list[int]], options: dict[str, Any]) -> None:
        self.model, self.program, self.texts, self.options = model, program, texts, options
        plain, _ = programs(model, "draft=recycling", program)
        self.wanted = {t: self.run(plain, t, 0, len(texts), 8) for t in TEMPERATURES}

    def run(self, program: TracedProgram, temperature: float, start: int, stop: int, batch: int) -> list[list[int]]:
        """Each prompt has noise of its own, by its number."""
        given: dict[str, Any] = {"program": program, "temperature": temperature, "batch_size": batch, **self.options}
        found: list[list[int]] = self.model.generate_ids(self.texts[start:stop], sequence=list(range(start, stop)), **given)
        return found

    def compare(self, options: str) -> tuple[int, int, float]:
        """(answers, answers that differ, tokens per call of the model) of the speculated program."""
        _, fast = programs(self.model, options, self.program)
        answers = differing = followed = trees = 0
        half = len(self.texts) // 2
        for temperature in TEMPERATURES:
            for start, stop, batch in ((0, half, 1), (half, len(self.texts), 8)):
                got = self.run(fast, temperature, start, stop, batch)
                answers += len(got)
                differing += sum(g != w for g, w in zip(got, self.wanted[temperature][start:stop], strict=True))
                followed, trees = followed + self.model.last_statistics.followed, trees + self.model.last_statistics.trees
        return answers, differing, followed / max(trees, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--artifact", type=Path, help="an artifact with all the models, instead of making one")
    parser.add_argument("--answers", type=int, default=1000, help="of 128 tokens, for each drafter")
    parser.add_argument("--constrained", type=int, default=200)
    parser.add_argument("--draft", action="append")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = stemma.load(given.artifact or artifact(given.preset, Path(folder)))
        count = -(-given.answers // len(TEMPERATURES))
        free = Trial(model, generate, prompts(model, count, 64), {"max_new_tokens": 128, "ignore_eos": True})
        short = prompts(model, -(-given.constrained // len(TEMPERATURES)), 32)
        bound = Trial(model, constrained, short, {"max_new_tokens": 128, **model.constraint(regex=PATTERN)})
        print("| drafter | shape | answers | differing | tokens per call | constrained | differing | tokens per call | s |")
        print("|---|---|---|---|---|---|---|---|---|")
        for draft in given.draft or DRAFTERS:
            for shape in ("measured", "fixed"):
                started = time.perf_counter()
                options = f'draft="{draft}",budget=16,shape={shape}'
                cells = [*free.compare(options), *bound.compare(options)]
                shown = " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells)
                name = draft.replace(str(HEADS), "heads")
                print(f"| {name} | {shape} | {shown} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
