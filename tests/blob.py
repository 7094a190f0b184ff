"""Reads the blob of programs and runs one on the reference meanings of the operations: what the native machine must do."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stemma.codegen.blob import MAGIC, VERSION
from stemma.ir import OPS, Context, Tensor, World
from stemma.ir.ops.program import OutputValue

DTYPES = ("f32", "i32", "i64", "bool")
NUMPY = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "bool": np.bool_}


@dataclass
class Block:
    registers: int
    params: list[int]
    results: list[int]
    constants: dict[int, Any]
    code: list[tuple[str, list[int], list[int], list[Any]]]


@dataclass
class Program:
    name: str
    dims: list[str]
    params: list[dict[str, Any]]
    results: list[str]
    main: Block
    blocks: list[Block]


class Reader:
    """The parts of a blob: `models` and `functions` as dictionaries, `programs` by name."""

    def __init__(self, data: bytes) -> None:
        self.words: list[int] = [w for (w,) in struct.iter_unpack("<q", data)]
        self.data, self.at = data, 3
        assert self.words[0] == MAGIC and self.words[2] * 8 == len(data)
        assert self.words[1] & 0xFFFFFFFFFFFFFFFF == VERSION | zlib.crc32(data[24:]) << 32
        self.strings: list[str] = []
        for _ in range(self.word()):
            size = self.word()
            self.strings.append(data[8 * self.at : 8 * self.at + size].decode())
            self.at += -(-size // 8)
        self.models = [self._model() for _ in range(self.word())]
        self.functions = [self._function() for _ in range(self.word())]
        self.programs = {p.name: p for p in (self._program() for _ in range(self.word()))}
        assert self.at == len(self.words)

    def word(self) -> int:
        self.at += 1
        return self.words[self.at - 1]

    def text(self) -> str:
        return self.strings[self.word()]

    def many(self) -> list[int]:
        return [self.word() for _ in range(self.word())]

    def _model(self) -> dict[str, Any]:
        made: dict[str, Any] = {"name": self.text()}
        made |= {key: self.word() for key in ("index", "vocab", "width", "mix", "context", "rows")}
        made["sizes"] = self.many()
        made["buffers"] = [(self.word(), self.word(), self.word()) for _ in range(self.word())]
        return made | {"eos": self.many()}

    def _shape(self) -> tuple[str, list[tuple[int, int]]]:
        dtype, rank = self.word(), self.word()
        return "state" if dtype == 4 else DTYPES[dtype], [(self.word(), self.word()) for _ in range(rank)]

    def _function(self) -> dict[str, Any]:
        made: dict[str, Any] = {"name": self.text(), "index": self.word(), "sizes": self.word()}
        return made | {key: [self._shape() for _ in range(self.word())] for key in ("inputs", "results")}

    def _program(self) -> Program:
        name = self.text()
        dims = [self.text() for _ in range(self.word())]
        params = [self._param() for _ in range(self.word())]
        results = [self.text() for _ in range(self.word())]
        main = self._block()
        return Program(name, dims, params, results, main, [self._block() for _ in range(self.word())])

    def _param(self) -> dict[str, Any]:
        made: dict[str, Any] = {"name": self.text()}
        made["dtype"], made["shape"] = self._shape()
        kind, count = self.word(), self.word()
        args = [self.word() if self.word() == 0 else self.text() for _ in range(count)]
        made["state"] = (self.strings[kind], args) if kind >= 0 else None
        default = self.word()
        made["default"] = None if default == 0 else self.word() if default == 1 else self._double()
        return made | {"persistent": self.word()}

    def _double(self) -> float:
        (value,) = struct.unpack("<d", struct.pack("<q", self.word()))
        return float(value)

    def _block(self) -> Block:
        registers, params, results = self.word(), self.many(), self.many()
        constants: dict[int, Any] = {}
        for _ in range(self.word()):
            register, dtype, rank, count = (self.word() for _ in range(4))
            values = [self._double() if dtype == 0 else self.word() for _ in range(count)]
            constants[register] = np.array(values, NUMPY[DTYPES[dtype]]).reshape((count,) if rank else ())
        code = []
        for _ in range(self.word()):
            name, inputs, outputs = self.text(), self.many(), self.many()
            code.append((name, inputs, outputs, [self._attribute() for _ in range(self.word())]))
        return Block(registers, params, results, constants, code)

    def _attribute(self) -> Any:
        match self.word():
            case 0:
                return None
            case 1:
                return self.word()
            case 2:
                return self._double()
            case 3:
                return self.text()
            case 4:
                return tuple(self._attribute() for _ in range(self.word()))
            case 5:
                return ("block", self.word())
            case 6:
                dtype = DTYPES[self.word()]
                return ("type", dtype, tuple(self._attribute() for _ in range(self.word())))
            case 7:
                return ("size", [(self.word(), self.word()) for _ in range(self.word())])
        raise AssertionError("unknown attribute")


class Runner:
    """Runs a program of a blob; reading a register after its last use, or one that was not written, is an error."""

    def __init__(self, reader: Reader, name: str, world: World) -> None:
        self.program, self.context = reader.programs[name], Context(None, np.float32, world)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        arguments = []
        for p in self.program.params:
            value = inputs.get(p["name"], p["default"])
            if p["state"] is not None:
                arguments.append(OutputValue() if value is None else value)
                continue
            array: np.ndarray[Any, Any] = np.asarray(value, NUMPY[p["dtype"]])
            for (kind, v), size in zip(p["shape"], array.shape, strict=True):
                if kind:
                    self.context.sizes[self.program.dims[v]] = size
                else:
                    assert v == size
            arguments.append(array)
        return dict(zip(self.program.results, self.block(self.program.main, arguments), strict=True))

    def block(self, block: Block, arguments: list[Any]) -> list[Any]:
        registers: list[Any] = [None] * block.registers
        for r, value in [*zip(block.params, arguments, strict=True), *block.constants.items()]:
            registers[r] = value
        for name, inputs, outputs, attributes in block.code:
            values = []
            for r in inputs:
                value = registers[r if r >= 0 else -1 - r]
                assert value is not None, f"{name} reads an empty register"
                values.append(value)
                if r < 0:
                    assert -1 - r not in block.constants
                    registers[-1 - r] = None
            found = self.instruction(name, values, attributes)
            assert len(found) == len(outputs)
            for r, value in zip(outputs, found, strict=True):
                if r >= 0:
                    registers[r] = value
        results = [registers[r] for r in block.results]
        assert all(r is not None for r in results)
        return results

    def instruction(self, name: str, values: list[Any], attributes: list[Any]) -> list[Any]:
        if name == "loop":
            body = self.program.blocks[attributes[0][1]]
            again = True
            while again:
                go_on, *values = self.block(body, values)
                again = bool(go_on)
            return values
        if name == "cond":
            return self.block(self.program.blocks[attributes[0 if bool(values[0]) else 1][1]], values[1:])
        op = OPS[name]
        named = {key: self._plain(v) for key, v in zip(op.defaults, attributes, strict=True)}
        found = op.evaluate(self.context, *values, **named)
        return list(found) if isinstance(found, tuple) else [found]

    def _plain(self, value: Any) -> Any:
        if not isinstance(value, tuple) or not value or value[0] not in ("size", "type"):
            return tuple(map(self._plain, value)) if isinstance(value, tuple) else value
        if value[0] == "type":
            return Tensor(value[1], tuple(map(self._plain, value[2])))
        stack: list[int] = []
        for op, v in value[1]:
            if op < 2:
                stack.append(v if op == 0 else self.context.sizes[self.program.dims[v]])
            else:
                b, a = stack.pop(), stack.pop()
                stack.append({2: a + b, 3: a * b, 4: a // (b or 1), 5: min(a, b), 6: max(a, b)}[op])
        (result,) = stack
        return result
