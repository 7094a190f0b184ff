"""A decoding machine on fake models (tests/fake_machine.cpp), what those models compute, and programs for it by hand."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemma.backends.cpu.device import _SIGNATURES, NativeTensor
from stemma.backends.cpu.toolchain import Job, cache_folder, compile_all, find_compiler, machine_source
from stemma.codegen.blob import DTYPES, Served
from stemma.codegen.program import Listed, lower_programs
from stemma.ir import Function, World, interpret
from stemma.ir.ops.program import OutputValue, ReferenceModel

CONTEXT = 100
SEEDS = (11, 22)
FIELDS = (
    "seed", "vocab", "width", "mix", "max_rows", "max_sequences", "max_context", "max_slots", "min_outputs", "calls_left", "calls",
    "rows", "outputs", "most_rows", "jumps",
)  # fmt: skip
NUMPY = {0: np.float32, 1: np.int32, 2: np.int64, 3: np.bool_}
_MASK = 2**64 - 1


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The machine and the fake kernels in one library; the objects are kept with those of artifacts."""
    compiler, folder = find_compiler(), cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    fake = Path(__file__).with_name("fake_machine.cpp").read_text()
    flags = (*compiler.flags(None), "-O2")
    objects = compile_all([Job(compiler, text, flags, "the machine on fakes") for text in (machine_source(), fake)], folder)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "machine.so")
        command = [*compiler.command, "-shared", "-pthread", "-Wl,-z,defs", *map(str, objects), "-o", str(output)]
        subprocess.run(command, check=True)
        made = ctypes.CDLL(str(output))
    for name, (result, arguments) in {**_SIGNATURES, "stemma_machine_limit": (None, [ctypes.c_void_p, ctypes.c_int64])}.items():
        if name.startswith("stemma_machine_"):
            getattr(made, name).restype, getattr(made, name).argtypes = result, arguments
    return made


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def _numbers(h: int, count: int) -> NDArray[np.float32]:
    return np.array([(_mix((h + v) & _MASK) >> 40) / 2**20 - 8 for v in range(count)], np.float32)


def reference(seed: int, vocab: int, width: int) -> ReferenceModel:
    """What a fake model computes after a list of tokens (numbers, or ((token, weight), ...) of a mixed one)."""

    def compute(tokens: tuple[Any, ...]) -> tuple[Any, Any]:
        total = seed
        for position, token in enumerate(tokens):
            h = _mix(seed + position)
            for t, w in ((token, 1.0),) if isinstance(token, int) else token:
                if w:
                    h = _mix(h ^ (int(np.float32(w).view(np.uint32)) << 32 | t))
            total = _mix(total ^ h)
        return _numbers(total, vocab), _numbers(total + 1000000, width)

    return ReferenceModel(compute, vocab, width)


def _tensor(name: str, *shape: int | str, dtype: str = "i32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


class Fake:
    """Fake models "model" (of `vocab` tokens, hidden state of `width`) and "draft", and the machine for some programs."""

    def __init__(
        self,
        *programs: Function | Listed,
        vocab: int = 9,
        width: int = 2,
        draft_vocab: int = 9,
        mix: int = 1,
        blob: bytes | None = None,
        **limits: int,
    ) -> None:
        self.shapes = {"model": (vocab, width, mix), "draft": (draft_vocab, 0, 1)}
        self.config = np.zeros((2, len(FIELDS)), np.int64)
        given = {
            "max_rows": 8,
            "max_sequences": 64,
            "max_context": CONTEXT,
            "max_slots": 2**31 - 1,
            "calls_left": -1,
            "min_outputs": 0,
        }
        for row, seed, (v, w, m) in zip(self.config, SEEDS, self.shapes.values(), strict=True):
            for key, value in (given | limits | {"seed": seed, "vocab": v, "width": w, "mix": m}).items():
                row[FIELDS.index(key)] = value
        self.rows = (given | limits)["max_rows"]
        self.listed = [p if isinstance(p, Listed) else Listed(p) for p in programs]
        self.blob = self.lower() if blob is None else blob
        error = ctypes.create_string_buffer(1024)
        self.library = library()
        self.handle = self.library.stemma_machine_open(
            self.config.ctypes.data, self.blob, len(self.blob), ctypes.addressof(error), 1024
        )
        if not self.handle:
            raise RuntimeError(error.value.decode())

    def _step(self, index: int, vocab: int, width: int, mix: int) -> dict[str, Any]:
        inputs = [_tensor("tokens", "rows", mix) if mix > 1 else _tensor("tokens", "rows")]
        inputs += [_tensor(n, "rows") for n in ("positions", "slots", "sequence")]
        inputs += [_tensor("table", "sequences", "context"), _tensor("selected", "outputs")]
        inputs += [_tensor("weights", "rows", mix, dtype="f32")] * (mix > 1)
        results = [_tensor("logits", "outputs", vocab, dtype="f32"), _tensor("hidden", "outputs", width, dtype="f32")]
        return {
            "index": index,
            "dims": [{"name": n, "lo": 0, "hi": self.rows} for n in ("rows", "outputs", "sequences", "context", "slots")],
            "inputs": inputs,
            "states": [_tensor("a", 2, "slots", 1, dtype="i64"), _tensor("b", 3, "slots", 1)],
            "results": results[: 1 + (width > 0)],
        }

    def lower(self) -> bytes:
        """The blob of the programs."""
        models = [Served(name, v, w, (1,), CONTEXT) for name, (v, w, _) in self.shapes.items()]
        score = {"index": 2, "dims": [{"name": "n", "lo": 1, "hi": 9}], "inputs": [_tensor("x", "n", 2, dtype="f32")], "states": [],
                 "results": [_tensor("y", "n", dtype="f32")]}  # fmt: skip
        steps = {m.function: self._step(i, *self.shapes[m.name]) for i, m in enumerate(models)}
        return lower_programs(self.listed, models, steps | {"score": score})

    def world(self, **host: Any) -> World:
        """The same world for the reference interpreter."""
        models = {n: reference(s, v, w) for s, (n, (v, w, _)) in zip(SEEDS, self.shapes.items(), strict=True)}
        return World(models=models, host=host, compiled={"score": lambda x: x.sum(1)})

    def start(self, program: str, **inputs: Any) -> int:
        """Start a program; RuntimeError with the machine's reason."""
        arrays = {k: np.asarray(v, order="C") for k, v in inputs.items()}
        given = (NativeTensor * len(arrays))(*(native(k, v) for k, v in arrays.items()))
        error = ctypes.create_string_buffer(1024)
        id = int(
            self.library.stemma_machine_start(self.handle, program.encode(), given, len(arrays), ctypes.addressof(error), 1024)
        )
        if id < 0:
            raise RuntimeError(error.value.decode())
        return id

    def advance(self, tokens: int = 0, nanoseconds: int = 0) -> int:
        return int(self.library.stemma_machine_advance(self.handle, tokens, nanoseconds))

    def status(self, id: int) -> int:
        return int(self.library.stemma_machine_status(self.handle, id, None))

    def error(self, id: int) -> str:
        return str(self.library.stemma_machine_error(self.handle, id).decode())

    def tokens(self, id: int) -> list[int]:
        out = np.zeros(4096, np.int32)
        found: list[int] = out[: self.library.stemma_machine_tokens(self.handle, id, 0, out.ctypes.data, out.size)].tolist()
        return found

    def result(self, id: int, name: str) -> Any:
        """A result by name; None for one that is no tensor."""
        out = NativeTensor()
        if self.library.stemma_machine_result(self.handle, id, name.encode(), ctypes.addressof(out)):
            return None
        return array(out)

    def request(self, id: int) -> tuple[str, list[Any]]:
        name, arguments = ctypes.c_char_p(), (NativeTensor * 8)()
        count = self.library.stemma_machine_request(self.handle, id, ctypes.addressof(name), arguments, 8)
        return (name.value or b"").decode(), [array(a) for a in arguments[:count]]

    def reply(self, id: int, value: Any = None, error: str | None = None) -> int:
        made = None if value is None else np.asarray(value, order="C")
        tensor = None if made is None else native("", made)
        given = None if tensor is None else ctypes.addressof(tensor)
        return int(self.library.stemma_machine_reply(self.handle, id, given, None if error is None else error.encode()))

    def release(self, id: int) -> None:
        self.library.stemma_machine_release(self.handle, id)

    def statistics(self, id: int = -1) -> list[float]:
        out = np.zeros(64)
        found: list[float] = out[: self.library.stemma_machine_statistics(self.handle, id, out.ctypes.data, out.size)].tolist()
        return found

    def used(self) -> list[int]:
        """Cache slots in use, per model."""
        return [int(n) for n in self.statistics()[-2:]]

    def seen(self, field: str, model: int = 0) -> int:
        """What the fake kernels counted."""
        return int(self.config[model, FIELDS.index(field)])

    def set(self, field: str, value: int, model: int = 0) -> None:
        self.config[model, FIELDS.index(field)] = value

    def close(self) -> None:
        self.library.stemma_machine_close(self.handle)

    def run(self, program: str, **inputs: Any) -> tuple[list[int], dict[str, Any]]:
        """Tokens and tensors that a program gives, run alone; RuntimeError when it fails."""
        id = self.start(program, **inputs)
        assert self.advance() == 0
        return self.outcome(id)

    def outcome(self, id: int) -> tuple[list[int], dict[str, Any]]:
        """Tokens and tensors of a finished instance, which is released."""
        if self.status(id) != 1:
            raise RuntimeError(self.error(id))
        function = next(p.function for p in self.listed if self._is(id, p))
        found = {n: v for n in function.result_names if (v := self.result(id, n)) is not None}
        tokens = self.tokens(id)
        self.release(id)
        return tokens, found

    def _is(self, id: int, listed: Listed) -> bool:
        return len(self.listed) == 1 or all(
            self.result(id, n) is not None for n, r in zip(listed.function.result_names, listed.function.results, strict=True)
            if hasattr(r.type, "shape")
        )  # fmt: skip

    def expect(self, function: Function, host: Mapping[str, Any] | None = None, **inputs: Any) -> tuple[list[int], dict[str, Any]]:
        """The same by the reference interpreter."""
        given = dict(inputs) | {p.attrs["name"]: OutputValue() for p in function.params if p.attrs["name"] == "output"}
        found = interpret(function, given, float_type=np.float32, world=self.world(**(host or {})))
        tokens = [int(t) for v in found.values() if isinstance(v, OutputValue) for t in v.tokens]
        return tokens, {n: v for n, v in found.items() if isinstance(v, (np.ndarray, np.generic))}


def native(name: str, value: NDArray[Any]) -> NativeTensor:
    shape = (*value.shape, *[0] * (4 - value.ndim))
    return NativeTensor(name.encode(), DTYPES[value.dtype.name.replace("int", "i").replace("float", "f")], value.ndim,
                        (ctypes.c_int64 * 4)(*shape), value.ctypes.data)  # fmt: skip


def array(tensor: NativeTensor) -> NDArray[Any]:
    """A copy of a native tensor."""
    shape = tuple(tensor.shape[: tensor.rank])
    made = np.zeros(shape, NUMPY[tensor.dtype])
    ctypes.memmove(made.ctypes.data, tensor.data, made.nbytes)
    return made


def same(found: tuple[list[int], dict[str, Any]], expected: tuple[list[int], dict[str, Any]]) -> None:
    """Assert that tokens and tensors are equal to the bit."""
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_array_equal(found[1][name], value, err_msg=name)
