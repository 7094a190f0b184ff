"""Artifacts with programs, several models, draft heads and speculation: compiled, run, and told about."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import stemma
from stemma import claims
from stemma.compiler import compile
from stemma.ir import Array, Module, StemmaError
from stemma.passes.base import Label, ModelInfo, Needs, Pass, PassContext, Stage
from stemma.passes.registry import make_pass
from stemma.sources import needs_of
from tests.commands import as_json, listing, refused, succeeded
from tests.conftest import Artifacts
from tests.models import END, VOCABULARY
from tests.test_models import reference, token_ids

PROMPTS = [token_ids(1, n)[0].tolist() for n in (1, 4, 9)]
OWN = '''
from typing import Annotated

from stemma import program as p


@p.program
def small(draft: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 8):
    """What the model beside the main one would write. A second sentence."""
    text = draft.start(prompt[:-1])

    def body(token):
        token = text.step(token).argmax()
        p.emit(token)
        return p.emitted() < max_new_tokens, token

    p.loop(body, prompt[-1:])


@p.program
def first_layer(early: p.Model, prompt: p.Tokens):
    text = early.start(prompt[:-1])
    return {"logits": text.step(prompt[-1:])}


@p.program
def looks_inside(model: p.Model, prompt: p.Tokens):
    text = model.start(prompt[:-1])
    logits = text.step(prompt[-1:])
    return {"logits": logits, "hidden": text.hidden}


@p.program
def guesses(model: p.Model, prompt: p.Tokens):
    text = model.start(prompt[:-1])
    token = text.step(prompt[-1:]).argmax()
    likely = p.call("medusa", text.hidden, type=("f32", (1, 2, 288)))
    after = p.call("hydra_0", text.hidden, token[None], type=("f32", (1, 288)))
    p.emit(token)
    return {"medusa": likely, "hydra": after, "hidden": text.hidden}


@p.program
def silent(model: p.Model, prompt: p.Tokens):
    model.start(prompt)


def not_a_program():
    pass
'''


@pytest.fixture(scope="module")
def source(artifacts: Artifacts) -> Path:
    return artifacts.checkpoint("llama")


@pytest.fixture(scope="module")
def draft(artifacts: Artifacts) -> Path:
    return artifacts.checkpoint("llama", seed=7, num_hidden_layers=1)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def alone(artifacts: Artifacts, source: Path) -> Iterator[stemma.Model]:
    with stemma.load(artifacts.compiled(source)) as model:
        yield model


@pytest.fixture(scope="module")
def pair(artifacts: Artifacts, source: Path, draft: Path, own: Path) -> Path:
    """Two models, a speculated program and its plain form, programs of the user's own."""
    return artifacts.compiled(
        source, models=(f"draft={draft}",), programs=("generate", f"{own}:small", f"{own}:looks_inside", f"{own}:first_layer"),
        passes=("speculate{draft=recycling,budget=8,shape=fixed}", "early_exit{layers=1}"),
    )  # fmt: skip


# ---- one artifact -----------------------------------------------------------------------------------------------------


def test_the_default_program(alone: stemma.Model) -> None:
    assert list(alone.programs) == ["generate"] and alone.manifest.raw["programs"]["generate"]["label"] == "identical"
    (model,) = alone.manifest.raw["models"]
    assert model == {"name": "model", "vocab": VOCABULARY, "width": 0, "eos": [END], "context": 128}


def test_two_models_in_one_artifact(artifacts: Artifacts, pair: Path, draft: Path, alone: stemma.Model) -> None:
    """Each computes what it computes alone: the main one to the bit, the other one through a program."""
    with stemma.load(pair) as both, stemma.load(artifacts.compiled(draft)) as small:
        assert set(both.manifest.functions) == {"step", "early_step", "draft_step"}
        names = {t["name"] for t in both.manifest.raw["weights"]["tensors"]}
        assert any(n.startswith("draft.model.layers.0.") for n in names) and not any(n.startswith("draft.draft.") for n in names)
        assert [m["name"] for m in both.manifest.raw["models"]] == ["model", "draft", "early"]
        entry = both.manifest.raw["further_models"]["draft"]
        assert entry["tokenizer"] == "the same" and entry["preset"] == "exact" and entry["loss"] is None
        assert [p["name"] for p in entry["passes"]][-1] == "fuse"
        for shape in ((1, 1), (2, 9), (1, 40)):
            ids = token_ids(*shape)
            np.testing.assert_array_equal(both.forward(ids), alone.forward(ids))
        for prompt in PROMPTS:
            wanted = small.generate_ids(prompt, max_new_tokens=8, ignore_eos=True)
            assert both.generate_ids(prompt, program="small", max_new_tokens=8) == wanted


def test_hidden_states_of_a_compiled_model(pair: Path, source: Path, alone: stemma.Model) -> None:
    """What a program reads is the input of the output head; asking for it changes no bit of the logits."""
    head = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    with stemma.load(pair) as both:
        assert both.manifest.raw["models"][0]["width"] == 64
        for prompt in PROMPTS:
            found = both.run("looks_inside", prompt).results
            np.testing.assert_array_equal(found["logits"][0], alone.forward([prompt])[0, -1])
            np.testing.assert_allclose(found["hidden"] @ head.T, found["logits"], rtol=1e-4, atol=1e-5)


def test_a_model_that_stops_early(pair: Path, source: Path, draft: Path) -> None:
    """One layer of two, as transformers computes it when the second is taken out; its weights are packed once."""
    wanted = reference(source)
    wanted.model.layers = wanted.model.layers[:1]
    with stemma.load(pair) as both:
        tensors = [t["name"] for t in both.manifest.raw["weights"]["tensors"]]
        assert len(tensors) == len(set(tensors)) and not any(t.startswith("early.") for t in tensors)
        for prompt in PROMPTS:
            with torch.no_grad():
                logits = wanted(torch.tensor([prompt])).logits[0, -1].numpy()
            np.testing.assert_allclose(both.run("first_layer", prompt).results["logits"][0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_speculation_changes_no_token(pair: Path, alone: stemma.Model, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": temperature, "seed": 3, "ignore_eos": True}
    with stemma.load(pair) as both:
        assert both.programs["generate"].plain == "generate_plain"
        wanted = alone.generate_ids(PROMPTS, **options)
        assert both.generate_ids(PROMPTS, program="generate_plain", **options) == wanted
        assert both.last_statistics.trees == 0
        assert both.generate_ids(PROMPTS, **options) == wanted == [both.generate_ids(p, **options) for p in PROMPTS]
        assert both.last_statistics.trees > 0


def test_draft_heads_of_a_compiled_model(artifacts: Artifacts, source: Path, own: Path, tmp_path: Path) -> None:
    """Heads from a folder, called by a program; default places are beside the checkpoint and in a folder `heads` next to it."""
    rng = np.random.default_rng(3)
    square: tuple[int, ...] = (64, 64)
    shapes = {f"medusa.{i}.{part}": shape for i in range(2) for part, shape in (("weight", square), ("bias", (64,)))}
    shapes |= {
        "hydra.0.in.weight": (64, 128),
        "hydra.0.in.bias": (64,),
        "hydra.0.block.weight": square,
        "hydra.0.block.bias": (64,),
    }
    w = {n: np.asarray(rng.standard_normal(shape) * 0.1, np.float32) for n, shape in shapes.items()}
    folder, beside = shutil.copytree(source, tmp_path / "llama-f32"), tmp_path / "heads"
    beside.mkdir()
    save_file({n: v for n, v in w.items() if n.startswith("medusa")}, beside / "medusa.safetensors")
    save_file({n: v for n, v in w.items() if n.startswith("hydra")}, folder / "hydra.safetensors")
    path = tmp_path / "m.stemma"
    compile(folder, path, passes=["heads{kind=medusa}", "heads{kind=hydra}"], programs=[f"{own}:guesses"], variants=["native"])
    head = load_file(source / "model.safetensors")["model.embed_tokens.weight"]

    def silu(x: Array) -> Array:
        return np.asarray(x / (1 + np.exp(-x)))

    with stemma.load(path) as model:
        run = model.run("guesses", PROMPTS[2])
        found = run.results
        h = found["hidden"][0]
        for i in range(2):
            wanted = head @ (h + silu(w[f"medusa.{i}.weight"] @ h + w[f"medusa.{i}.bias"]))
            np.testing.assert_allclose(found["medusa"][0, i], wanted, rtol=1e-4, atol=1e-4)
        token = int(model.forward([PROMPTS[2]])[0, -1].argmax())
        y = h + silu(w["hydra.0.in.weight"] @ np.concatenate([h, head[token]]) + w["hydra.0.in.bias"])
        wanted = head @ (y + silu(w["hydra.0.block.weight"] @ y + w["hydra.0.block.bias"]))
        np.testing.assert_allclose(found["hydra"][0], wanted, rtol=1e-4, atol=1e-4)


def test_mixed_tokens_of_a_compiled_model(artifacts: Artifacts, source: Path, alone: stemma.Model) -> None:
    """A program of the library that mixes tokens gets a step for it; rows of one token keep their bits."""
    path = artifacts.compiled(source, programs=("superposed{drafts=2,tokens=4}", "generate"))
    with stemma.load(path) as model:
        assert model.manifest.functions["step"].inputs[0].text == ("rows", 2)
        ids = token_ids(2, 9)
        np.testing.assert_array_equal(model.forward(ids), alone.forward(ids))
        assert model.generate_ids(PROMPTS, max_new_tokens=12) == alone.generate_ids(PROMPTS, max_new_tokens=12)
        run = model.run(
            "superposed", PROMPTS[1], host={"ngrams": lambda texts, found: np.zeros((len(texts), *found.shape), np.float32)}
        )
        assert run.results["drafts"].shape == (2, 4)


# ---- vocabularies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorder(Pass):
    """Keeps what it is given."""

    models: tuple[str, ...] = ("draft",)
    name: ClassVar[str] = "recorder"
    label: ClassVar[Label] = "lossy"
    stage: ClassVar[Stage] = "program"
    seen: ClassVar[dict[str, ModelInfo]] = {}

    def needs(self) -> Needs:
        return Needs(models=self.models)

    def run(self, module: Module, context: PassContext) -> Module:
        Recorder.seen.update(context.models)
        return module


def with_tokenizer(folder: Path, place: Path, rename: dict[str, str]) -> Path:
    """A copy of a checkpoint whose tokenizer has other strings."""
    copy = shutil.copytree(folder, place)
    data = json.loads((copy / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {rename.get(token, token): i for token, i in vocab.items()}
    data["model"]["merges"] = []
    for added in data["added_tokens"]:
        added["content"] = rename.get(added["content"], added["content"])
    (copy / "tokenizer.json").write_text(json.dumps(data))
    return copy


def test_another_tokenizer(source: Path, draft: Path, tmp_path: Path) -> None:
    """Tables by equal bytes; end tokens are the same whatever they are called; it is noted."""
    other = with_tokenizer(draft, tmp_path / "other", {"a": "b", "b": "a", "c": "ĠĠĠ", "<|end|>": "</s>"})
    report = compile(source, tmp_path / "m.stemma", models={"draft": other}, passes=[Recorder()], variants=["native"])
    assert any("another tokenizer: 275 of the model's 288" in note for note in report.notes)
    to_target, from_target = Recorder.seen["draft"].to_target, Recorder.seen["draft"].from_target
    assert to_target is not None and from_target is not None and Recorder.seen["model"].to_target is None
    vocab = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    a, b, c = (vocab[x] for x in "abc")
    wanted = np.arange(VOCABULARY)
    wanted[[a, b, c]] = b, a, -1
    wanted[len(vocab) :] = -1  # the models have room for more than the tokenizers have
    np.testing.assert_array_equal(from_target, wanted)
    np.testing.assert_array_equal(to_target, wanted)
    assert as_json("inspect", tmp_path / "m.stemma")["further_models"]["draft"]["common_tokens"] == 275


def test_the_same_model_with_other_numbers_for_its_tokens(source: Path, tmp_path: Path) -> None:
    """A draft model that is the target with its vocabulary shuffled guesses everything: tokens are translated both ways."""
    copy = shutil.copytree(source, tmp_path / "shuffled")
    data = json.loads((copy / "tokenizer.json").read_text())
    places = np.arange(VOCABULARY)
    places[:256] = np.random.default_rng(0).permutation(256)  # the bytes; both end tokens and merges stay
    data["model"]["vocab"] = {token: int(places[i]) for token, i in data["model"]["vocab"].items()}
    (copy / "tokenizer.json").write_text(json.dumps(data))
    tensors = load_file(copy / "model.safetensors")
    rows = np.empty_like(tensors["model.embed_tokens.weight"])
    rows[places] = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"model.embed_tokens.weight": rows}, copy / "model.safetensors", metadata={"format": "pt"})
    path, options = tmp_path / "m.stemma", {"max_new_tokens": 30, "ignore_eos": True}
    step = "speculate{draft=draft_model{shape=chain,length=4},budget=5,shape=fixed}"
    compile(source, path, models={"draft": copy}, passes=[step], variants=["native"])
    with stemma.load(path) as model:
        wanted = model.generate_ids(PROMPTS[2], program="generate_plain", **options)
        assert model.generate_ids(PROMPTS[2], **options) == wanted
        assert model.last_statistics.followed_per_tree > 4


def test_a_draft_that_cannot_serve(source: Path, draft: Path, tmp_path: Path) -> None:
    """No token in common: refused before any tracing, when it is to draft."""
    names = json.loads((draft / "tokenizer.json").read_text())["model"]["vocab"]
    other = with_tokenizer(draft, tmp_path / "other", {n: f"qqq{n}" for n in names if not n.startswith("<|")})
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    with pytest.raises(StemmaError, match="cannot draft for .*no token in common"):
        compile(source, tmp_path / "m.stemma", models={"draft": other}, passes=[Recorder()], progress=progress)
    assert stages == ["reading the checkpoint"] and not (tmp_path / "m.stemma").exists()
    (other / "tokenizer.json").unlink()
    report = compile(source, tmp_path / "m.stemma", models={"draft": other}, variants=["native"])
    assert any("A tokenizer is missing" in note for note in report.notes)


def test_a_shorter_context_is_noted(artifacts: Artifacts, source: Path, tmp_path: Path) -> None:
    short = artifacts.checkpoint("llama", max_position_embeddings=64, num_hidden_layers=1)
    report = compile(source, tmp_path / "m.stemma", models={"draft": short}, variants=["native"])
    assert "The model 'draft' reads at most 64 tokens, the model itself 128." in report.notes
    assert [m["context"] for m in as_json("inspect", tmp_path / "m.stemma")["models"]] == [128, 64]


def test_presets_of_further_models(source: Path, draft: Path, tmp_path: Path) -> None:
    """The same preset and passes, or a preset of its own and nothing else."""
    settings: dict[str, Any] = {"preset": "balanced", "calibration_tokens": 16, "variants": ["native"]}
    compile(source, tmp_path / "a.stemma", models=[f"draft={draft}"], **settings)
    compile(source, tmp_path / "b.stemma", models=[f"draft={draft},preset=exact"], **settings)
    found = []
    for name in "ab":
        manifest = as_json("inspect", tmp_path / f"{name}.stemma")
        tensors = manifest["weights"]["tensors"]
        entry = manifest["further_models"]["draft"]
        assert entry["source"]["architecture"] == "LlamaForCausalLM"
        matrices = [t["name"] for t in tensors if t["name"].startswith("draft.") and len(t["shape"]) == 2]
        found.append((entry["preset"], entry["loss"] is None, any("proj" in n for n in matrices)))
    assert found == [("balanced", False, False), ("exact", True, True)]


# ---- the command line -------------------------------------------------------------------------------------------------


def test_inspect(pair: Path) -> None:
    text = succeeded("inspect", pair)
    assert "What the model beside the main one would write." in text and "A second sentence" not in text
    assert "generate without speculation" in text and "recycling" in text and "prompt, max_new_tokens=8" in text
    programs = as_json("inspect", pair)["programs"]
    assert programs["small"]["models"] == ["draft"] and programs["generate_plain"]["label"] == "identical"
    speculation = programs["generate"]["speculation"]
    assert speculation["nodes"] == 8 and speculation["bytes"]["logits"] == 8 * 4 * (VOCABULARY + 64)
    assert any(r.startswith("small:") or r.startswith("looks_inside:") for r in as_json("inspect", pair)["not_speculated"])


def test_run(pair: Path, alone: stemma.Model) -> None:
    arguments = ("-p", "def f", "--max-new-tokens", 30, "--temperature", 0.8)
    said, plain = as_json("run", pair, *arguments), as_json("run", pair, *arguments, "--no-speculation")
    assert said["text"] == plain["text"] == alone.generate("def f", max_new_tokens=30, temperature=0.8)
    assert plain["speculation"] is None and plain["program"] == "generate_plain"
    assert said["speculation"]["accepted_length"] >= 1 and 1 <= said["speculation"]["nodes_per_tree"] <= 8
    assert "[speculation: " in succeeded("run", pair, *arguments)
    given = as_json("run", pair, "-p", "def f", "--program", "small", "--option", "max_new_tokens=5")
    assert given["new_tokens"] == 5
    free = ("--option", "ignore_eos=true", "--option", "presence_penalty=0.5", "--max-new-tokens", 9)
    wanted = alone.generate("def f", max_new_tokens=9, ignore_eos=True, presence_penalty=0.5)
    assert as_json("run", pair, "-p", "def f", *free)["text"] == wanted


def test_bench(pair: Path) -> None:
    options = ("--prompt-tokens", 20, "--new-tokens", 8, "--rounds", 1, "--threads", 1)
    found = as_json("bench", pair, *options)["speculation"]
    assert found["accepted_length"] >= 1 and found["plain_tokens_per_second"] > 0 and found["speculated_tokens_per_second"] > 0
    assert "Speculation: " in succeeded("bench", pair, *options)
    assert "has no program 'absent'" in refused("bench", pair, *options, "--program", "absent")


def test_verify(pair: Path) -> None:
    found = {c["claim"]: c for c in as_json("verify", pair, "--threads", 2)["claims"]}
    speculated = found["generate decodes the same with and without speculation"]
    assert speculated["held"] and speculated["detail"].startswith("0 of 40 answers differ")
    assert all(c["held"] for c in found.values()) and "small decodes the same in any batch" in found


def test_verify_thoroughly(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--thorough decodes THOROUGH: 1,000 answers of 128 tokens at each temperature; fewer here."""
    assert (claims.THOROUGH.prompts, claims.THOROUGH.tokens) == (1000, 128)
    monkeypatch.setattr(claims, "THOROUGH", claims.Trial(5, (1,), 6))
    found = {c["claim"]: c for c in as_json("verify", pair, "--threads", 2, "--thorough")["claims"]}
    assert found["generate decodes the same with and without speculation"]["detail"].startswith("0 of 30 answers differ")


def test_verify_finds_a_program_that_decodes_otherwise(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_ids = stemma.Model.generate_ids

    def other(self: stemma.Model, prompt: Any, **options: Any) -> Any:
        found = generate_ids(self, prompt, **options)
        return [[*ids, 0] for ids in found] if options.get("program") == "generate_plain" else found

    monkeypatch.setattr(stemma.Model, "generate_ids", other)
    failed = [c.claim for c in claims.verify_artifact(pair) if not c.held]
    assert failed == ["generate decodes the same with and without speculation"]


def test_programs_are_listed() -> None:
    found = {p["name"]: p for p in as_json("programs")}
    assert found["generate"]["options"]["temperature"] == 0.0 and found["leader_follows"]["models"] == ["model", "draft"]
    assert all(p["doc"].endswith(".") for p in found.values())
    assert "generate" in succeeded("programs")


def test_why_speculate(source: Path, own: Path) -> None:
    found = {f["program"]: f for f in as_json("why", "speculate", source)}
    assert found["generate"]["applies"] and not found["beam_search"]["applies"] and "forks" in found["beam_search"]["text"]
    (mine,) = as_json("why", "speculate{draft=draft_model}", source, "--program", f"{own}:looks_inside")
    assert not mine["applies"] and mine["text"].startswith("looks_inside: ")


def test_dumps(source: Path, draft: Path, tmp_path: Path) -> None:
    """Further models and the programs have folders of their own; a program can be compiled again from no dump but reads back."""
    compile(
        source, tmp_path / "m.stemma", models={"draft": draft}, passes=["speculate{shape=fixed}"], variants=["native"],
        dump=tmp_path / "dump",
    )  # fmt: skip
    from stemma.passes import read_dump

    assert {p.name for p in (tmp_path / "dump" / "programs").iterdir()} == {"00_frontend.txt", "01_speculate.txt"}
    module = read_dump(tmp_path / "dump" / "programs" / "01_speculate.txt")
    assert module.properties["programs"] == ("generate", "generate_plain")
    assert (tmp_path / "dump" / "draft" / "00_frontend.txt").exists() and (tmp_path / "dump" / "00_frontend.txt").exists()


# ---- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--program", "generat"), "There is no program 'generat'. Did you mean generate?"),
        (("--program", "generate{temperatur=1}"), "takes no option 'temperatur'. Its options: max_new_tokens"),
        (("--program", "generate{seed}"), "options written option=value, not 'seed'"),
        (("--program", "generate{seed=1"), "does not close them with }"),
        (("--program", "absent.py:f"), "There is no file absent.py to take the program 'f' from"),
        (("--program", "OWN:absent"), "has no program 'absent'; its programs are: small, first_layer"),
        (("--program", "OWN:not_a_program"), "A program is a function with the decorator @program"),
        (("--program", "OWN:silent"), "own.py:.* the program never emits and returns nothing"),
        (("--program", "OWN:small"), "The program 'small' needs a model called 'draft'; given: model. Add --model draft"),
        (("--program", "generate", "--program", "generate{seed=1}"), "Two programs are called 'generate'"),
        (("--model", "draft"), "written name=folder or name=folder,preset=exact, not 'draft'"),
        (("--model", "model=DRAFT"), "cannot be called 'model'. Choose another word"),
        (("--model", "The Draft=DRAFT"), "cannot be called 'The Draft'"),
        (("--model", "draft=DRAFT", "--model", "draft=DRAFT"), "Two models are called 'draft'"),
        (("--model", "draft=absent"), "absent does not exist"),
        (("--model", "draft=DRAFT,preset=tiny"), "no preset 'tiny'"),
        (("--pass", "speculate{draft=draft_model}"), "'speculate' needs a model called 'draft'; none was given. Add --model"),
        (("--pass", "speculate{draft=medusa}"), "There are no medusa heads: .* do not exist. Name their folder"),
        (("--pass", "speculate{draft=nothing}"), "no drafter 'nothing'"),
        (("--pass", "early_exit{layers=2}"), "layers=2 is not between 1 and 1"),
        (("--pass", "early_exit{model=model}"), "A further model cannot be called 'model'"),
        (("--pass", "early_exit{model=draft}", "--model", "draft=DRAFT"), "Two models are called 'draft'"),
        (("--model", "draft=BERT"), "is a BertModel, no causal language model"),
    ],
)
def test_options_of_compile(
    artifacts: Artifacts, source: Path, draft: Path, own: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    import re

    places = {"OWN": str(own), "DRAFT": str(draft), "BERT": str(artifacts.checkpoint("bert"))}
    given = [a for a in arguments]
    for key, value in places.items():
        given = [a.replace(key, value) for a in given]
    message = refused("compile", source, "-o", tmp_path / "m.stemma", *given)
    assert re.search(words, message), message
    assert listing(tmp_path) == {}


def test_models_without_programs(artifacts: Artifacts, tmp_path: Path) -> None:
    message = refused("compile", artifacts.checkpoint("bert"), "-o", tmp_path / "m.stemma", "--program", "generate")
    assert "only causal language models have programs" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--program", "absent"), "has no program 'absent'; its programs: "),
        (("--option", "temperature"), "An option is written name=value, not 'temperature'"),
        (("--option", "temperature=warm"), "'temperature' of the program 'generate' is a number, not 'warm'"),
        (("--option", "ignore_eos=1"), "is true or false, not '1'"),
        (("--option", "top_k=1.5"), "is an integer, not '1.5'"),
        (("--option", "colour=1"), "The program 'generate' has no option 'colour'; it has: max_new_tokens"),
        (("--program", "small", "--temperature", 1), "There is no option temperature. The program 'small' has: max_new_tokens"),
    ],
)
def test_options_of_run(pair: Path, arguments: tuple[Any, ...], words: str) -> None:
    assert words in refused("run", pair, "-p", "x", *arguments)


@pytest.mark.quick
@pytest.mark.parametrize(
    "drafter, made", [("sparse", "contextual_sparsity{model=sparse}"), ("early_exit", "early_exit{model=early}")]
)
def test_a_model_that_a_drafter_makes_may_be_asked_for_as_well(drafter: str, made: str) -> None:
    speculate, own = make_pass(f"speculate{{draft={drafter}}}"), make_pass(made)
    assert needs_of([speculate], []).made == (own,)
    assert needs_of([speculate, own], []).made == ()
    other = make_pass(made.replace("{", "{keep=0.5," if drafter == "sparse" else "{layers=2,"))
    with pytest.raises(StemmaError, match=f"Two models are called '{own.makes()}'"):
        needs_of([speculate, other], [])
