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
from stemma.frontend import programs
from stemma.ir.trace import ModelSpec, trace

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


def generate(ends: Sequence[int]) -> Listed:
    """The library's plain decoding."""
    made = trace(programs.generate, {"model": ModelSpec(VOCAB, 0, tuple(ends), CONTEXT)})
    return Listed(made.function, made.defaults)


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
    listed = [generate(changes.get("eos", [1]))] if changes.get("kind", "causal_lm") == "causal_lm" else []
    return {
        "format": 2,
        "abi": 2,
        "stemma": "0.1.0",
        "kind": "causal_lm",
        "name": "fake",
        "targets": {"cpu": {"library": "targets/cpu/kernels.so", "variants": ["imaginary", "portable"]}},
        "functions": {"step": step, "forward": forward},
        "models": [{"name": "model", "vocab": VOCAB, "width": 0, "eos": [1], "context": CONTEXT}],
        "programs": {p.function.name: program_table(p) for p in listed},
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
    """A fake artifact with these macros and these changes to its manifest; with a negative weight, its logits are no numbers."""
    weights = np.array([weight, VOCAB], np.int32).tobytes()
    made = manifest(**changes)
    found = members(library(*defines), text, weights)
    if made["programs"]:
        served = Served("model", VOCAB, 0, tuple(made["eos"]), CONTEXT)
        found.insert(0, ("programs.bin", lower_programs([generate(made["eos"])], [served], manifest()["functions"])))
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
