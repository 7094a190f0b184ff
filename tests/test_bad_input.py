"""Every way a command can be given something it cannot use: one clear paragraph, a non-zero exit, nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stemma.ir import PassError
from stemma.runtime import DeviceError
from tests import fake
from tests.commands import as_json, listing, paragraph, refused, succeeded
from tests.conftest import Artifacts
from tests.test_artifact import BAD, flip
from tests.test_checkpoint import BREAKAGES

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(artifacts: Artifacts, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return shutil.copytree(artifacts.checkpoint("llama"), tmp_path / "llama-f32")


@pytest.fixture(scope="module")
def model(artifacts: Artifacts) -> Path:
    """A good artifact of the same checkpoint."""
    return artifacts.compiled(artifacts.checkpoint("llama"))


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where to write; an older artifact is there and must still be there at the end, alone."""
    place = tmp_path / "out"
    place.mkdir()
    (place / "model.stemma").write_text("an older artifact")
    before = listing(place)
    yield place / "model.stemma"
    assert listing(place) == before


def matches(words: str, message: str) -> None:
    assert re.search(words, message), message


# Compiling: the checkpoint


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_checkpoints(folder: Path, output: Path, name: str) -> None:
    damage, words = BREAKAGES[name]
    damage(folder)
    message = refused("compile", folder, "-o", output)
    matches(words.replace("describes' ", "describes "), message)
    assert str(folder) in message


def test_weights_that_are_not_numbers(folder: Path, output: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.where(np.arange(64) == 5, np.float32(np.nan), tensors[name])
    save_file(tensors, folder / WEIGHTS)
    matches(f"The weight '{name}' .*holds NaN or infinite values", refused("compile", folder, "-o", output, "--variants", "native"))


def test_a_tokenizer_without_an_end_token(folder: Path, output: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"eos_token_id": None}))
    said = refused("compile", folder, "-o", output, "--variants", "native")
    matches("has a tokenizer but names no end token.*Set eos_token_id", said)


def test_an_empty_prompt_without_a_first_token(folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"bos_token_id": None}))
    made = tmp_path / "model.stemma"
    succeeded("compile", folder, "-o", made, "--variants", "native")
    matches("The prompt is empty, and llama-f32 has no first token to begin with. Give a prompt", refused("run", made, "-p", ""))


# Compiling: the rest of the command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--preset", "tiny"), "no preset 'tiny'. Choose one of exact, balanced, small"),
        (("--pass", "quantise"), "no pass 'quantise'. Did you mean quantize"),
        (("--pass", "quantize{bits=4}", "--max-kl", "nan"), "max_kl=nan is no bound"),
        (("--pass", "quantize{bits=4}", "--max-perplexity", "-1"), "max_perplexity=-1.0 is no bound"),
        (("--pass", "compress{budget=1.2.3bits}"), "is none of 4.5bits, 300MB, 50tok/s, kl=0.02"),
        (("--pass", "quantize{bit=4}"), "no option 'bit'. Its options: bits=4, group=None, symmetric=True"),
        (("--pass", "quantize{bits=many}"), "'bits' of the pass 'quantize' takes a value of the type int"),
        (("--pass", "quantize{bits=4"), "does not close them"),
        (("--pass", "quantize{bits=5}"), "bits=5, .* is not available; use 8, 4, 3 or 2 bits"),
        (("--pass", "quantize{group=48}"), "no kernel for group=48; use one of 32, 64, 128"),
        (("--pass", "absent.py:Pass"), "no file absent.py"),
        (("--target", "abacus"), "target 'abacus'; targets that can: cpu"),
        (("--target", "cuda"), "target 'cuda'; targets that can: cpu"),
        (("--target", "null"), "target 'null'"),
        (("--variants", "sse9"), "no instruction-set variant 'sse9'. Known: native, x86-64-v4"),
        (("--preset", "small", "--calibration", "absent.txt"), "calibration text absent.txt cannot be read: .*No such file"),
        (("--preset", "small", "--calibration", "."), "calibration text . cannot be read: .*directory"),
        (("--preset", "small", "--calibration", "/bin/sh"), "calibration text /bin/sh cannot be read"),
        (("--preset", "small", "--calibration", "/dev/null"), "too few tokens: 0 to measure a loss on, at least two are needed"),
        (("--start-after", "nothing"), "0 passes called 'nothing'"),
        (("--start-after", "07_fuse.txt"), "name the folder of the dumps as well"),
        (("--dump", "/proc/here"), "cannot be written to /proc/here"),
    ],
)
def test_options_of_compile(artifacts: Artifacts, output: Path, arguments: tuple[str, ...], words: str) -> None:
    matches(words, refused("compile", artifacts.checkpoint("llama"), "-o", output, *arguments))


@pytest.mark.parametrize("option", [("--max-kl", 0), ("--max-perplexity", 0.5), ("--min-top1", 1.1)])
def test_budgets(artifacts: Artifacts, output: Path, option: tuple[str, float]) -> None:
    message = refused(
        "compile", artifacts.checkpoint("llama"), "-o", output, "--pass", "quantize{bits=4}", "--calibration-tokens", 20, *option
    )
    matches("After the pass 'quantize', .*(allowed 0|allowed 0.5|required 1.1).* Nothing was written", message)


def test_outputs_that_cannot_be_written(artifacts: Artifacts, tmp_path: Path) -> None:
    source = artifacts.checkpoint("llama")
    matches("the folder .*absent does not exist. Create it first", refused("compile", source, "-o", tmp_path / "absent" / "m"))
    matches("it is a folder. Give a file name", refused("compile", source, "-o", tmp_path))
    matches("Choose an output that you may write to", refused("compile", source, "-o", Path(__file__) / "m"))
    matches("Choose an output that you may write to|does not exist", refused("compile", source, "-o", "/proc/model.stemma"))
    assert listing(tmp_path) == {}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "stemma", *map(str, arguments)]


@pytest.mark.parametrize(
    "command_line", [("compile",), ("compile", "x"), ("run", "x"), ("frobnicate",), ("run", "x", "-p", "y", "--seed", "-1")]
)
def test_wrong_command_lines_show_the_usage(command_line: tuple[str, ...]) -> None:
    from tests.commands import run

    result = run(*command_line)
    assert result.exit_code == 2 and "Usage: " in result.stderr and "Traceback" not in result.output


def test_no_compiler(artifacts: Artifacts, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ziglang" else found(name, *a))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    arguments = ("compile", artifacts.checkpoint("llama"), "-o", output)
    matches("No C\\+\\+ compiler was found.*apt install g\\+\\+.*pip install ziglang", refused(*arguments))
    monkeypatch.setenv("CXX", "/nonexistent")
    matches("named by CXX='/nonexistent' does not work.*Correct or unset CXX", refused(*arguments))


def test_a_full_disk(artifacts: Artifacts, model: Path, output: Path) -> None:
    """A limit on the size of files, a little below the artifact's own, stands in for the end of the disk."""
    limit = model.stat().st_size - 50_000
    done = subprocess.run(
        command("compile", artifacts.checkpoint("llama"), "-o", output, "--variants", "native"),
        cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    matches("There is no room to write .*Nothing was left behind", paragraph(done.stderr))


@pytest.mark.parametrize("stage", ["tracing the model", "compiling kernels"])
def test_an_interrupt(artifacts: Artifacts, output: Path, tmp_path: Path, stage: str) -> None:
    """Ctrl-C, which a terminal sends to the compiler's processes too."""
    cache = tmp_path / "cache"
    arguments = command("compile", artifacts.checkpoint("llama"), "-o", output)
    process = subprocess.Popen(
        arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"STEMMA_CACHE": str(cache)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a suite run in the background ignores SIGINT
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(stage):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    matches("Interrupted. Nothing was left half-written", paragraph(errors))
    assert [p.name for p in cache.glob("*") if p.suffix not in (".o", ".so")] == []


def test_options_are_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    """What fits no model is said at once, not after minutes of tracing."""
    for option, words in (
        ("quantize{bits=5}", "bits=5"),
        ("gqsa{group=7}", "groups of 16"),
        ("compress{budget=5}", "none of 4.5bits"),
    ):
        matches(words, refused("compile", "absent", "-o", tmp_path / "m.stemma", "--pass", option))


@pytest.mark.parametrize("error", [KeyboardInterrupt, DeviceError])
def test_an_artifact_appears_when_it_is_measured(
    artifacts: Artifacts, output: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Programs that are lossy are measured on the artifact, which has its name only afterwards."""
    seen = []

    def fails(path: Path, documents: object) -> None:
        seen.append(path.name)
        raise error("Stop.")

    monkeypatch.setattr("stemma.program_loss.measure_programs", fails)
    lossy = "speculate{draft=recycling,verify=typical,shape=fixed}"
    arguments = ("compile", artifacts.checkpoint("llama"), "-o", output, "--variants", "native", "--pass", lossy)
    matches("Stop|Interrupted", refused(*arguments, code=130 if error is KeyboardInterrupt else 1))
    assert len(seen) == 1 and seen[0] != output.name


@pytest.mark.parametrize("error", [KeyboardInterrupt, PassError])
def test_a_calibration_that_finished_nothing_leaves_nothing(
    artifacts: Artifacts, output: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stops(*_: object, **__: object) -> None:
        assert (output.parent / f".{output.name}.calibration").is_dir()
        raise error("Stop.")

    monkeypatch.setattr("stemma.passes.calibrate.walk", stops)
    arguments = ("compile", artifacts.checkpoint("llama"), "-o", output, "--pass", "gptq", "--calibration-tokens", 200)
    message = refused(*arguments, code=130 if error is KeyboardInterrupt else 1)
    assert "is kept in" not in message


# Artifacts: every command that takes one


def damaged(source: Path, target: Path, damage: Callable[[Path], object]) -> Path:
    shutil.copyfile(source, target)
    damage(target)
    return target


@pytest.mark.parametrize("command_name", ["run", "inspect", "bench", "verify"])
@pytest.mark.parametrize(
    "name", ["absent", "empty", "text", "another zip", "cut in half", "damaged kernels", "newer", "older", "newer kernels"]
)
def test_artifacts_that_cannot_be_used(tmp_path: Path, name: str, command_name: str) -> None:
    path = damaged(fake.write(tmp_path / "fake.stemma"), tmp_path / "bad.stemma", BAD[name].damage)
    before = listing(tmp_path)
    message = refused(command_name, path, *(("-p", "x") if command_name == "run" else ()))
    matches(BAD[name].message, message)
    assert str(path) in message and listing(tmp_path) == before


def test_verify_finds_damaged_weights(model: Path, tmp_path: Path) -> None:
    path = damaged(model, tmp_path / "bad.stemma", flip("weights.bin"))
    from tests.commands import run

    result = run("verify", path, "--json")
    claims = json.loads(result.stdout)["claims"]
    assert result.exit_code == 1 and not claims[0]["held"] and "recorded hash" in claims[0]["detail"]


def test_a_zip_of_another_compression_is_refused(model: Path, tmp_path: Path) -> None:
    """Somebody repacked the file with a tool of their own."""
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(tmp_path / "m.stemma", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    matches("corrupt", refused("run", tmp_path / "m.stemma", "-p", "x"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("-p", "word " * 100), "The prompt has \\d+ tokens; the context of llama-f32 is 128.* Shorten the prompt"),
        (("-p", "x", "--top-p", 0), "top_p=0.0 must be a number, more than 0"),
        (("-p", "x", "--stop", ""), "non-empty string"),
        (("-p", "x", "--variant", "sse9"), "has no kernel variant 'sse9'"),
        (("-p", "x", "--threads", 5000), "threads=5000"),
        (("-p", "x", "--option", "prompt=y"), "'generate' has no option 'prompt'; it has: max_new_tokens"),
        (("-p", "x", "--option", "stop=y"), "no option 'stop'"),
        (("-p", "x", "--option", "add_special_tokens=no"), "no option 'add_special_tokens'"),
        (("-p", "x", "--option", "presence_penalt=1"), "Did you mean presence_penalty"),
        (("-p", "x", "--option", "a=1", "--program", "absent"), "has no program 'absent'"),
        (("-p", "x", "--chat"), "has no chat template"),
        (("-p", "caf\udce9"), "not valid Unicode text"),
    ],
)
def test_options_of_run(model: Path, arguments: tuple[Any, ...], words: str) -> None:
    matches(words, refused("run", model, *arguments))


def test_an_instruction_set_that_the_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake.write(tmp_path / "fake.stemma")
    monkeypatch.setenv("STEMMA_VARIANT", "imaginary")
    matches("This machine lacks the instruction set of the kernel variant 'imaginary'", refused("run", path, "-p", "x"))
    monkeypatch.delenv("STEMMA_VARIANT")
    none = fake.write(tmp_path / "none.stemma", 'SUPPORTED="none"')
    matches("This machine has none of the instruction sets", refused("bench", none))


def test_models_that_generate_nothing(artifacts: Artifacts) -> None:
    other = artifacts.compiled(artifacts.checkpoint("bert"))
    matches("not a causal language model", refused("run", other, "-p", "x"))
    matches("not a causal language model", refused("bench", other))


def test_warnings_are_one_line(model: Path) -> None:
    """Without the place in Python that raised them."""
    from tests.commands import run

    result = run("run", model, "-p", "x", "--max-new-tokens", 10_000, "--option", "ignore_eos=true")
    assert result.exit_code == 0
    matches("^warning: The answer to 1 of 1 prompts was cut: .*128 tokens\\.\n$", result.stderr)


def test_bench_measures_no_more_than_fits(model: Path) -> None:
    found = as_json("bench", model, "--rounds", 1, "--new-tokens", 10_000, "--prompt-tokens", 10_000, "--threads", 1)
    assert (found["prompt_tokens"], found["new_tokens"]) == (1, 127)
    matches("has no program 'absent'; its programs: generate", refused("bench", model, "--program", "absent"))


def test_inspect_shows_one_thing(model: Path) -> None:
    matches("one thing at a time, not --ir and --plan", refused("inspect", model, "--ir", "--plan"))


def test_errors_as_json(tmp_path: Path) -> None:
    from tests.commands import run

    result = run("run", tmp_path / "absent", "-p", "x", "--json")
    assert result.exit_code == 1 and "There is no file" in json.loads(result.stdout)["error"] and result.stderr == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("raise_norms",), "There is no rule or pass 'raise_norms'"),
        (("quantize",), "not made of rules"),
        (("a.py:B",), "no file a.py"),
    ],
)
def test_why(artifacts: Artifacts, arguments: tuple[str, ...], words: str) -> None:
    matches(words, refused("why", *arguments, artifacts.checkpoint("llama")))
    matches("does not exist", refused("why", "raise_norm", "/absent"))
