"""Artifacts of a fake model (tests/fake_model.cpp) for the tests of the runtime, and what that model computes, in Python."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from stemma.backends.cpu import toolchain
from stemma.codegen.artifact import Member, Stream, write_artifact
from stemma.codegen.blob import Served
from stemma.codegen.program import Listed, lower_programs, program_table
from stemma.ir import Function, Node, State, Tensor, dim, ops

WEIGHT = 5
CONTEXT = 96
ROWS = 8
TEXT = ["def quicksort(items):\n    return items", "naïve café, 中文字, 🎉🎊 emoji", "import os\nfor item in items: print(item)"]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@lru_cache
def library(*defines: str) -> bytes:
    """The fake kernels with the decoding machine, compiled once per set of macros."""
    compiler = toolchain.find_compiler()
    flags = ("-std=c++20", "-O1", "-fPIC", "-w", *(f"-D{define}" for define in defines))
    source = Path(__file__).with_name("fake_model.cpp").read_text(encoding="utf-8")
    jobs = [
        toolchain.Job(compiler, source, flags, "the fake"),
        toolchain.Job(compiler, toolchain.machine_source(), (*compiler.flags(None), "-O2"), "the decoding machine"),
    ]
    toolchain.cache_folder().mkdir(parents=True, exist_ok=True)
    objects = toolchain.compile_all(jobs, toolchain.cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.so"
        subprocess.run([*compiler.command, "-shared", "-pthread", *map(str, objects), "-o", str(output)], check=True)
        return output.read_bytes()


OPTIONS: dict[str, tuple[str, float]] = {
    "max_new_tokens": ("i32", 128), "temperature": ("f32", 0.0), "top_k": ("i32", 0), "top_p": ("f32", 1.0), "min_p": ("f32", 0.0),
    "repetition_penalty": ("f32", 1.0), "presence_penalty": ("f32", 0.0), "seed": ("i64", 0), "sequence": ("i64", 0),
    "ignore_eos": ("bool", False),
}  # fmt: skip


def generate(ends: Sequence[int]) -> Listed:
    """The plain decoding loop, by hand."""
    length = dim("prompt_length", 1, CONTEXT)
    prompt = ops.param(name="prompt", type=Tensor("i32", (length,)))
    options = {name: ops.param(name=name, type=Tensor(dtype, ())) for name, (dtype, _) in OPTIONS.items()}
    output = ops.param(name="output", type=State("output"))
    text = ops.start(ops.slice(prompt, axis=0, start=0, stop=length - 1), model="model", vocab=VOCAB)
    token, sequences = ops.param(name="token", type=Tensor("i32", (1,))), ops.param(name="sequences", type=text.type)
    stepped = ops.step(sequences, token)
    after, row = ops.get(stepped, index=0), ops.get(stepped, index=1)
    chosen = ops.select(row, after, *list(options.values())[1:9])
    emitted = ops.emit(output, chosen)
    again = ops.lt(ops.emitted(emitted), options["max_new_tokens"])
    if ends:
        other = ops.logical_not(ops.reshape(ops.is_in(chosen, ids=tuple(ends)), shape=()))
        again = ops.logical_and(again, ops.logical_or(options["ignore_eos"], other))
    carried: list[Node] = [sequences, token, output, *options.values()]
    body = Function("", carried, {"again": again, "s": after, "t": chosen, "o": emitted, **options})
    last = ops.slice(prompt, axis=0, start=length - 1, stop=length)
    ran = ops.loop(text, last, output, *options.values(), body=body)
    function = Function("generate", [prompt, *options.values(), output], {"output": ops.get(ran, index=2)})
    return Listed(function, {name: value for name, (_, value) in OPTIONS.items()})


@lru_cache
def tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: <s> is 0 and begins every text, </s> is 1; every byte has a token."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


VOCAB = 320


def manifest(**changes: Any) -> dict[str, Any]:
    """The manifest of the fake language model; `changes` replace keys."""

    def tensor(name: str, *shape: int | str, dtype: str = "i32") -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    hi = {"rows": 64, "outputs": 64, "sequences": 64, "context": CONTEXT, "slots": 2**31 - 1}
    step = {
        "index": 0,
        "dims": [{"name": name, "lo": 1, "hi": limit} for name, limit in hi.items()],
        "inputs": [tensor(n, "rows") for n in ("tokens", "positions", "slots", "sequence")]
        + [tensor("table", "sequences", "context"), tensor("selected", "outputs")],
        "states": [tensor("k", 1, "slots", 1, dtype="f32"), tensor("v", 2, "slots", 4, dtype="f32")],
        "results": [tensor("logits", "outputs", VOCAB, dtype="f32")],
    }
    forward = {
        "index": 1,
        "dims": [{"name": "batch", "lo": 1, "hi": 16}, {"name": "width", "lo": 2, "hi": 8}],
        "inputs": [tensor("x", "batch", "width", dtype="f32"), tensor("n", "batch", dtype="i64")],
        "states": [],
        "results": [tensor("y", "batch", "1*width", dtype="f32"), tensor("total", 1, dtype="i64")],
    }
    programs = [generate(changes.get("eos", [1]))] if changes.get("kind", "causal_lm") == "causal_lm" else []
    return {
        "format": 2,
        "abi": 2,
        "stemma": "0.1.0",
        "kind": "causal_lm",
        "name": "fake",
        "targets": {"cpu": {"library": "targets/cpu/kernels.so", "variants": ["imaginary", "portable"]}},
        "functions": {"step": step, "forward": forward},
        "models": [{"name": "model", "vocab": VOCAB, "width": 0, "eos": [1], "context": CONTEXT}],
        "programs": {p.function.name: program_table(p) for p in programs},
        "limits": {"context": CONTEXT, "rows": ROWS},
        "vocab": VOCAB,
        "eos": [1],
        "bos": 0,
        "weights": {"member": "weights.bin", "tensors": []},
    } | changes


def members(kernels: bytes, text: bool = True, weights: bytes | None = None) -> list[Member]:
    """The members of the fake artifact, weights as a stream of two chunks."""
    data = np.array([WEIGHT, VOCAB], np.int32).tobytes() if weights is None else weights
    found: list[Member] = [("ir.txt", b"module()"), ("targets/cpu/kernels.so", kernels)]
    if text:
        config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
        found += [("tokenizer.json", tokenizer().to_str().encode()), ("tokenizer_config.json", json.dumps(config).encode())]
        found += [("chat_template.jinja", CHAT.encode())]
    return [*found, ("weights.bin", Stream(len(data), iter([data[:4], data[4:]])))]


def write(path: Path, *defines: str, text: bool = True, weight: int = WEIGHT, **changes: Any) -> Path:
    """A fake artifact with these macros and these changes to its manifest; with a negative weight, no token can be sampled."""
    weights = np.array([weight, VOCAB], np.int32).tobytes()
    made = manifest(**changes)
    found = members(library(*defines), text, weights)
    if made["programs"]:
        served = Served("model", VOCAB, 0, tuple(made["eos"]), CONTEXT)
        found.insert(0, ("programs.bin", lower_programs([generate(made["eos"])], [served], made["functions"])))
    write_artifact(path, made, found)
    return path


def peak(ids: Sequence[int]) -> int:
    """The likeliest token after `ids`."""
    total = sum((token + 1) * (position + 1) + WEIGHT for position, token in enumerate(ids))
    return (total + 3 * (len(ids) - 1)) % VOCAB


def logits(ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """f32[tokens, vocab]: the logits after every prefix of `ids`."""
    peaks = np.array([peak(ids[: n + 1]) for n in range(len(ids))])
    return np.asarray(-0.25 * ((np.arange(VOCAB) - peaks[:, None]) % VOCAB), np.float32)


def greedy(ids: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens, up to and with the first end token."""
    found: list[int] = []
    while len(found) < count and 1 not in found:
        found.append(peak([*ids, *found]))
    return found
