"""Every command of the command line, as a user would type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stemma
from stemma.cli.page import page
from stemma.ir import OPS, parse_module, print_module
from stemma.passes.pipelines import pipeline
from tests.commands import as_json, refused, run, succeeded
from tests.conftest import Artifacts

ROOT = Path(__file__).parent.parent
COMMANDS = ("compile", "run", "inspect", "bench", "verify", "passes", "programs", "ops", "targets", "why")
SAMPLED = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--repetition-penalty", 1.1, "--seed", 5)


@pytest.fixture(scope="module")
def source(artifacts: Artifacts) -> Path:
    return artifacts.checkpoint("llama")


@pytest.fixture(scope="module")
def model(artifacts: Artifacts, source: Path) -> Path:
    return artifacts.compiled(source)


@pytest.mark.quick
@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """Every option has a sentence, and the summary of the commands names each with one."""
    text = succeeded(command, "--help")
    assert "Usage: " in text and "--json" in text
    assert command in succeeded("--help")


@pytest.mark.quick
def test_python_dash_m_and_no_arguments() -> None:
    assert run().exit_code == 2 and "Commands" in run().output
    shown = subprocess.run([sys.executable, "-m", "stemma", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and all(command in shown.stdout for command in COMMANDS)


@pytest.mark.quick
def test_what_there_is() -> None:
    """passes, ops and targets, as tables and as JSON."""
    passes = {p["name"]: p for p in as_json("passes")}
    assert passes["quantize"]["label"] == "lossy" and passes["quantize"]["options"]["bits"] == 4
    assert {p.name for p in pipeline("small", (), causal=True, rows=1)} <= passes.keys()
    ops = {o["name"]: o for o in as_json("ops")}
    assert ops.keys() == OPS.keys() and all(o["doc"] and o["level"] for o in ops.values())
    targets = {t["name"]: t for t in as_json("targets")}
    assert {"cpu", "reference", "null"} <= targets.keys() and targets["cpu"]["artifacts"]
    for command, names in (("passes", passes), ("ops", ops), ("targets", targets)):
        text = succeeded(command)
        assert all(name in text for name in names)


def test_compile_reports(source: Path, tmp_path: Path) -> None:
    text = succeeded("compile", source, "-o", tmp_path / "a.stemma", "--variants", "native")
    stages = [line.removesuffix(" ...") for line in text.splitlines() if line.endswith(" ...")]
    assert stages[:2] == ["reading the checkpoint", "tracing the model"] and "compiling kernels" in stages
    assert f"Wrote {tmp_path / 'a.stemma'} (" in text and "Every pass is labelled identical" in text
    report = as_json("compile", source, "-o", tmp_path / "b.stemma", "--variants", "native")
    assert report["bytes"] == (tmp_path / "b.stemma").stat().st_size and report["loss"] is None
    assert [p["name"] for p in report["passes"]] == [p.name for p in pipeline("exact", (), causal=True, rows=512)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.stemma", "b.stemma"]


def test_lossy_presets_are_measured(source: Path, tmp_path: Path) -> None:
    """The measured cost is printed, is in the manifest, and is shown again by inspect and run."""
    path = tmp_path / "small.stemma"
    options = ("--preset", "small", "--calibration-tokens", 24, "--variants", "native")
    report = as_json("compile", source, "-o", path, *options, "--max-kl", 50)
    lossy = [p for p in report["passes"] if p["label"] == "lossy"]
    assert [p["name"] for p in lossy] == ["quantize", "round_activations"] and lossy[-1]["loss"] == report["loss"]
    assert report["loss"]["kl"] > 0 and report["loss"]["tokens"] == 24
    manifest = as_json("inspect", path)
    assert manifest["loss"] == report["loss"] and manifest["preset"] == "small"
    words = f"KL {report['loss']['kl']:.4f} nats/token"
    assert words in succeeded("inspect", path)
    assert f"[quality: {words}" in succeeded("run", path, "-p", "def f", "--max-new-tokens", 3)
    weights = {t["name"]: t["dtype"] for t in as_json("inspect", path, "--weights")["tensors"]}
    assert "int4_g64" in weights.values() and path.stat().st_size > sum(t["bytes"] for t in manifest["weights"]["tensors"])
    assert "allowed 1e-06" in refused("compile", source, "-o", path, *options, "--max-kl", 1e-6)
    assert as_json("inspect", path)["loss"] == report["loss"]  # the refused compile changed nothing


def test_run_prints_what_generate_returns(model: Path) -> None:
    with stemma.load(model) as loaded:
        sampled = dict(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=5)
        for options, given in (((), {}), (SAMPLED, sampled)):
            wanted = loaded.generate("def quick", max_new_tokens=20, **given)
            said = as_json("run", model, "-p", "def quick", "--max-new-tokens", 20, *options)
            assert said["text"] == wanted and 0 < said["new_tokens"] <= 20 and said["decode_tokens_per_second"] > 0
            printed = succeeded("run", model, "-p", "-", "--max-new-tokens", 20, *options, text="def quick")
            assert printed.startswith(wanted + "\n[") and "prompt tokens at" in printed
        stop = loaded.generate("def quick", max_new_tokens=20)[5:8]
        stopped = as_json("run", model, "-p", "def quick", "--max-new-tokens", 20, "--stop", stop)["text"]
        assert stopped == loaded.generate("def quick", max_new_tokens=20, stop=stop) and stop not in stopped


def test_run_streams(model: Path) -> None:
    """Pieces arrive before the end, and a reader that goes away ends the command quietly."""
    command = [sys.executable, "-m", "stemma", "run", str(model), "-p", "def", "--max-new-tokens", "100", "--temperature", "1"]
    with stemma.load(model) as loaded:
        wanted = loaded.generate("def", max_new_tokens=100, temperature=1.0)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    first = os.read(process.stdout.fileno(), 1 << 16)
    assert first and wanted.encode().startswith(first[: len(wanted.encode())])
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) in (0, 1) and b"Traceback" not in errors


def test_inspect(model: Path) -> None:
    text = succeeded("inspect", model)
    assert "target cpu:" in text and "step(tokens: i32[rows]" in text and "incremental" in text
    ir = as_json("inspect", model, "--ir")["ir"]
    assert succeeded("inspect", model, "--ir") == ir
    module = parse_module(ir)
    assert parse_module(print_module(module)) is module and module["step"].result_names[0] == "logits"
    launches = as_json("inspect", model, "--plan")["step"]["launches"]
    assert {"linear", "cached_attention"} <= {word for x in launches for word in x["op"].split()}
    assert "cached_attention" in succeeded("inspect", model, "--plan")
    tensors = as_json("inspect", model, "--weights")["tensors"]
    assert all(t["offset"] % 64 == 0 for t in tensors) and str(tensors[0]["name"]) in succeeded("inspect", model, "--weights")
    measured = as_json("inspect", model, "--roofline", "--rows", 4, "--context", 16)
    assert len(measured["kernels"]) == len(launches) and measured["ceilings"]["bandwidth"] > 1e8
    assert all(k["seconds"] > 0 for k in measured["kernels"])
    assert "GB/s" in succeeded("inspect", model, "--roofline")


def test_bench(model: Path) -> None:
    options = ("--prompt-tokens", 20, "--new-tokens", 8, "--rounds", 1, "--threads", 1)
    data = as_json("bench", model, *options, "--roofline")
    assert (data["prompt_tokens"], data["new_tokens"], data["threads"], data["rounds"]) == (20, 8, 1, 1)
    assert data["prefill_tokens_per_second"] > 0 and data["decode_min"] <= data["decode_tokens_per_second"] <= data["decode_max"]
    assert data["kernels"] and 0 < data["share_of_bandwidth"] < 10
    text = succeeded("bench", model, *options)
    assert "decode of 8, tokens/s" in text and "of the measured bandwidth" in text


def test_verify(artifacts: Artifacts, model: Path) -> None:
    result = as_json("verify", model, "--threads", 2)
    assert result["held"] and len(result["claims"]) >= 6 and all(c["held"] for c in result["claims"])
    other = artifacts.compiled(artifacts.checkpoint("bert"))
    assert "Every claim held" in succeeded("verify", other)


def test_dumps_re_enter(source: Path, tmp_path: Path) -> None:
    """Compiling from a dump gives the very same file; an edited dump is what is compiled."""
    dumps = tmp_path / "dumps"
    succeeded("compile", source, "-o", tmp_path / "a", "--variants", "native", "--dump", dumps)
    steps = [p.name for p in pipeline("exact", (), causal=True, rows=512)]
    states = ["00_frontend.txt", *(f"{i + 1:02d}_{n}.txt" for i, n in enumerate(steps))]
    assert sorted(p.name for p in dumps.iterdir()) == [*states, "programs"]
    middle = f"{steps.index('incremental'):02d}_{steps[steps.index('incremental') - 1]}.txt"
    succeeded("compile", source, "-o", tmp_path / "b", "--variants", "native", "--dump", dumps, "--start-after", middle)
    manifests = [as_json("inspect", tmp_path / name) for name in "ab"]
    assert [len(m["passes"]) for m in manifests] == [len(steps), len(steps) - steps.index("incremental")]
    for member in ("ir.txt", "weights.bin", "targets/cpu/kernels.so"):
        assert len({m["files"][member] for m in manifests}) == 1, member
    text = (dumps / middle).read_text()
    (dumps / middle).write_text(text.replace("eps=1e-06", "eps=0.5").replace("eps=1e-05", "eps=0.5"))
    assert (dumps / middle).read_text() != text
    succeeded("compile", source, "-o", tmp_path / "c", "--variants", "native", "--dump", dumps, "--start-after", middle)
    assert "eps=0.5" in succeeded("inspect", tmp_path / "c", "--ir")


def test_a_pass_of_the_users_own(source: Path, tmp_path: Path) -> None:
    """The example passes, by file; why explains a rule of such a file; verify-each runs beside it."""
    own = "examples/passes/sparsify.py:Sparsify{alpha=0.5}"
    report = as_json(
        "compile", source, "-o", tmp_path / "m.stemma", "--pass", own, "--variants", "native", "--calibration-tokens", 16,
        "--verify-each",
    )  # fmt: skip
    made = next(p for p in report["passes"] if p["name"] == "sparsify")
    assert made["label"] == "lossy" and made["options"] == {"alpha": 0.5} and made["loss"]["kl"] > 0
    with stemma.load(tmp_path / "m.stemma") as loaded:
        assert loaded.generate("def", max_new_tokens=4)
    assert "no option 'beta'" in refused("compile", source, "-o", tmp_path / "x", "--pass", own.replace("alpha", "beta"))
    broken = tmp_path / "broken.py"
    broken.write_text("import absent_module\n")
    message = refused("compile", source, "-o", tmp_path / "x", "--pass", f"{broken}:P")
    assert "fails when it is loaded: ModuleNotFoundError" in message
    assert not (tmp_path / "x").exists()


def test_why(artifacts: Artifacts) -> None:
    """A rule of the user's own that almost fits a model is explained."""
    gelu = "examples/passes/fast_gelu.py:FastGelu"
    found = as_json("why", gelu, artifacts.checkpoint("bert"), "--count", 2)
    assert 0 < len(found) <= 2 and all(f["rule"] and f["text"] for f in found)
    text = succeeded("why", gelu, artifacts.checkpoint("bert"))
    assert found[0]["text"].splitlines()[0] in text


def test_tables_bend_to_no_terminal(model: Path) -> None:
    """In a pipe, rows are not cut: a shell's grep finds whole names."""
    done = subprocess.run([sys.executable, "-m", "stemma", "inspect", model, "--weights"], cwd=ROOT, capture_output=True, text=True)
    names = [t["name"] for t in json.loads(succeeded("inspect", model, "--weights", "--json"))["tensors"]]
    assert done.returncode == 0 and all(str(n) in done.stdout for n in names)


def test_the_page_of_an_artifact(model: Path, tmp_path: Path) -> None:
    """One HTML file that names the passes and needs nothing from outside."""
    page = tmp_path / "page.html"
    assert as_json("inspect", model, "--html", page) == {"html": str(page)}
    text = page.read_text()
    assert "incremental" in text and "<h2>Programs</h2>" in text and "max_new_tokens" in text
    assert "identical" in text and "<script src" not in text and "<link" not in text
    assert "cannot be written" in refused("inspect", model, "--html", tmp_path / "absent" / "page.html")


def test_the_page_shows_text_as_text(model: Path) -> None:
    """An artifact may come from anywhere: nothing in its manifest becomes markup."""
    manifest = as_json("inspect", model)
    bad = "<script>alert('x')</script>\" onclick=x"
    changed = json.loads(json.dumps(manifest).replace('"identical"', json.dumps(bad)).replace('"incremental"', json.dumps(bad)))
    assert changed["passes"][0]["label"] == bad and any(p["name"] == bad for p in changed["passes"])
    text = page(changed, 1)
    assert "<script" not in text and '" onclick' not in text and "&lt;script&gt;" in text
