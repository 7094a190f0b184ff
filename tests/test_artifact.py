"""The artifact file: what the writer promises, and one clear error for every way a file can be unusable."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from stemma.codegen import artifact as artifact_module
from stemma.codegen.artifact import ALIGNMENT, Member, Stream, check_output, write_artifact
from stemma.ir.errors import CompileError
from stemma.runtime.artifact import Artifact
from stemma.runtime.errors import ArtifactError
from tests import fake

KERNELS = b"not really kernels" * 500


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.stemma"
    write_artifact(target, fake.manifest(), fake.members(KERNELS))
    return target


def data_offset(path: Path, name: str) -> int:
    """Where a member's data begins, by the local header."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(name).header_offset
    header = path.read_bytes()[start : start + 30]
    return start + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


@pytest.mark.quick
def test_members_are_stored_aligned_and_hashed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names[-1] == "manifest.json" and all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        written = json.loads(archive.read("manifest.json"))
        assert written["files"] == {n: hashlib.sha256(archive.read(n)).hexdigest() for n in names[:-1]}
    assert [data_offset(path, name) % ALIGNMENT for name in names] == [0] * len(names)
    assert written["weights"] == {"member": "weights.bin", "tensors": [], "bytes": 8, "sha256": written["files"]["weights.bin"]}
    with Artifact(path) as artifact:
        assert artifact.read("targets/cpu/kernels.so") == KERNELS
        assert artifact.weights.view(np.int32).tolist() == [fake.WEIGHT, fake.VOCAB]
        assert artifact.weights.ctypes.data % 4096 == 0 and not artifact.weights.flags.writeable
        assert dict(artifact.check())["weights.bin"] == 8
    assert artifact.weights.view(np.int32)[0] == fake.WEIGHT  # still mapped after closing


@pytest.mark.quick
def test_equal_models_give_equal_files(path: Path, tmp_path: Path) -> None:
    write_artifact(tmp_path / "again.stemma", fake.manifest(), fake.members(KERNELS))
    assert (tmp_path / "again.stemma").read_bytes() == path.read_bytes()


@pytest.mark.quick
def test_members_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zip64 sizes and offsets, with 5000 bytes in the place of 4 GiB as the limit of plain zip."""
    monkeypatch.setattr(artifact_module, "_LARGE", 2000)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 5000)
    target, weights = tmp_path / "large.stemma", bytes(range(256)) * 40
    members: list[Member] = [
        ("weights.bin", Stream(len(weights), [weights[:3000], weights[3000:]])),
        ("after.txt", b"behind the limit"),
    ]
    write_artifact(target, fake.manifest(), members)
    with zipfile.ZipFile(target) as archive:
        assert archive.getinfo("weights.bin").create_version == archive.getinfo("after.txt").create_version == zipfile.ZIP64_VERSION
    assert data_offset(target, "weights.bin") % ALIGNMENT == data_offset(target, "after.txt") % ALIGNMENT == 0
    with Artifact(target) as artifact:
        assert artifact.weights.tobytes() == weights and artifact.read("after.txt") == b"behind the limit"


@pytest.mark.quick
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_an_interrupted_writer_leaves_the_old_file_and_nothing_else(path: Path, error: type[BaseException]) -> None:
    before = path.read_bytes()

    def chunks() -> Iterator[bytes]:
        yield bytes(1000)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_artifact(path, fake.manifest(), [("weights.bin", Stream(2000, chunks()))])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.quick
def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(target: Path) -> None:
        write_artifact(target, fake.manifest(), fake.members(KERNELS))

    for attempt in (check_output, write):
        with pytest.raises(CompileError, match="folder .* does not exist. Create it"):
            attempt(tmp_path / "absent" / "model.stemma")
        with pytest.raises(CompileError, match="it is a folder"):
            attempt(tmp_path)
        with pytest.raises(CompileError, match="Choose an output that you may write to"):
            attempt(Path(__file__) / "model.stemma")
    check_output(tmp_path / "model.stemma")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CompileError, match="no room to write .* and 1000 are free"):
        write(tmp_path / "model.stemma")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk: a real failing write, in a process of its own."""
    script = (
        "import sys\nfrom tests import fake\nfrom stemma.codegen.artifact import Stream, write_artifact\n"
        "write_artifact(sys.argv[1], fake.manifest(), [('weights.bin', Stream(8 << 20, [bytes(1 << 20)] * 8))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.stemma")],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20)),
    )
    assert done.returncode == 1 and "CompileError: There is no room to write" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_streams_of_the_wrong_size(tmp_path: Path) -> None:
    for announced in (99, 101):
        with pytest.raises(CompileError, match=f"has 100 bytes, but {announced} were announced"):
            write_artifact(tmp_path / "m", fake.manifest(), [("weights.bin", Stream(announced, [bytes(100)]))])
    with pytest.raises(CompileError, match="given twice"):
        write_artifact(tmp_path / "m", fake.manifest(), [("a", b""), ("a", b"")])
    with pytest.raises(CompileError, match="names no weights member"):
        write_artifact(tmp_path / "m", fake.manifest(), [("a", b"")])
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """The same artifact with an edited manifest."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(contents["manifest.json"])
    edit(manifest)
    contents["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)


def flip(name: str) -> Callable[[Path], None]:
    """Change one byte of a member's data."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[data_offset(path, name) + 3] ^= 0x40
        path.write_bytes(data)

    return damage


def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, edit)


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


def not_json(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def manifest_list(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "[1]")


class Bad(NamedTuple):
    damage: Callable[[Path], object]
    message: str


BAD = {
    "absent": Bad(lambda p: p.unlink(), "There is no file"),
    "folder": Bad(to_folder, "Is a directory"),
    "empty": Bad(lambda p: p.write_bytes(b""), "not a Stemma artifact: it is empty"),
    "text": Bad(lambda p: p.write_text("hello, this is no zip"), "not a Stemma artifact: it is not a zip file"),
    "another zip": Bad(foreign_zip, "not a Stemma artifact: it has no manifest.json"),
    "cut at the end": Bad(lambda p: p.write_bytes(p.read_bytes()[:-10]), "truncated or damaged"),
    "cut in half": Bad(lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated or damaged"),
    "cut in the middle": Bad(lambda p: p.write_bytes(p.read_bytes()[:5000] + p.read_bytes()[9096:]), "is corrupt"),
    "damaged kernels": Bad(flip("targets/cpu/kernels.so"), "is corrupt: its member 'targets/cpu/kernels.so'"),
    "damaged manifest": Bad(flip("manifest.json"), "is corrupt: its member 'manifest.json'"),
    "manifest not JSON": Bad(not_json, "manifest.json is not JSON"),
    "manifest a list": Bad(manifest_list, "no version number of the format"),
    "no format": Bad(edited(lambda m: m.pop("format")), "no version number of the format"),
    "newer": Bad(edited(lambda m: m.update(format=3)), "has format 3, newer than the 2 .* Update Stemma"),
    "older": Bad(edited(lambda m: m.update(format=1)), "has format 1, older than the 2 .* Compile the model again"),
    "newer kernels": Bad(edited(lambda m: m.update(abi=3)), "has kernel interface 3, newer"),
    "no functions": Bad(edited(lambda m: m.pop("functions")), "the key 'functions' is missing"),
    "no step": Bad(edited(lambda m: m["functions"].pop("step")), "needs a function 'step'"),
    "bad size": Bad(edited(lambda m: m["functions"]["step"]["inputs"][0].update(shape=["__import__('os')"])), "size arithm"),
    "bad type": Bad(edited(lambda m: m["functions"]["step"]["inputs"][0].update(dtype="i7")), "unknown element type 'i7'"),
    "bad eos": Bad(edited(lambda m: m.update(eos=["</s>"])), "eos must be a list of token ids"),
    "no context": Bad(edited(lambda m: m["limits"].update(context=0)), "limits of 0 positions"),
    "weights size": Bad(edited(lambda m: m["weights"].update(bytes=9)), "weights have 8 bytes where the manifest says 9"),
    "repacked": Bad(edited(lambda m: None), "not at a multiple of 4096"),
    "stray member": Bad(edited(lambda m: m["files"].pop("ir.txt")), "disagree about 'ir.txt'"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_used(path: Path, name: str) -> None:
    BAD[name].damage(path)
    with pytest.raises(ArtifactError, match=BAD[name].message) as caught:
        Artifact(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.quick
def test_damaged_weights_are_found_by_check_and_not_by_loading(path: Path) -> None:
    flip("weights.bin")(path)
    with Artifact(path) as artifact, pytest.raises(ArtifactError, match="its weights .* recorded hash"):
        list(artifact.check())


@pytest.mark.quick
def test_a_cut_anywhere_is_an_error(path: Path) -> None:
    data = path.read_bytes()
    for size in [*range(0, len(data), 997), *range(len(data) - 40, len(data))]:
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError):
            Artifact(path)
