"""The runtime on a fake model: forward, generation, streaming, batches, text, and clear errors for bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stemma
from stemma.backends.cpu import device
from stemma.runtime import ArtifactError, DeviceError, InputError, Model, StemmaRuntimeError, load
from stemma.runtime.session import Session
from tests import fake

PROMPTS = [[0, 7, 9], [3], list(range(20, 45)), [5, 5, 5, 5, 5, 5, 5, 5, 5], [11, 200]]
SAMPLED: dict[str, Any] = {"temperature": 30.0, "seed": 3, "ignore_eos": True, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.write(tmp_path_factory.mktemp("fake") / "fake.stemma")


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return stemma.load(path, threads=2)


@pytest.mark.quick
def test_importing_the_runtime_is_light() -> None:
    script = (
        "import sys, stemma.runtime.model\n"
        "heavy = {'torch', 'jinja2', 'rich', 'typer', 'tokenizers', 'transformers', 'stemma.ir', 'stemma.codegen'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=True)


@pytest.mark.quick
def test_the_package_says_its_version() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{stemma.__version__}"' in pyproject
    assert {"load", "compile"} <= set(dir(stemma)) and stemma.load is load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stemma.nothing  # noqa: B018


@pytest.mark.quick
@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 8), (1, 31), (3, 1), (3, 5), (2, 40), (20, 2), (1, fake.CONTEXT)])
def test_forward(model: Model, batch: int, tokens: int) -> None:
    """Longer than a call takes, and batches that do not fit into one: the caches carry over."""
    ids = np.random.default_rng(batch * 100 + tokens).integers(0, fake.VOCAB, (batch, tokens))
    got = model.forward(ids)
    assert got.dtype == np.float32 and got.shape == (batch, tokens, fake.VOCAB)
    np.testing.assert_array_equal(got, np.stack([fake.logits(row) for row in ids.tolist()]))
    np.testing.assert_array_equal(model.forward(ids=ids.astype(np.uint16)), got)
    for rows in (1, 3, 1000):
        np.testing.assert_array_equal(model.forward(ids, rows=rows), got)


@pytest.mark.quick
@pytest.mark.parametrize("ids", PROMPTS)
def test_greedy_follows_the_model(model: Model, ids: list[int]) -> None:
    expected = fake.greedy(ids, 50)
    assert model.generate_ids(ids, max_new_tokens=50) == expected
    assert model.generate_ids(np.array(ids), max_new_tokens=50) == expected
    statistics = model.last_statistics
    assert statistics.finish == ["eos" if expected[-1] == 1 else "length"]
    assert (statistics.prompt_tokens, statistics.new_tokens) == (len(ids), len(expected))
    assert statistics.decoded_tokens == len(expected) - 1 and statistics.prefill_tokens_per_second > 0
    assert 0 < statistics.decode_native_seconds < statistics.decode_seconds or len(expected) == 1


@pytest.mark.quick
@pytest.mark.parametrize("options", [{"max_new_tokens": 20}, SAMPLED, SAMPLED | {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_a_prompt_gets_the_same_answer_in_any_batch(model: Model, options: dict[str, Any], batch_size: int) -> None:
    alone = [model.generate_ids(ids, **options) for ids in PROMPTS]
    assert model.generate_ids(PROMPTS, batch_size=batch_size, **options) == alone
    assert model.generate_ids(PROMPTS[::-1], batch_size=batch_size, **options) == alone[::-1]


@pytest.mark.quick
def test_seeds_and_sequences_count_the_noise(model: Model) -> None:
    first = model.generate_ids(PROMPTS[0], **SAMPLED)
    assert model.generate_ids(PROMPTS[0], **SAMPLED) == first
    assert model.generate_ids(PROMPTS[0], **SAMPLED | {"seed": 4}) != first
    several = model.generate_ids([PROMPTS[0]] * 3, sequence=[0, 1, 2], **SAMPLED)
    assert several[0] == first and len({tuple(ids) for ids in several}) == 3
    assert model.generate_ids(PROMPTS[0], sequence=2, **SAMPLED) == several[2]
    assert len(set(model.generate_ids([3], repetition_penalty=9.0, ignore_eos=True, max_new_tokens=60))) == 60


@pytest.mark.quick
def test_text_streams_are_what_generate_returns(model: Model) -> None:
    texts = model.generate(["def quick", "naïve", ""], **SAMPLED)
    for prompt, text in zip(["def quick", "naïve", ""], texts, strict=True):
        assert "".join(model.stream(prompt, **SAMPLED)) == model.generate(prompt, **SAMPLED) == text
        ids = model.generate_ids(prompt, **SAMPLED)
        assert text == model.tokenizer.decode(ids)
    assert model.generate([]) == []


@pytest.mark.quick
def test_the_context_ends_an_answer_with_a_warning(model: Model) -> None:
    prompt = [7] * (fake.CONTEXT - 3)
    with pytest.warns(UserWarning, match="fill the model's context of 96 tokens"):
        assert len(model.generate_ids(prompt, max_new_tokens=50, ignore_eos=True)) == 3
    assert model.last_statistics.finish == ["context"]
    assert len(model.generate_ids(prompt, max_new_tokens=3, ignore_eos=True)) == 3
    assert model.last_statistics.finish == ["length"]


@pytest.mark.quick
def test_an_abandoned_stream_leaves_the_model_usable(model: Model) -> None:
    pieces = model.stream([3], **SAMPLED | {"max_new_tokens": 80})
    first, other = next(pieces), model.stream([5, 5], **SAMPLED)
    mixed = next(other)
    assert model.generate_ids(PROMPTS, max_new_tokens=20) == [fake.greedy(ids, 20) for ids in PROMPTS]
    mixed += "".join(other)  # two streams in turns do not touch each other
    assert mixed == model.generate([5, 5], **SAMPLED)
    statistics = model.last_statistics
    pieces.close()  # type: ignore[attr-defined]
    assert statistics.finish == ["length"]
    assert model.generate([3], **SAMPLED | {"max_new_tokens": 80}).startswith(first)


@pytest.mark.quick
def test_threads_of_the_caller_may_share_a_model(model: Model) -> None:
    found: dict[int, list[int]] = {}

    def work(start: int) -> None:
        found[start] = model.generate_ids([start, 2], max_new_tokens=40)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: fake.greedy([n, 2], 40) for n in range(3, 9)}


@pytest.mark.quick
def test_stop_strings(model: Model) -> None:
    text = model.generate([3], **SAMPLED)
    for length in (1, 2, 5):
        stop = text[6 : 6 + length]
        cut = text[: text.find(stop)]
        assert model.generate([3], stop=stop, **SAMPLED) == cut
        assert "".join(model.stream([3], stop=["never there", stop], **SAMPLED)) == cut
        assert model.last_statistics.finish == ["stop"]
        ids = model.generate_ids([3], stop=stop, **SAMPLED)
        assert ids == model.generate_ids([3], **SAMPLED)[: len(ids)] and stop in model.tokenizer.decode(ids)


@pytest.mark.quick
def test_chat_templates(model: Model) -> None:
    messages = [{"role": "user", "content": "hi <b>"}]
    prompt = model.tokenizer.chat(messages)
    assert prompt == "<user>hi <b>\n<assistant>"
    assert model.tokenizer.chat(messages, add_generation_prompt=False) == "<user>hi <b>\n"
    assert model.has_chat_template and model.chat(messages) == model.tokenizer.encode(prompt)[1:]
    assert model.generate(model.chat(messages), **SAMPLED) == model.generate(prompt, add_special_tokens=False, **SAMPLED)
    model.tokenizer._chat = "{{ bos_token }}{{ messages | tojson }}{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="rejects these messages: roles must alternate"):
        model.tokenizer.chat(messages)
    model.tokenizer._chat = "{{ bos_token.__class__.__mro__ }}"
    with pytest.raises(InputError, match="unsafe"):
        model.tokenizer.chat(messages)
    model.tokenizer._chat = "{{ 1 // 0 }}"
    with pytest.raises(InputError, match="rejects these messages: integer division or modulo by zero"):
        model.tokenizer.chat(messages)
    model.tokenizer._chat = None
    with pytest.raises(InputError, match="has no chat template"):
        model.tokenizer.chat(messages)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature=-1 must be a number, at least 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"top_p": 0}, "top_p=0 must be a number, more than 0 and at most 1"),
    ({"top_k": 1.5}, "top_k=1.5 is not an integer"),
    ({"min_p": 2}, "min_p=2"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"seed": -1}, "seed=-1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"stop": [""]}, "non-empty string"),
    ({"sequence": [1, 2]}, "2 numbers for 1 prompts"),
    ({"heat": 1}, "no option heat. The program 'generate' has: max_new_tokens, temperature, top_k"),
    ({"temperature": 10**400}, "must be a number, at least 0"),
    ({"max_new_tokens": np.array([3])}, "is not an integer"),
    ({"stop": 5}, "stop=5 must be a non-empty string"),
    ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
    ({"presence_penalty": float("nan")}, "presence_penalty=nan must be a number"),
    ({"program": "beam"}, "fake has no program 'beam'; its programs: generate"),
]


@pytest.mark.quick
@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_bad_options(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate([3], **options)
    with pytest.raises(InputError, match=message):
        model.stream([3], **options)  # at once, not at the first piece


@pytest.mark.quick
@pytest.mark.parametrize(
    "prompt, message",
    [
        ([1] * fake.CONTEXT, "The prompt has 96 tokens; the context of fake is 96"),
        ([[3], [1] * 500], "The prompt has 500 tokens"),
        ([3, fake.VOCAB], "token id 320 is not in the vocabulary of fake, 0 to 319"),
        ([3, -1], "a token id=-1"),
        ([3, True], "a token id=True"),
        ([3, 1.5], "not float|is text or token ids"),
        (np.array([0.5, 1.0]), "must be integers"),
        (7, "A prompt is text or token ids"),
        (b"text", "not bytes. Decode it"),
        ([b"text"], "not bytes. Decode it"),
        ([["a"]], "is not an integer"),
    ],
)
def test_bad_prompts(model: Model, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(prompt)


@pytest.mark.quick
@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 2], "must be \\[batch, tokens\\]"),
        (np.zeros((1, 0), int), "with at least one of each"),
        (np.zeros((1, 2)), "must hold integers"),
        ([[1, 2], [3]], "not a rectangular array"),
        (np.zeros((1, fake.CONTEXT + 1), int), "97 tokens exceed the context"),
        ([[0, fake.VOCAB]], "token id 320"),
        ([[-1]], "token id -1"),
    ],
)
def test_bad_ids(model: Model, ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.forward(ids)
    with pytest.raises(InputError, match="takes one input"):
        model.forward()


@pytest.mark.quick
def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    with stemma.load(fake.write(tmp_path / "nan.stemma", weight=-1)) as broken:
        for _ in range(2):
            with pytest.raises(DeviceError, match="No token can be chosen at position 1: no logit is a finite number"):
                broken.generate_ids([3])


@pytest.mark.quick
def test_steps_that_may_compute_no_logits(tmp_path: Path) -> None:
    """The compiler's steps take `outputs` from 0: a part of a long prompt then computes none."""
    changed = fake.manifest()
    changed["functions"]["step"]["dims"][1]["lo"] = 0
    with stemma.load(fake.write(tmp_path / "none.stemma", functions=changed["functions"])) as loaded:
        ids = list(range(40))
        assert loaded.generate_ids(ids, max_new_tokens=9) == fake.greedy(ids, 9)


@pytest.mark.quick
def test_steps_that_this_runtime_cannot_drive(tmp_path: Path) -> None:
    changed = fake.manifest()
    changed["functions"]["step"]["inputs"][0]["name"] = "pixels"
    with pytest.raises(ArtifactError, match="not one that this version of Stemma can drive \\(pixels\\)"):
        stemma.load(fake.write(tmp_path / "other.stemma", functions=changed["functions"]))


@pytest.mark.quick
def test_empty_prompts(model: Model, tmp_path: Path) -> None:
    assert model.generate_ids("", max_new_tokens=5) == model.generate_ids([[]], max_new_tokens=5)[0] == fake.greedy([0], 5)
    with stemma.load(fake.write(tmp_path / "no-bos.stemma", bos=None)) as other:
        with pytest.raises(InputError, match="prompt is empty, and fake has no first token"):
            other.generate_ids([[]])


@pytest.mark.quick
def test_models_without_an_end_token_or_a_tokenizer(model: Model, tmp_path: Path) -> None:
    with stemma.load(fake.write(tmp_path / "bare.stemma", text=False, eos=[])) as bare:
        ids = bare.generate_ids([3], max_new_tokens=60)
        assert len(ids) == 60 and ids == model.generate_ids([3], max_new_tokens=60, ignore_eos=True)
        assert not bare.has_chat_template
        for call in (bare.generate, bare.stream, lambda p: bare.generate_ids(p, stop="x")):
            with pytest.raises(ArtifactError, match="has no tokenizer. Use token ids"):
                call("text")


@pytest.mark.quick
def test_other_models_take_named_inputs(tmp_path: Path) -> None:
    with stemma.load(fake.write(tmp_path / "other.stemma", kind="model")) as other:
        x = np.arange(6, dtype=np.float64).reshape(2, 3)
        for result in (other.forward(x, n=[4, 5]), other.forward(x=x, n=np.array([4, 5], np.int8)), other.forward(x, [4, 5])):
            assert list(result) == ["y", "total"]
            np.testing.assert_array_equal(result["y"], 2 * x)
            assert result["y"].dtype == np.float32 and result["total"].tolist() == [9]
        np.testing.assert_array_equal(other.forward(x.T[:, ::-1], [1, 2, 3])["y"], 2 * x.T[:, ::-1])  # not contiguous
        bad: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
            ((x,), {}, "lacks the input 'n'. It takes x: f32\\[batch, width\\], n: i64\\[batch\\]"),
            ((x, [1, 2]), {"m": 1}, "has no input 'm'"),
            ((x, [1, 2]), {"n": [1, 2]}, "was given twice the input 'n'"),
            ((x, [1, 2], 3), {}, "3 inputs were given, but the model takes 2"),
            ((x[0], [1, 2]), {}, "'x' has 1 axes"),
            ((x, [1, 2, 3]), {}, "size 'batch' is 2 in one input and 3 in 'n'"),
            ((x[:, :1], [1, 2]), {}, "size 'width' of 'x' is 1; the model takes 2 to 8"),
            ((x, [1.0, 2.0]), {}, "'n' must hold integers"),
            ((x.astype(int), [1, 2]), {}, "'x' must hold floats"),
            ((x, np.array([2**63, 1], np.uint64)), {}, "which i64 cannot hold"),
        ]
        for positional, named, message in bad:
            with pytest.raises(InputError, match=message):
                other.forward(*positional, **named)
        with pytest.raises(StemmaRuntimeError, match="not a causal language model"):
            other.generate("text")
        with pytest.raises(DeviceError, match="failed with status 7 for the sizes \\[13, 2\\]"):
            other.forward(np.zeros((13, 2)), np.zeros(13, int))


@pytest.mark.quick
def test_variants_and_threads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stemma.load(path, variant="portable", threads=3, huge_pages=True) as loaded:
        assert (loaded.device.variant, loaded.device.threads) == ("portable", 3)
        assert loaded.generate_ids([3], max_new_tokens=9) == fake.greedy([3], 9)
    assert stemma.load(path).device.threads == len(os.sched_getaffinity(0))
    monkeypatch.setattr("stemma.runtime.model.HUGE_FROM", 1)
    with stemma.load(path) as loaded:  # answers before, while and after the weights move
        answers = [loaded.generate_ids([3], max_new_tokens=9)]
        assert loaded.device._mover is not None
        loaded.device._mover.join()
        answers.append(loaded.generate_ids([3], max_new_tokens=9))
        assert answers == [fake.greedy([3], 9)] * 2
        assert loaded.device._weights.ctypes.data != loaded.artifact.weights.ctypes.data
    with pytest.raises(DeviceError, match="lacks the instruction set of the kernel variant 'imaginary'"):
        stemma.load(path, variant="imaginary")
    with pytest.raises(DeviceError, match="no kernel variant 'sse9'. Choose one of imaginary, portable"):
        stemma.load(path, variant="sse9")
    with pytest.raises(DeviceError, match="did not start: 65 threads are too many"):
        stemma.load(path, threads=65)
    for threads in (0, -1, 5000):
        with pytest.raises(InputError, match=f"threads={threads}"):
            stemma.load(path, threads=threads)
    monkeypatch.setenv("STEMMA_THREADS", "1")
    monkeypatch.setenv("STEMMA_CACHE", str(tmp_path / "cache"))
    assert stemma.load(path).device.threads == 1
    monkeypatch.setenv("STEMMA_THREADS", "many")
    with pytest.raises(InputError, match="STEMMA_THREADS is 'many'"):
        stemma.load(path)
    monkeypatch.setenv("STEMMA_VARIANT", "imaginary")
    with pytest.raises(DeviceError, match="lacks the instruction set"):
        stemma.load(path)


@pytest.mark.quick
@pytest.mark.parametrize(
    "defines, changes, message",
    [
        (("ABI=1",), {}, "have interface 1; this version of Stemma calls interface 2"),
        (('SUPPORTED="none"',), {}, "This machine has none of the instruction sets .* \\(imaginary, portable\\)"),
        ((), {"targets": {"cuda": {}}}, "has kernels for cuda, and this runtime runs 'cpu'"),
        ((), {"targets": {}}, "has kernels for no target"),
        ((), {"targets": {"cpu": {}}}, "names no library"),
        ((), {"targets": {"cpu": {"library": "ir.txt"}}}, "cannot be loaded on this machine"),
        ((), {"targets": {"cpu": {"library": "absent.so"}}}, "has no member 'absent.so'"),
    ],
)
def test_artifacts_for_something_else(tmp_path: Path, defines: tuple[str, ...], changes: Any, message: str) -> None:
    path = fake.write(tmp_path / "other.stemma", *defines, **changes)
    with pytest.raises(StemmaRuntimeError, match=message) as caught:
        stemma.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.quick
def test_kernels_can_be_kept_as_a_file(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("STEMMA_CACHE", str(cache))
    for _ in range(2):
        monkeypatch.setattr(device, "_loaded", {})
        with stemma.load(path) as loaded:
            assert loaded.generate_ids([3], max_new_tokens=9) == fake.greedy([3], 9)
        (kept,) = cache.iterdir()
        assert kept.read_bytes() == fake.library()
        kept.unlink()
        kept.write_bytes(b"damaged")
    monkeypatch.setenv("STEMMA_CACHE", str(path / "no folder"))
    monkeypatch.setattr(device, "_loaded", {})
    with pytest.raises(DeviceError, match="cannot be loaded on this machine"):
        stemma.load(path)


@pytest.mark.quick
def test_a_closed_model_says_so(path: Path) -> None:
    loaded = stemma.load(path)
    assert repr(loaded).startswith("<stemma.Model fake (causal_lm), portable")
    loaded.close()
    loaded.close()
    for use in (lambda: loaded.generate_ids([3]), lambda: loaded.generate("text"), loaded.check):
        with pytest.raises(StemmaRuntimeError, match="was closed. Load it again"):
            use()


@pytest.mark.quick
def test_a_model_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    path = fake.write(tmp_path / "model.stemma")
    with stemma.load(path) as loaded:
        expected = loaded.generate([3], max_new_tokens=9)
        fake.write(path, text=False, weight=77)
        loaded._tokenizer = None
        assert loaded.generate([3], max_new_tokens=9) == expected and loaded.check()
        path.unlink()
        assert loaded.generate([3], max_new_tokens=9) == expected


@pytest.mark.quick
def test_check_hashes_the_file(model: Model) -> None:
    with zipfile.ZipFile(model.path) as archive:
        assert model.check() == sum(info.file_size for info in archive.infolist())


@pytest.mark.quick
def test_sessions_run_and_profile_any_rows(model: Model) -> None:
    """What `inspect --roofline` uses."""
    session = Session(model.step, 2, 4)
    session.fill(np.array([5, 7, 6], np.int32), np.array([0, 1, 0]), np.array([0, 0, 1]))
    session.selected[:2] = 2, 1
    session.run(3, 2)
    np.testing.assert_array_equal(session.logits[:2], [fake.logits([5, 6])[-1], fake.logits([7])[-1]])
    assert session.profile(3, 2).tolist() == [10.0, 20.0]
    session.close()
