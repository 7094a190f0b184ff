"""Exporting a model to C: the folder's example is compiled with the C compiler and gives Python's tokens and text."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

import stemma
from stemma.backends.cpu.toolchain import find_compiler
from stemma.runtime import ArtifactError, InputError
from stemma.runtime.export import _write, byte_letters, export_c, pack_vocabulary, token_bytes
from tests import fake
from tests.commands import as_json, refused, succeeded

pytestmark = pytest.mark.quick
PROMPT = [3, 7, 40]


class Option(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_double)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.write(tmp_path_factory.mktemp("export") / "my model.stemma")


@pytest.fixture(scope="module")
def folder(path: Path) -> Path:
    made = export_c(path, path.parent / "c")
    assert made.files == ("stemma.h", "main.c", "libmy_model.so", "programs.bin", "vocabulary.bin", "weights.bin") and not made.note
    return made.folder


def example(folder: Path) -> Path:
    """The compiled example of an exported folder."""
    compiler = find_compiler()
    c = [shutil.which("cc") or shutil.which("gcc") or "cc"] if not compiler.zig else [*compiler.command[:-1], "cc"]
    name = next(f.stem[3:] for f in folder.glob("lib*.so"))
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-l{name}", "-L.", "-Wl,-rpath,$ORIGIN", "-o", "example"]
    subprocess.run([*c, "main.c", *flags], cwd=folder, check=True)
    return folder / "example"


def test_the_example_gives_the_tokens_of_python(path: Path, folder: Path) -> None:
    program = example(folder)
    with stemma.load(path, threads=1) as model:
        for count, heat in ((40, 0.0), (30, 30.0), (1, 0.0)):
            options: dict[str, Any] = {"max_new_tokens": count, "temperature": heat, "seed": 1}
            arguments = [str(program), str(folder), str(count), str(heat), *map(str, PROMPT)]
            ids = subprocess.run(arguments, env=os.environ | {"STEMMA_IDS": "1"}, capture_output=True, text=True, check=True)
            assert [int(i) for i in ids.stdout.split()] == model.generate_ids(PROMPT, **options)
            text = subprocess.run(arguments, capture_output=True, check=True).stdout.decode(errors="replace")
            assert text == model.generate(PROMPT, **options) + "\n"


def test_errors_of_the_example(folder: Path, tmp_path: Path) -> None:
    program = example(folder)
    for arguments, message in (
        ([folder, "9", "0", "999"], "The token id 999 is not between 0 and 319"),
        ([folder, "9", "0", *["1"] * 96], "The prompt has 96 tokens; it must have 1 to 95"),
        ([folder, "nan", "0", "1"], "The option max_new_tokens cannot be nan"),
        ([tmp_path, "9", "0", "1"], "has no weights.bin"),
    ):
        found = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
        assert found.returncode == 1 and message in found.stderr


def library(folder: Path) -> Any:
    """The C API by ctypes."""
    loaded = ctypes.CDLL(str(next(folder.glob("lib*.so"))))
    loaded.stemma_load.restype = ctypes.c_void_p
    loaded.stemma_error.restype, loaded.stemma_error.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    loaded.stemma_free.argtypes = [ctypes.c_void_p]
    loaded.stemma_generate.restype = ctypes.c_int64
    pointer = ctypes.c_void_p
    loaded.stemma_generate.argtypes = [
        pointer, ctypes.c_char_p, pointer, ctypes.c_int64, pointer, ctypes.c_int64, pointer, pointer
    ]  # fmt: skip
    return loaded


def test_the_api_by_its_functions(folder: Path) -> None:
    c, error = library(folder), ctypes.create_string_buffer(512)
    model = c.stemma_load(str(folder).encode(), 1, error, 512)
    assert model, error.value
    ids = (ctypes.c_int32 * len(PROMPT))(*PROMPT)

    def generate(program: bytes = b"generate", callback: Any = None, **options: float) -> int:
        given = (Option * max(len(options), 1))(*(Option(name.encode(), value) for name, value in options.items()))
        return int(c.stemma_generate(model, program, ids, len(PROMPT), given, len(options), callback, None))

    assert generate(max_new_tokens=7, ignore_eos=1) == 7
    assert generate(ignore_eos=1, max_new_tokens=1000) == fake.CONTEXT - len(PROMPT)  # cut to the context
    assert generate(ignore_eos=1) == fake.CONTEXT - len(PROMPT)  # so is the default
    seen: list[int] = []

    def until_five(user: Any, tokens: Any, count: int) -> int:
        seen.extend(tokens[:count])
        return int(len(seen) >= 5)

    kind: Any = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32), ctypes.c_int64)
    assert generate(callback=kind(until_five), ignore_eos=1) == 5 and seen == fake.greedy(PROMPT, 5)
    wrong: tuple[tuple[dict[str, Any], bytes], ...] = (
        ({"heat": 1}, b"has no option heat"),
        ({"top_k": 1.5}, b"The option top_k cannot be 1.5"),
        ({"program": b"beam"}, b"There is no program 'beam'"),
    )
    for options, message in wrong:
        assert generate(**options) == -1 and message in c.stemma_error(model)
    assert generate(max_new_tokens=2) == 2 and c.stemma_error(model) == b""
    c.stemma_free(model)


@pytest.mark.parametrize("file", ["programs.bin", "vocabulary.bin"])
def test_damaged_files(folder: Path, tmp_path: Path, file: str) -> None:
    c, error = library(folder), ctypes.create_string_buffer(512)
    shutil.copytree(folder, tmp_path / "copy")
    damaged = bytearray((folder / file).read_bytes())
    damaged[16:24] = b"\xff" * 8
    (tmp_path / "copy" / file).write_bytes(damaged)
    assert not c.stemma_load(str(tmp_path / "copy").encode(), 1, error, 512) and b"damaged" in error.value
    (tmp_path / "copy" / file).unlink()
    model = c.stemma_load(str(tmp_path / "copy").encode(), 1, error, 512)
    assert bool(model) == (file == "vocabulary.bin")
    if model:
        c.stemma_free(model)


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    """Also after Ctrl-C, and where an older file is."""

    def interrupted() -> Iterator[bytes]:
        yield b"the first half"
        raise KeyboardInterrupt

    (tmp_path / "old.bin").write_bytes(b"old")
    for name in ("new.bin", "old.bin"):
        with pytest.raises(KeyboardInterrupt):
            _write(tmp_path / name, interrupted())
    assert [p.name for p in tmp_path.iterdir()] == ["old.bin"] and (tmp_path / "old.bin").read_bytes() == b"old"
    _write(tmp_path / "new.bin", [b"all", b" of it"])
    assert (tmp_path / "new.bin").read_bytes() == b"all of it"


def test_the_command(path: Path, tmp_path: Path) -> None:
    shown = succeeded("export", path, "--c", tmp_path / "out")
    assert "libmy_model.so" in shown and "-lmy_model" in shown and (tmp_path / "out" / "weights.bin").stat().st_size == 8
    assert set(as_json("export", path, "--c", tmp_path / "out")["files"]) >= {"stemma.h", "vocabulary.bin"}
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("export", path, "--c", tmp_path / "file")
    bare = fake.write(tmp_path / "bare.stemma", text=False)
    assert export_c(bare, tmp_path / "bare").note == "The artifact has no tokenizer, so tokens are printed as numbers."
    with pytest.raises(ArtifactError, match="has no decoding programs"):
        export_c(fake.write(tmp_path / "other.stemma", kind="model"), tmp_path / "other")
    with pytest.raises(InputError, match="Give another one"):
        export_c(path, tmp_path / "file" / "deeper")


def test_tokens_of_byte_level_tokenizers_are_bytes() -> None:
    words = token_bytes(json.loads(fake.tokenizer().to_str()), fake.VOCAB)
    assert words is not None and words[0] == words[1] == b"" and set(byte_letters().values()) == set(range(256))
    for text in (*fake.TEXT, "🎊中 \n\t"):
        assert b"".join(words[i] for i in fake.tokenizer().encode(text).ids) == text.encode()


def test_tokens_of_sentencepiece_tokenizers_are_bytes() -> None:
    """Llama's decoder: ▁ is a space, <0xNN> a byte."""
    pieces = ["<unk>", "<s>", "▁", "▁caf", "c", "a", "f", *(f"<0x{b:02X}>" for b in range(256))]
    made = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>"])
    words = token_bytes(json.loads(made.to_str()), len(pieces))
    assert words is not None and words[1] == b"" and words[3] == b" caf"
    ids = made.encode("café fa").ids
    assert b"".join(words[i] for i in ids) == " café fa".encode()
    made.decoder = decoders.WordPiece()
    assert token_bytes(json.loads(made.to_str()), len(pieces)) is None


def test_the_vocabulary_file() -> None:
    data = np.frombuffer(pack_vocabulary([b"ab", b"", b"cde"])[:40], np.int64)
    assert data.tolist() == [3, 0, 2, 2, 5] and pack_vocabulary([b"ab", b"", b"cde"])[40:] == b"abcde"
