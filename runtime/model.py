"""A loaded artifact: `forward`, `generate`, `generate_ids`, `stream`, `run`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stemma.backends.cpu.device import Device, copy_weights
from stemma.runtime.artifact import Artifact
from stemma.runtime.constraint import csr_json, csr_regex, csr_trie
from stemma.runtime.errors import ArtifactError, InputError, StemmaRuntimeError
from stemma.runtime.export import token_bytes
from stemma.runtime.function import CompiledFunction, convert, empty
from stemma.runtime.generate import Job, Request, decode
from stemma.runtime.machine import Machines
from stemma.runtime.manifest import ProgramSpec, parse_program
from stemma.runtime.sampling import Statistics, check_integer, check_stop, option
from stemma.runtime.session import Session, Step
from stemma.runtime.tokenizer import TextStream, Tokenizer

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
_BATCH = 32
_PROGRAMS = "programs.bin"
HUGE_FROM = 1 << 26  # bytes of weights below which caches and small pages serve as well


def load(
    path: str | os.PathLike[str],
    *,
    target: str = "cpu",
    variant: str | None = None,
    threads: int | None = None,
    huge_pages: bool | None = None,
) -> Model:
    """Open an artifact and start it on this machine.

    `variant` names an instruction set (default: $STEMMA_VARIANT, else the best one the machine has), `threads` the size of the
    team (default: $STEMMA_THREADS, else the processors available). Weights are used in place in the file's pages.
    Huge pages are read faster, by half on some machines, but need a copy: `huge_pages` True makes it now, False never, None in the
    background while the model already runs, when it is worth it and twice the memory is free. StemmaRuntimeError (one
    paragraph: what is wrong with which file, and the cure) when that is not possible.
    """
    artifact = Artifact(path)
    try:
        targets = artifact.manifest.targets
        if target != "cpu" or target not in targets:
            raise ArtifactError(
                f"{artifact.path} has kernels for {', '.join(sorted(targets)) or 'no target'}, and this runtime runs 'cpu';"
                f" {target!r} was asked for. Compile the model again with `--target cpu`."
            )
        library = targets[target].get("library")
        if not isinstance(library, str):
            raise ArtifactError(f"{artifact.path} names no library of kernels for {target!r}. Compile the model again.")
        kernels = artifact.read(library)
        weights = copy_weights(artifact.weights) if huge_pages else artifact.weights
        device = Device(kernels, weights, variant=variant, threads=threads, source=str(artifact.path))
        if huge_pages is None and HUGE_FROM <= artifact.weights.size <= _free_memory() // 2:
            device.move_to_huge_pages()
        return Model(artifact, device)
    except BaseException:
        artifact.close()
        raise


def _free_memory() -> int:
    """Bytes that the system can give without swapping; 0 where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0


@dataclass(frozen=True)
class Run:
    """What a program gave: the tokens that it emitted, its named results, and what it took."""

    tokens: list[int]
    results: dict[str, NDArray[Any]]
    statistics: Statistics


class Model:
    """A model ready to run, made by `load`. Safe to use from several threads: native calls take turns.

    `artifact` stays open, so tokenizer and checks are those of the file that was loaded, also when its name was given to another.
    """

    def __init__(self, artifact: Artifact, device: Device) -> None:
        self.artifact, self.path, self.manifest, self.device = artifact, artifact.path, artifact.manifest, device
        self.last_statistics = Statistics()
        self._tokenizer: Tokenizer | None = None
        self._machines = Machines(device)
        self._lowered: dict[Any, tuple[Any, bytes, ProgramSpec]] = {}
        if self.kind == "causal_lm":
            self.step = Step(device, self.manifest)
            self._blob = artifact.read(_PROGRAMS) if _PROGRAMS in artifact else b""
        else:
            self._forward = CompiledFunction(device, self.manifest.functions["forward"])

    def __repr__(self) -> str:
        return f"<stemma.Model {self.manifest.name} ({self.kind}), {self.variant}, {self.threads} threads>"

    @property
    def kind(self) -> str:
        """ "causal_lm", or "model" for anything else."""
        return self.manifest.kind

    @property
    def context(self) -> int:
        """Positions of the longest sequence; 0 when it is no language model."""
        return self.manifest.context

    @property
    def vocab(self) -> int:
        """Number of tokens; 0 when it is no language model."""
        return self.manifest.vocab

    @property
    def variant(self) -> str:
        """The instruction set in use."""
        return self.device.variant

    @property
    def threads(self) -> int:
        """Threads of the kernels."""
        return self.device.threads

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read when first used. ArtifactError when the artifact has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.artifact.read, self.artifact.__contains__, str(self.path))
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return "tokenizer.json" in self.artifact and self.tokenizer.has_chat_template

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The prompt for a conversation, as token ids for `generate` and `stream` (the template's text has its own first token).

        See `Tokenizer.chat` for the messages and variables. InputError when there is no template or it rejects the messages.
        """
        return self.tokenizer.encode(self.tokenizer.chat(messages, **variables), special=False)

    def check(self) -> int:
        """Hash every member of the file, weights included; returns their bytes. ArtifactError when one differs."""
        return sum(size for _, size in self.artifact.check())

    def forward(self, *inputs: ArrayLike, **named: ArrayLike) -> Any:
        """The model's plain function.

        A causal language model takes one integer array [batch, tokens] of ids and gives float32 logits [batch, tokens, vocab].
        `rows` limits the tokens of one native call, which changes no bit of the result. Other models take their inputs by name or
        position and give a dict of named outputs. InputError for wrong input.
        """
        if self.kind != "causal_lm":
            return self._forward(*inputs, **named)
        rows = check_integer("rows", named.pop("rows", self.step.rows), 1, 2**31 - 1)
        if len(inputs) + len(named) != 1 or set(named) - {"ids"}:
            raise InputError(f"{self.manifest.name} takes one input, the token ids: an integer array [batch, tokens].")
        array = np.asarray(convert(inputs[0] if inputs else named["ids"], "i64", "ids"))
        if array.ndim != 2 or 0 in array.shape:
            raise InputError(f"ids has the sizes {list(array.shape)}, but must be [batch, tokens] with at least one of each.")
        self._check_ids(array)
        if array.shape[1] > self.step.context:
            raise InputError(f"{array.shape[1]} tokens exceed the context of {self.manifest.name}, {self.step.context}.")
        ids = array.astype(np.int32)
        batch, tokens = ids.shape
        out = empty((batch, tokens, self.step.vocab), "f32")
        rows = min(rows, self.step.rows)
        together = min(max(1, rows // tokens), self.step.sequences)
        for start in range(0, batch, together):
            part = ids[start : start + together]
            session = Session(self.step, len(part), tokens, rows)
            try:
                session.forward(part, out[start : start + together].reshape(part.size, -1))
            finally:
                session.close()
        return out

    @property
    def programs(self) -> Mapping[str, ProgramSpec]:
        """The decoding programs of the artifact, by name."""
        return self.manifest.programs

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """The text that follows a prompt, or the list of texts that follow each of a list of prompts.

        A prompt is text, or token ids. Options, all by name; the program that runs ("generate") has those from max_new_tokens to
        sequence, and perhaps more (`programs["generate"].options`):
          max_new_tokens (128)     at most so many tokens follow; fewer where the context ends, with a warning
          temperature (0)          0 takes the likeliest token; top_k (0), top_p (1), min_p (0), repetition_penalty (1),
                                   presence_penalty (0): filters
          ignore_eos (False)       go on after the end token
          seed (0)                 of the noise, which is counted by (seed, sequence, position): a prompt gets the same answer alone
                                   and anywhere in any list
          sequence (0)             a number, or one per prompt: other numbers give other samples with the same seed
          stop (none)              text, or several: the answer ends before the first of them
          add_special_tokens (True)  let the tokenizer add its own tokens around a text prompt; False for text that has them
          batch_size (32)          prompts run together; a matter of speed and memory only
          program ("generate")     another program of the artifact that emits an answer
        InputError for wrong options, an empty prompt of a model without a first token, or a prompt that fills the context.
        """
        requests, single, run = self._start(prompt, True, **options)
        for _ in run:
            pass
        texts = ["".join(request.pieces) for request in requests]
        return texts[0] if single else texts

    def generate_ids(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Like `generate`, but the new token ids (an end token included), as a list or a list of lists."""
        requests, single, run = self._start(prompt, bool(options.get("stop")), **options)
        for _ in run:
            pass
        ids = [request.new for request in requests]
        return ids[0] if single else ids

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Like `generate` for one prompt, as pieces of text as they come; together they are what `generate` returns.

        Errors are raised here, not at the first piece. The iterator may be dropped at any time.
        """
        _, single, run = self._start(prompt, True, eager=True, **options)
        if not single:
            raise InputError("stream takes one prompt. Use generate for a list of them.")
        return (piece for _, piece in run if piece)

    def constraint(
        self,
        *,
        regex: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        choices: Sequence[str | Sequence[int]] | None = None,
    ) -> dict[str, NDArray[np.int32]]:
        """What an answer may be, as options of the program `constrained`: model.generate(prompt, program="constrained", **this).

        One of: a regular expression, a JSON schema (both for the whole answer; they need the package outlines-core), or a set of
        texts or token sequences. After a complete answer only an end token follows. InputError for a broken or empty constraint,
        StemmaRuntimeError when the tokenizer's tokens have no bytes of their own.
        """
        self._language_model()
        if (regex is not None) + (json_schema is not None) + (choices is not None) != 1:
            raise InputError("A constraint is one of regex, json_schema and choices.")
        if not self.manifest.eos:
            raise InputError(f"{self.manifest.name} has no end token to end a constrained answer with.")
        if choices is not None:
            if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
                raise InputError(f"choices={choices!r} must be a list of texts or of token sequences.")
            texts = [self.tokenizer.encode(c, False) if isinstance(c, str) else self._choice(c) for c in choices]
            arrays = csr_trie(texts, self.manifest.eos[0])
        else:
            words = token_bytes(json.loads(self.artifact.read("tokenizer.json")), self.vocab)
            if words is None:
                raise StemmaRuntimeError(
                    f"The tokens of {self.manifest.name} are no pieces of bytes, as patterns and schemas need. Give choices."
                )
            if json_schema is not None:
                arrays = csr_json(json_schema, words, self.manifest.eos)
            elif isinstance(regex, str):
                arrays = csr_regex(regex, words, self.manifest.eos)
            else:
                raise InputError(f"regex={regex!r} must be text.")
        return dict(zip(("indptr", "tokens", "targets"), arrays, strict=True))

    def _choice(self, ids: Any) -> list[int]:
        """The checked token ids of one of several answers."""
        if not isinstance(ids, (Sequence, np.ndarray)) or isinstance(ids, bytes):
            raise InputError(f"A choice is text or token ids, not {type(ids).__name__}.")
        return [check_integer("a token id", token, 0, self.vocab - 1) for token in ids]

    def run(
        self,
        program: Any,
        prompt: Prompt,
        *,
        host: Mapping[str, Callable[..., ArrayLike]] | None = None,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> Run:
        """Run a decoding program on one prompt: a program of the artifact by name, or one written with `stemma.program`.

        The latter is lowered when it is first given, which takes no C++ compiler. `host` maps names to the Python functions that
        the program calls with arrays; what they raise ends the program. Options are the program's own (rows of tokens may be
        text); its `max_new_tokens` is at most what the context has room for. InputError for wrong options, or a prompt that
        fills the context.
        """
        self._language_model()
        spec, blob, key = self._program(program, options)
        ids = self._ids(prompt, add_special_tokens)
        given = self._options(spec, options)
        limit, clipped = self._limit(spec, given, len(ids))
        request = Request(ids, self._inputs(spec, ids, given, limit), limit, clipped=clipped)
        self.last_statistics = statistics = Statistics()
        job = Job(spec, blob, self.manifest.models, key, host or {}, whole=True)
        for _ in decode(self._machines, job, [request], statistics, 1, self.step.context):
            pass
        return Run(request.new, request.results, statistics)

    def _program(self, program: Any, options: dict[str, Any]) -> tuple[ProgramSpec, bytes, Any]:
        """What is known of a program, the blob that holds it, and the key of its machines. Takes from `options` what is fixed."""
        if isinstance(program, str):
            if program not in self.programs:
                known = ", ".join(sorted(self.programs)) or "none"
                raise InputError(f"{self.manifest.name} has no program {program!r}; its programs: {known}.")
            return self.programs[program], self._blob, ""
        # Only programs written in Python need the compiler's half, so that running an artifact never imports it.
        compiler = import_module("stemma.codegen.program")
        fixed = {name: options.pop(name) for name in compiler.fixed_options(program) if name in options}
        key = (id(program), repr(sorted(fixed.items())))
        if key not in self._lowered:
            blob, name, table = compiler.lower_object(program, self.manifest.raw, fixed)
            self._lowered[key] = program, blob, parse_program(name, table)  # the program is kept, so that its id is
        _, blob, spec = self._lowered[key]
        return spec, blob, key

    def _options(self, spec: ProgramSpec, options: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """The checked options of a program."""
        if unknown := sorted(n for n in options if spec.option(n) is None):
            known = ", ".join(p.name for p in spec.options) or "none"
            raise InputError(f"There is no option {', '.join(unknown)}. The program {spec.name!r} has: {known}.")
        if missing := [p.name for p in spec.options if p.default is None and p.name not in options]:
            raise InputError(f"The program {spec.name!r} needs {', '.join(missing)}. Give a value by name.")
        found = {}
        for p in spec.options:
            if p.name in options:
                value = options[p.name]
                found[p.name] = option(p, self.tokenizer.encode(value) if p.shape and isinstance(value, str) else value)
        return found

    def _sequence(self, spec: ProgramSpec, number: Any) -> dict[str, NDArray[Any]]:
        parameter = spec.option("sequence")
        if parameter is None:
            raise InputError(f"There is no option sequence. The program {spec.name!r} has none of that name.")
        return {"sequence": option(parameter, number)}

    def _limit(self, spec: ProgramSpec, given: Mapping[str, NDArray[Any]], length: int) -> tuple[int | None, bool]:
        """How many tokens may follow a prompt of that length, and whether the context says so; None: the program decides."""
        parameter, room = spec.option("max_new_tokens"), self.step.context - length
        if parameter is None:
            return None, False
        wanted = given["max_new_tokens"] if "max_new_tokens" in given else parameter.default
        limit = int(wanted if wanted is not None else room)
        return min(limit, room), limit > room

    def _inputs(
        self, spec: ProgramSpec, ids: Sequence[int], given: Mapping[str, NDArray[Any]], limit: int | None
    ) -> dict[str, NDArray[Any]]:
        found = dict(given)
        if spec.prompt is not None:
            found[spec.prompt.name] = np.asarray(ids, np.int32)
        if limit is not None:
            found["max_new_tokens"] = np.asarray(limit, np.int32)
        return found

    def _start(
        self,
        prompt: Prompt | Sequence[Prompt],
        text: bool,
        *,
        stop: str | Sequence[str] | None = None,
        sequence: int | Sequence[int] | None = None,
        add_special_tokens: bool = True,
        batch_size: int = _BATCH,
        program: str = "generate",
        eager: bool = False,
        **options: Any,
    ) -> tuple[list[Request], bool, Iterator[tuple[Request, str]]]:
        """Requests for the prompts, whether it was a single one, and the iterator that runs them."""
        self._language_model()
        spec, blob, key = self._program(program, options)
        batch = check_integer("batch_size", batch_size, 1, 2**31 - 1)
        strings = check_stop(stop)
        given = self._options(spec, options)
        prompts, single = self._prompts(prompt, add_special_tokens)
        each = isinstance(sequence, (Sequence, np.ndarray)) and not isinstance(sequence, str)
        numbers: list[Any] = list(sequence) if each else [sequence] * len(prompts)  # type: ignore[arg-type]
        if len(numbers) != len(prompts):
            raise InputError(f"sequence has {len(numbers)} numbers for {len(prompts)} prompts. Give one for each, or one for all.")
        eos = () if options.get("ignore_eos", False) else self.manifest.eos
        requests = []
        for ids, number in zip(prompts, numbers, strict=True):
            own = given if number is None else given | self._sequence(spec, number)
            limit, clipped = self._limit(spec, given, len(ids))
            stream = TextStream(self.tokenizer, ids) if text else None
            inputs = self._inputs(spec, ids, own, limit)
            requests.append(Request(ids, inputs, limit, clipped=clipped, eos=eos, text=stream, stop=strings))
        self.last_statistics = Statistics()
        job = Job(spec, blob, self.manifest.models, key, eager=eager or bool(strings))
        return requests, single, decode(self._machines, job, requests, self.last_statistics, batch, self.step.context)

    def _prompts(self, prompt: Prompt | Sequence[Prompt], special: bool) -> tuple[list[list[int]], bool]:
        if isinstance(prompt, (str, bytes, bytearray)):
            return [self._ids(prompt, special)], True
        try:
            items: list[Any] = list(prompt)
        except TypeError:
            raise InputError(f"A prompt is text or token ids, or a list of those, not {type(prompt).__name__}.") from None
        if items and all(hasattr(item, "__index__") and not hasattr(item, "__len__") for item in items):
            return [self._ids(items, special)], True
        if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind not in "iu" and prompt.size:
            raise InputError(f"Token ids must be integers, not {prompt.dtype}.")
        return [self._ids(item, special) for item in items], False

    def _ids(self, prompt: Any, special: bool) -> list[int]:
        """The checked token ids of one prompt."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, special)
        elif isinstance(prompt, (bytes, bytearray)):
            raise InputError(f"A prompt is text or token ids, not {type(prompt).__name__}. Decode it.")
        else:
            try:
                ids = [check_integer("a token id", token, 0, 2**31 - 1) for token in prompt]
            except TypeError:
                raise InputError(f"A prompt is text or token ids, not {type(prompt).__name__}.") from None
        if not ids:
            if self.manifest.bos is None:
                raise InputError(f"The prompt is empty, and {self.manifest.name} has no first token to begin with. Give a prompt.")
            ids = [self.manifest.bos]
        if len(ids) >= self.step.context:
            raise InputError(
                f"The prompt has {len(ids)} tokens; the context of {self.manifest.name} is {self.step.context},"
                " and at least one must stay free for the answer. Shorten the prompt."
            )
        self._check_ids(np.asarray(ids))
        return ids

    def _check_ids(self, ids: NDArray[Any]) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.step.vocab:
            wrong = low if low < 0 else high
            raise InputError(f"The token id {wrong} is not in the vocabulary of {self.manifest.name}, 0 to {self.step.vocab - 1}.")

    def _language_model(self) -> None:
        if self.kind != "causal_lm":
            raise StemmaRuntimeError(f"{self.manifest.name} is not a causal language model; it has `forward` only.")

    def close(self) -> None:
        """Stop the threads and release the memory. Later use raises StemmaRuntimeError."""
        self.device.close()
        self.artifact.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
