"""Train the two bundled code models on the Python standard library's own source.

    python examples/train_bundled.py tokenizer
    python examples/train_bundled.py train draft --minutes 12
    python examples/train_bundled.py train target --minutes 65
    python examples/train_bundled.py evaluate draft target

Checkpoints and the token cache live in the work folder; a repeated `train` resumes. The finished models are plain
Llama checkpoints in bfloat16, written to examples/models/<name>.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

MODELS = Path(__file__).resolve().parent / "models"
SEED = 20260
VOCABULARY = 4096
END_OF_TEXT, END_ID = "<|endoftext|>", 0
BATCH_TOKENS = 2048
MAX_CONTEXT = 1024
# Windows are short at first (cheaper attention) and of the full length at the end.
SHORT_CONTEXT, SHORT_CONTEXT_UNTIL = 256, 0.8
# Share of library code in a batch; the rest is the library's own tests, more in volume but more monotonous.
LIBRARY_SHARE = 0.6
CHECKPOINT_SECONDS = 240.0

# Never trained on, wherever in the library a file of this name lies; nor are the tests of these modules.
HELD_OUT = (
    "bisect.py",
    "calendar.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "sched.py",
    "shlex.py",
    "statistics.py",
    "string.py",
    "textwrap.py",
    "zipapp.py",
)

# Generated tables, prose and fixtures: data, not code.
EXCLUDED = re.compile(
    r"site-packages/|dist-packages/|encodings/|pydoc_data/|lib2to3/tests/|idlelib/idle_test/|config-|_sysconfigdata"
    r"|test/(encoded_modules|cjkencodings|test_tools|tokenize_tests|bad|dis_|crashers/)|__phello__|_pydatetime_data"
)

# Line ends take the following indentation with them, so that an indentation is one token.
PIECES = r"(?:[ \t]*\n)+[ \t]*| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

SHAPES: dict[str, dict[str, Any]] = {
    "target": {
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 640,
    },
    "draft": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
    },
}


def read_source(path: Path) -> str | None:
    """The text of one file, or None if it is not UTF-8 or is mostly a table of numbers."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    if not text.strip() or sum(map(str.isdigit, text)) > 0.2 * len(text) or len(text) > 400 * text.count("\n"):
        return None
    return text


def collect() -> dict[str, list[str]]:
    """The texts of the standard library by part: "library", "tests" and "held_out", each in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unseen = {*HELD_OUT, *(f"test_{name}" for name in HELD_OUT)}
    parts: dict[str, list[str]] = {"library": [], "tests": [], "held_out": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in HELD_OUT:
            parts["held_out"].append(path.read_text("utf-8"))
        elif path.name not in unseen and not EXCLUDED.search(name):
            text = read_source(path)
            if text is not None:
                parts["tests" if "test" in name else "library"].append(text)
    return parts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level byte-pair tokenizer of VOCABULARY entries; END_OF_TEXT is END_ID."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def prepare(work: Path) -> None:
    """Write work/tokenizer.json and work/{library,tests}.npy (uint16 token ids, documents ended by END_OF_TEXT)."""
    parts = collect()
    tokenizer = train_tokenizer(parts["library"] + parts["tests"])
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"))
    for part in ("library", "tests"):
        ids = [END_ID]
        for encoding in tokenizer.encode_batch_fast(parts[part], add_special_tokens=False):
            ids.extend([*encoding.ids, END_ID])
        np.save(work / f"{part}.npy", np.array(ids, dtype=np.uint16))
        size = sum(len(text.encode()) for text in parts[part])
        print(f"{part}: {len(parts[part])} files, {size} bytes, {len(ids)} tokens", flush=True)


def configuration(name: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        head_dim=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        **SHAPES[name],
    )


def windows(tokens: torch.Tensor, context: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless windows of context + 1 tokens: each pass covers the tokens once, in random order, newly aligned."""
    while True:
        shift = int(torch.randint(context, (), generator=generator))
        count = (len(tokens) - 1 - shift) // context
        for index in torch.randperm(count, generator=generator).tolist():
            start = shift + index * context
            yield tokens[start : start + context + 1]


def batches(parts: dict[str, torch.Tensor], context: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches int64 [BATCH_TOKENS / context, context + 1], LIBRARY_SHARE of the rows from the library."""
    generator = torch.Generator().manual_seed(seed)
    sources = {part: windows(tokens, context, generator) for part, tokens in parts.items()}
    while True:
        draws = torch.rand(BATCH_TOKENS // context, generator=generator).tolist()
        yield torch.stack([next(sources["library" if draw < LIBRARY_SHARE else "tests"]) for draw in draws])


def rate(progress: float) -> float:
    """Learning rate over its peak at a fraction of the time budget: short warm-up, plateau, linear decay to zero."""
    return min(1.0, progress / 0.01, max(0.0, 1.0 - progress) / 0.65)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(matrices, lr=0.015, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=2.5e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def grow(small: LlamaForCausalLM, large: LlamaForCausalLM) -> None:
    """Set a fresh large model to compute what the small one computes, before any training of its own.

    The small model's tensors become leading blocks; what is new reads the residual stream but writes nothing to it yet.
    The small model's first layers become the first layers, its last layer the last.
    """
    ratio = large.config.hidden_size / small.config.hidden_size
    count, last = small.config.num_hidden_layers, large.config.num_hidden_layers - 1
    places = {index: index for index in range(count - 1)} | {count - 1: last}
    # The new part of the tied embedding must not be zero, or neither it nor what it meets gets a gradient.
    large.model.embed_tokens.weight.mul_(0.1)
    targets = dict(large.named_parameters())
    for name, source in small.named_parameters():
        match = re.search(r"layers\.(\d+)\.", name)
        place = name.replace(match[0], f"layers.{places[int(match[1])]}.") if match else name
        target = targets[place]
        if place.endswith("norm.weight"):
            # The mean square is now taken over the new, nearly silent channels too.
            target.fill_(float(source.mean()) / math.sqrt(ratio))
            target[: len(source)] = source / math.sqrt(ratio)
            continue
        if "layers" in place:
            target[: source.shape[0], source.shape[1] :] = 0.0
        target[: source.shape[0], : source.shape[1]] = source


def export(model: LlamaForCausalLM, tokenizer: Path, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer as transformers and tokenizers read them."""
    copy = LlamaForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def train(name: str, minutes: float, work: Path, folder: Path, grown_from: str | None, factor: float) -> None:
    """Train one model for a budget of wall-clock minutes, earlier parts of an interrupted run included.

    It starts from random weights or is grown from the latest checkpoint of a smaller model; factor scales the peak
    learning rates.
    """
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(configuration(name))
    for layer in model.model.layers:  # each layer starts as the identity
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    if grown_from is not None:
        small = LlamaForCausalLM(configuration(grown_from))
        origin: dict[str, Any] = torch.load(work / f"{grown_from}.pt")
        small.load_state_dict(origin["model"])
        grow(small, model)
        print(f"grown from {grown_from} at {origin['step'] * BATCH_TOKENS} tokens", flush=True)
    opts = optimizers(model)
    peaks = [factor * opt.param_groups[0]["lr"] for opt in opts]
    parts = {part: torch.from_numpy(np.load(work / f"{part}.npy").astype(np.int64)) for part in ("library", "tests")}
    step, first, earlier = 0, 0, 0.0
    checkpoint = work / f"{name}.pt"
    if checkpoint.exists():
        saved: dict[str, Any] = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
        step, earlier = saved["step"], saved["seconds"]
        first = step
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, from step {step}", flush=True)

    @torch.compile(dynamic=False)
    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats of rows [batch, context + 1]."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    short_until = 0.0 if grown_from else SHORT_CONTEXT_UNTIL  # a grown model knows the long context already
    context, source = 0, batches(parts, MAX_CONTEXT, 0)
    started = written = time.monotonic()
    average = 0.0
    while (progress := (earlier + time.monotonic() - started) / (60.0 * minutes)) < 1.0:
        wanted = SHORT_CONTEXT if progress < short_until else MAX_CONTEXT
        if wanted != context:
            context, source = wanted, batches(parts, wanted, SEED + step)
        loss = loss_of(next(source))
        loss.backward()  # type: ignore[no-untyped-call]
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * rate(progress)
            opt.step()
            opt.zero_grad()
        step += 1
        average += (loss.item() - average) * max(0.02, 1.0 / (step - first))
        now = time.monotonic()
        if step % 20 == 0:
            seconds = earlier + now - started
            print(f"step {step} tokens {step * BATCH_TOKENS} s {seconds:.0f} loss {average:.3f}", flush=True)
        if now - written > CHECKPOINT_SECONDS:
            written = now
            state = {
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in opts],
                "step": step,
                "seconds": earlier + now - started,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    export(model, work / "tokenizer.json", folder)
    print(f"{name}: {step} steps, {step * BATCH_TOKENS} tokens, written", flush=True)


@torch.inference_mode()
def evaluate(folder: Path) -> float:
    """Bits per UTF-8 byte of the bfloat16 checkpoint (float32 arithmetic) over the held-out files.

    Windows of MAX_CONTEXT tokens slide by half: a token is scored with at least half a window of its file before it,
    or with all of the file before it, after one END_OF_TEXT.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    nats, size = 0.0, 0
    for text in collect()["held_out"]:
        ids = torch.tensor([END_ID, *tokenizer.encode(text).ids])
        size += len(text.encode())
        scored = 1
        while scored < len(ids):
            start = max(0, scored - MAX_CONTEXT // 2)
            window = ids[start : start + MAX_CONTEXT]
            logits = model(window[None]).logits[0, scored - start - 1 : -1]
            nats += float(functional.cross_entropy(logits, window[scored - start :], reduction="sum"))
            scored = start + len(window)
    return nats / math.log(2) / size


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled models on the standard library's source.")
    parser.add_argument("--work", type=Path, default=Path("build/bundled"), help="folder of checkpoints and tokens")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the finished models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tokenizer", help="train the tokenizer and tokenize the training files")
    training = commands.add_parser("train", help="train one model")
    training.add_argument("name", choices=sorted(SHAPES))
    training.add_argument("--minutes", type=float, required=True, help="wall-clock budget")
    training.add_argument("--grow-from", choices=sorted(SHAPES), help="start from this smaller model's checkpoint")
    training.add_argument("--factor", type=float, default=1.0, help="factor on the peak learning rates")
    evaluation = commands.add_parser("evaluate", help="held-out bits per byte")
    evaluation.add_argument("names", nargs="+", choices=sorted(SHAPES))
    arguments = parser.parse_args()
    if arguments.command == "tokenizer":
        prepare(arguments.work)
    elif arguments.command == "train":
        folder = arguments.models / arguments.name
        train(arguments.name, arguments.minutes, arguments.work, folder, arguments.grow_from, arguments.factor)
    else:
        for name in arguments.names:
            print(f"{name}: {evaluate(arguments.models / name):.4f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
