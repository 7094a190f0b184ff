"""Train Medusa and Hydra heads for the bundled target model, which stays as it is.

    python examples/train_heads.py medusa --minutes 8
    python examples/train_heads.py hydra --minutes 8
    python examples/train_heads.py evaluate

The first run writes the training texts and the target's hidden states to the work folder (1.4 GB), where later runs find
them. The finished heads are written to examples/models/heads/<kind>.safetensors in bfloat16. The target's embedding, which
both kinds read, is in examples/models/target and not stored again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from train_bundled import BATCH_TOKENS, END_ID, LIBRARY_SHARE, MAX_CONTEXT, MODELS, SEED, batches, collect, rate
from transformers import AutoModelForCausalLM, LlamaForCausalLM, StaticCache

HEADS = 4
WIDTH = 256
# Windows of MAX_CONTEXT tokens of the training files whose hidden states are kept.
REAL_WINDOWS = 2000
# Texts of the target's own: batches of GENERATED_ROWS by temperature, each a prompt from a training file and what follows.
GENERATED_BATCHES = {"greedy": (0.0, 4), "sampled": (0.7, 6)}
GENERATED_ROWS, GENERATED_LENGTH = 256, 256
PROMPT_LENGTHS = (16, 32, 64, 96)
# Share of a training batch by source.
SHARES = {"real": 0.5, "greedy": 0.2, "sampled": 0.3}
CHUNK, CHUNKS = 128, 8  # positions of a chunk, chunks of a training batch
# Embeddings are a fifteenth of hidden states in size; Hydra trains on enlarged ones, and the factor ends up in the weights.
PATH_SCALE = 8.0
PEAK_RATE = 4e-3
EVALUATION_ROWS, EVALUATION_PROMPT, EVALUATION_NEW = 128, 64, 128


class Medusa(nn.Module):
    """Independent heads: each guesses from the last hidden state alone (Cai et al. 2024, "Medusa: Simple LLM Inference
    Acceleration Framework with Multiple Decoding Heads", arXiv:2401.10774).

    logits_i = embedding @ (h + SiLU(W_i h + b_i)) for the token i + 1 places after the last one that h has seen, i = 1..HEADS.
    """

    def __init__(self, heads: int = HEADS, width: int = WIDTH) -> None:
        super().__init__()
        self.medusa = nn.ModuleList(nn.Linear(width, width) for _ in range(heads))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """States [heads, ..., width] to multiply by the embedding, of hidden [..., width]; the path is not looked at."""
        return torch.stack([hidden + functional.silu(head(hidden)) for head in self.medusa])


class Hydra(nn.Module):
    """Heads that depend on each other: each also sees the tokens before the one it guesses (Ankner et al. 2024, "Hydra:
    Sequentially-Dependent Draft Heads for Medusa Decoding", arXiv:2402.05109).

    Of x = concat(h, emb(t_1), ..., emb(t_i)), where t_1 is the token that the target chose from h and t_2.. are drafted:
    y = h + SiLU(in_i x), logits_i = embedding @ (y + SiLU(block_i y)), for the token after t_i.
    """

    def __init__(self, heads: int = HEADS, width: int = WIDTH) -> None:
        super().__init__()
        self.path_scale = 1.0
        self.hydra = nn.ModuleList(
            nn.ModuleDict({"in": nn.Linear((index + 2) * width, width), "block": nn.Linear(width, width)}) for index in range(heads)
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """As Medusa's, from hidden [..., width] and the embeddings of t_1.. as path [..., heads, width]."""
        results, path = [], path * self.path_scale
        for index, head in enumerate(self.hydra):
            assert isinstance(head, nn.ModuleDict)
            state = torch.cat([hidden, path[..., : index + 1, :].flatten(-2)], -1)
            state = hidden + functional.silu(head["in"](state))
            results.append(state + functional.silu(head["block"](state)))
        return torch.stack(results)

    @torch.no_grad()
    def fold(self) -> None:
        """Move path_scale into the weights."""
        for name, parameter in self.named_parameters():
            if name.endswith("in.weight"):
                parameter[:, parameter.shape[0] :] *= self.path_scale
        self.path_scale = 1.0


KINDS: dict[str, Callable[[], Medusa | Hydra]] = {"medusa": Medusa, "hydra": Hydra}


def load_target() -> LlamaForCausalLM:
    """The bundled target in float32, without gradients."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / "target", dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model.requires_grad_(False)


def load_heads(kind: str, folder: Path) -> Medusa | Hydra:
    """The trained heads in float32."""
    heads = KINDS[kind]()
    heads.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / f"{kind}.safetensors").items()})
    return heads.requires_grad_(False)


def tokenize(texts: list[str]) -> list[torch.Tensor]:
    """Token ids of each text, without END_ID."""
    tokenizer = Tokenizer.from_file(str(MODELS / "target" / "tokenizer.json"))
    return [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def join(documents: list[torch.Tensor]) -> torch.Tensor:
    """One sequence of all documents, END_ID around each."""
    end = torch.tensor([END_ID])
    return torch.cat([end, *(piece for document in documents for piece in (document, end))])


def training_tokens() -> dict[str, torch.Tensor]:
    """What the target was trained on by part; nothing held out."""
    texts = collect()
    return {part: join(tokenize(texts[part])) for part in ("library", "tests")}


@torch.inference_mode()
def hidden_states(target: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Last hidden states after the final norm, [rows, length, WIDTH], of token ids [rows, length]."""
    pieces = torch.split(rows, max(1, BATCH_TOKENS // rows.shape[1]))
    return torch.cat([target.model(piece, use_cache=False).last_hidden_state for piece in pieces])


@torch.inference_mode()
def generate(target: LlamaForCausalLM, prompts: torch.Tensor, length: int, temperature: float, seed: int) -> torch.Tensor:
    """Prompts [rows, tokens] continued to `length` tokens: the likeliest ones at temperature 0, else sampled."""
    generator = torch.Generator().manual_seed(seed)
    cache = StaticCache(config=target.config, max_cache_len=length)
    rows = inputs = prompts
    while rows.shape[1] < length:
        logits = target(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if temperature:
            inputs = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            inputs = logits.argmax(-1, keepdim=True)
        rows = torch.cat([rows, inputs], 1)
    return rows


def excerpts(tokens: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`count` rows of `length` tokens from random places."""
    starts = torch.randint(len(tokens) - length, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def gather(work: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By source, token "ids" [rows, length] and the target's "hidden" states; written to the work folder once."""
    path = work / "hidden.pt"
    if path.exists():
        loaded: dict[str, dict[str, torch.Tensor]] = torch.load(path, mmap=True)
        return loaded
    started = time.monotonic()
    target, parts = load_target(), training_tokens()
    source, rows = batches(parts, MAX_CONTEXT, SEED), list[torch.Tensor]()
    while sum(map(len, rows)) < REAL_WINDOWS:
        rows.append(next(source)[:, :MAX_CONTEXT])
    texts = {"real": torch.cat(rows)}
    generator = torch.Generator().manual_seed(SEED)
    for name, (temperature, count) in GENERATED_BATCHES.items():
        made = []
        for index in range(count):
            length = PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]
            library = int(LIBRARY_SHARE * GENERATED_ROWS)
            prompts = [
                excerpts(parts["library"], library, length, generator),
                excerpts(parts["tests"], GENERATED_ROWS - library, length, generator),
            ]
            made.append(generate(target, torch.cat(prompts), GENERATED_LENGTH, temperature, SEED + index))
            print(f"{name} {index + 1} of {count}: {time.monotonic() - started:.0f} s", flush=True)
        texts[name] = torch.cat(made)
    result = {name: {"ids": ids, "hidden": hidden_states(target, ids).half()} for name, ids in texts.items()}
    print(f"{ {name: ids.numel() for name, ids in texts.items()} } tokens: {time.monotonic() - started:.0f} s", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    torch.save(result, path)
    return result


def chunks(source: dict[str, torch.Tensor], generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (hidden, ids) of CHUNK + HEADS places of a row: each pass covers the rows once, in random order, newly aligned."""
    ids, hidden = source["ids"], source["hidden"]
    while True:
        shift = int(torch.randint(CHUNK, (), generator=generator))
        per_row = (ids.shape[1] - HEADS - shift) // CHUNK
        for index in torch.randperm(len(ids) * per_row, generator=generator).tolist():
            row, start = index // per_row, shift + index % per_row * CHUNK
            end = start + CHUNK + HEADS
            yield hidden[row, start:end].float(), ids[row, start:end]


def draft(heads: Medusa | Hydra, embedding: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits [heads, rows, length - HEADS, vocabulary] of every place that has HEADS more after it, true tokens as the path."""
    length = ids.shape[1] - HEADS
    embedded = functional.embedding(ids, embedding)
    path = torch.stack([embedded[:, 1 + index : 1 + index + length] for index in range(HEADS)], 2)
    return functional.linear(heads(hidden[:, :length], path), embedding)


def distillation(heads: Medusa | Hydra, embedding: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each head, in nats, against what the target itself would predict in that place."""
    length = ids.shape[1] - HEADS
    with torch.autocast("cpu", torch.bfloat16):
        logits = draft(heads, embedding, hidden, ids)
        teacher = functional.linear(hidden[:, 1:], embedding)
    teacher = teacher.float().softmax(-1)
    return torch.stack(
        [-(teacher[:, index : index + length] * logits[index].float().log_softmax(-1)).sum(-1).mean() for index in range(HEADS)]
    )


def train(kind: str, minutes: float, work: Path, folder: Path) -> None:
    """Train the heads of one kind for a budget of wall-clock minutes, the gathering of data not counted."""
    sources = gather(work)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    embedding = load_target().lm_head.weight
    heads = KINDS[kind]()
    if isinstance(heads, Hydra):
        heads.path_scale = PATH_SCALE
    optimizer = torch.optim.AdamW(heads.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    streams = {name: chunks(source, generator) for name, source in sources.items()}
    shares = torch.tensor([SHARES[name] for name in streams])
    losses_of = torch.compile(distillation, dynamic=False)
    print(f"{kind}: {sum(p.numel() for p in heads.parameters())} parameters", flush=True)
    step, average = 0, torch.zeros(HEADS)
    size = CHUNK + HEADS
    losses_of(heads, embedding, torch.zeros(CHUNKS, size, WIDTH), torch.zeros(CHUNKS, size, dtype=torch.int64))  # compiles
    started = time.monotonic()
    while (progress := (time.monotonic() - started) / (60.0 * minutes)) < 1.0:
        picks = torch.multinomial(shares, CHUNKS, replacement=True, generator=generator).tolist()
        drawn = [next(streams[list(streams)[pick]]) for pick in picks]
        losses = losses_of(heads, embedding, torch.stack([h for h, _ in drawn]), torch.stack([i for _, i in drawn]))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate(progress)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average += (losses.detach() - average) * max(0.01, 1.0 / step)
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step} s {seconds:.0f} losses {[round(loss, 3) for loss in average.tolist()]}", flush=True)
    if isinstance(heads, Hydra):
        heads.fold()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in heads.state_dict().items()}
    save_file(tensors, folder / f"{kind}.safetensors", metadata={"format": f"{kind} heads={HEADS}"})
    print(f"{kind}: {step} steps, {step * CHUNK * CHUNKS} places, written", flush=True)


def evaluation_texts(target: LlamaForCausalLM) -> dict[str, tuple[int, list[torch.Tensor]]]:
    """By name, the first place that counts and rows of token ids: held-out files, and continuations of prompts from them."""
    documents = tokenize(collect()["held_out"])
    files = [piece for document in documents for piece in torch.split(join([document])[:-1], MAX_CONTEXT)]
    prompts = excerpts(join(documents), EVALUATION_ROWS, EVALUATION_PROMPT, torch.Generator().manual_seed(SEED))
    texts = {"held-out files": (0, [piece for piece in files if len(piece) > HEADS])}
    for name, (temperature, _) in GENERATED_BATCHES.items():
        rows = generate(target, prompts, EVALUATION_PROMPT + EVALUATION_NEW, temperature, SEED - 1)
        texts[f"{name} continuations"] = EVALUATION_PROMPT - 1, list(rows)
    return texts


@torch.inference_mode()
def evaluate(folder: Path) -> None:
    """Print how often each head's first guess, or one of its first three, is the target's own greedy choice in that place.

    The path of true tokens leads there. "tokens/step" is what a step of greedy decoding with a chain of all heads yields: the
    target's token and the heads' first guesses up to the first wrong one. Only on greedy text is the path the target's own.
    """
    target = load_target()
    embedding = target.lm_head.weight
    kinds = {kind: load_heads(kind, folder) for kind in KINDS if (folder / f"{kind}.safetensors").exists()}
    for name, (first, rows) in evaluation_texts(target).items():
        hits = {kind: list[torch.Tensor]() for kind in kinds}
        for row in rows:
            hidden = hidden_states(target, row[None])
            choices = functional.linear(hidden, embedding).argmax(-1)
            length = row.shape[0] - HEADS
            wanted = torch.stack([choices[:, 1 + index : 1 + index + length] for index in range(HEADS)])
            for kind, heads in kinds.items():
                guesses = draft(heads, embedding, hidden, row[None]).topk(3, -1).indices
                hits[kind].append((guesses == wanted[..., None])[:, 0, first:])
        for kind, found in hits.items():
            all_hits = torch.cat(found, 1)  # [heads, places, 3]
            top1, top3 = all_hits[..., 0].float(), all_hits.any(-1).float()
            cells = [f"{100 * a:.1f}/{100 * b:.1f}" for a, b in zip(top1.mean(1).tolist(), top3.mean(1).tolist(), strict=True)]
            chain = 1.0 + float(top1.cumprod(0).sum(0).mean())
            print(f"{name} ({top1.shape[1]} places), {kind}: top-1/top-3 {' '.join(cells)}, tokens/step {chain:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Medusa and Hydra heads for the bundled target model.")
    parser.add_argument("--work", type=Path, default=Path("build/heads"), help="folder of texts and hidden states")
    parser.add_argument("--output", type=Path, default=MODELS / "heads", help="folder of the finished heads")
    commands = parser.add_subparsers(dest="command", required=True)
    for kind in KINDS:
        training = commands.add_parser(kind, help=f"train the {kind} heads")
        training.add_argument("--minutes", type=float, required=True, help="wall-clock budget")
    commands.add_parser("evaluate", help="accuracy on held-out text")
    arguments = parser.parse_args()
    if arguments.command == "evaluate":
        evaluate(arguments.output)
    else:
        train(arguments.command, arguments.minutes, arguments.work, arguments.output)


if __name__ == "__main__":
    main()
