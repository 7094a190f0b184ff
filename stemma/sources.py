"""The checkpoints that go into one artifact: the model and those beside it, and what they have in common."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stemma.ir import MAIN, StemmaError
from stemma.passes.base import ModelInfo, Needs, Pass
from stemma.passes.heads import KINDS, Heads
from stemma.vocabulary import Token, read_tokens, translation

if TYPE_CHECKING:
    from stemma.frontend.hf import Checkpoint

_NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = (MAIN, "output", "prompt", *KINDS)


@dataclass(frozen=True)
class Source:
    """A checkpoint folder beside the model's: the name that programs know it by, and its preset (None: that of the model)."""

    name: str
    folder: Path
    preset: str | None = None


def parse_source(text: str) -> Source:
    """`draft=./small` or `draft=./small,preset=exact`; StemmaError when it is written otherwise."""
    name, equals, rest = text.partition("=")
    folder, comma, option = rest.rpartition(",preset=")
    if not comma:
        folder, option = rest, ""
    if not equals or not folder:
        raise StemmaError(f"A further model is written name=folder or name=folder,preset=exact, not {text!r}.")
    return Source(name.strip(), Path(folder), option or None)


def further_models(given: Mapping[str, str | Path | Source] | Sequence[str | Source]) -> tuple[Source, ...]:
    """What `compile(models=...)` was given, in order; StemmaError for names that cannot be used, or that are used twice."""
    found: list[Source] = []
    if isinstance(given, Mapping):
        found = [Source(n, v.folder, v.preset) if isinstance(v, Source) else Source(n, Path(v)) for n, v in given.items()]
    else:
        found = [v if isinstance(v, Source) else parse_source(v) for v in given]
    names = [s.name for s in found]
    for name in names:
        _check_name(name)
        if names.count(name) > 1:
            raise StemmaError(f"Two models are called {name!r}.")
    return tuple(found)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in RESERVED or name.endswith("_step"):
        raise StemmaError(f"A further model cannot be called {name!r}. Choose another word of small letters, such as draft.")


def needs_of(passes: Sequence[Pass], names: Sequence[str]) -> Needs:
    """What all these passes need or make; StemmaError for a model that was not given, or is made twice."""
    all_needs = [(p.name, p.needs()) for p in passes]
    for owner, needs in all_needs:
        for name in needs.models:
            if name not in names:
                have = f"given: {', '.join(names)}" if names else "none was given"
                raise StemmaError(f"The pass {owner!r} needs a model called {name!r}; {have}. Add --model {name}=FOLDER.")
    made = tuple(dict.fromkeys(m for _, needs in all_needs for m in needs.made if m not in passes))  # those given make theirs
    further = [p.makes() for p in (*made, *passes) if p.makes()]
    for name in further:
        _check_name(name)
        if [*names, *further].count(name) > 1:
            raise StemmaError(f"Two models are called {name!r}. Give the one that a pass makes another name.")
    return Needs(
        tuple(dict.fromkeys(n for _, needs in all_needs for n in needs.models)),
        made,
        tuple(dict.fromkeys(h for _, needs in all_needs for h in needs.heads)),
        any(needs.hidden for _, needs in all_needs),
    )


def making(needs: Needs) -> tuple[Pass, ...]:
    """The passes on the main model that make what is needed."""
    return (
        *needs.made,
        *(Heads(kind, folder) for kind, folder in needs.heads if kind in KINDS),
    )


def head_weights(kind: str, folder: str, checkpoint: Path) -> Path:
    """The file with the weights of draft heads; by default beside the checkpoint's own, or in a folder `heads` next to it."""
    given = Path(folder)
    if folder:
        places = [given if given.suffix == ".safetensors" else given / f"{kind}.safetensors"]
    else:
        places = [checkpoint / f"{kind}.safetensors", checkpoint.resolve().parent / "heads" / f"{kind}.safetensors"]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        exist = "does not exist" if len(places) == 1 else "do not exist"
        raise StemmaError(f"There are no {kind} heads: {' and '.join(map(str, places))} {exist}. Name their folder.")
    return found


def describe(checkpoint: Checkpoint, what: str) -> ModelInfo:
    """The model of a checkpoint as its configuration tells; StemmaError when it is no causal language model."""
    if checkpoint.kind != "causal_lm":
        raise StemmaError(f"The {what} in {checkpoint.folder} is a {checkpoint.architecture}, no causal language model.")
    text = checkpoint.config.get_text_config()
    return ModelInfo(int(text.vocab_size), int(getattr(text, "hidden_size", 0)), checkpoint.context or 0, checkpoint.eos)


def related(
    name: str, target: Checkpoint, other: Checkpoint, *, drafts: bool, notes: list[str]
) -> tuple[ModelInfo, dict[str, Any]]:
    """Another model with the tables between its tokens and those of the target; and the manifest's entry on its tokenizer.

    drafts: it is to guess tokens of the target. StemmaError when it then cannot: no token of the two is the same.
    """
    main, info = describe(target, "model"), describe(other, f"model {name!r}")
    if main.context and info.context and info.context < main.context:
        notes.append(f"The model {name!r} reads at most {info.context} tokens, the model itself {main.context}.")
    files = [next((f for f in c.files if f.name == "tokenizer.json"), None) for c in (target, other)]
    entry: dict[str, Any] = {"tokenizer": "the same"}
    if files[0] is None or files[1] is None:
        if info.vocab != main.vocab:
            missing = (target, other)[files[0] is not None].folder
            raise StemmaError(
                f"The models {MAIN!r} and {name!r} have {main.vocab} and {info.vocab} tokens, and {missing} has no tokenizer.json "
                "that would tell which are the same. Add it."
            )
        notes.append(f"A tokenizer is missing: the tokens of {name!r} are taken to be those of the model.")
        return info, {"tokenizer": "taken to be the same"}
    if info.vocab == main.vocab and filecmp.cmp(files[0], files[1], shallow=False):
        return info, entry
    tokens, others = read_tokens(files[0]), read_tokens(files[1])
    if info.vocab == main.vocab and tokens == others:
        return info, entry
    to_target, from_target = translation(others, tokens, info.vocab), translation(tokens, others, main.vocab)
    if drafts and not _shared(tokens, others):
        raise StemmaError(
            f"The model {name!r} in {other.folder} cannot draft for {target.folder}: their vocabularies have no token in common. "
            "Use a model with the same tokenizer."
        )
    for source, table, end in ((info, to_target, main.eos), (main, from_target, info.eos)):
        if source.eos and end and table[source.eos[0]] < 0:
            table[source.eos[0]] = end[0]
    common = int(np.count_nonzero(from_target >= 0))
    notes.append(f"The model {name!r} has another tokenizer: {common} of the model's {main.vocab} tokens are also its own.")
    entry = {"tokenizer": "another", "common_tokens": common}
    return ModelInfo(info.vocab, info.width, info.context, info.eos, to_target, from_target), entry


def _shared(a: dict[int, Token], b: dict[int, Token]) -> bool:
    """Whether any token of text is in both."""
    texts = {token for token in a.values() if not token[0]}
    return any(token in texts for token in b.values())
