"""Damaged programs: an error or another result, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stemma.ir import Function, State, Tensor, ops
from tests.machine import Fake, library, same
from tests.test_machine import i32, ints, param, parts, prompt, start, stepped

pytestmark = pytest.mark.quick

DAMAGE = """
import sys, random, numpy as np
from tests.machine import Fake
from tests.test_machine_damage import whole_program
from tests.blob import Reader
import struct

class Places(Reader):
    def _program(self):
        self.first = getattr(self, "first", self.at - 1)
        return super()._program()

function = whole_program()
good = Fake(function)
blob, first = bytearray(good.blob), Places(good.blob).first
expected = good.run("f", prompt=np.array([1, 2], np.int32))
blob[12:16] = bytes(4)  # no checksum
rng = random.Random(int(sys.argv[1]))
refused = failed = 0
for _ in range(1500):
    damaged = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = 8 * rng.randrange(first, len(blob) // 8)
        word = struct.unpack_from("<q", damaged, at)[0]
        choices = (word ^ 1 << rng.randrange(64), word + rng.choice((-2, -1, 1, 2)), rng.randrange(-8, 16), -1, 2**62)
        struct.pack_into("<q", damaged, at, max(-(2**63), min(rng.choice(choices), 2**63 - 1)))
    if rng.random() < 0.1:
        damaged = damaged[: rng.randrange(len(damaged))]
    try:
        fake = Fake(function, blob=bytes(damaged))
    except RuntimeError:
        refused += 1
        continue
    try:
        id = fake.start("f", prompt=np.array([1, 2], np.int32))
        fake.advance(nanoseconds=10**7)
        failed += fake.status(id) != 1
    except RuntimeError:
        failed += 1
    fake.close()
print(refused, failed)
"""


def whole_program() -> Function:
    """A program with every operation of sequences and trees, in and around a loop and a condition."""
    text, output = prompt(), param("output", State("output"))
    scores = ops.array(values=(0.5, 0.5), dtype="f32")
    s, out, token = param("s", start(text).type), param("o", State("output")), param("t", Tensor("i32", (1,)))
    tree = ops.get(ops.tree_extend(ops.tree(token, i32(8), size=8), ints(0, 0), ints(1, 2), scores), index=0)
    ran = ops.get(ops.expand(s, tree, fresh=3), index=0)
    after, logits, _ = parts(ops.follow(ran, token))
    chosen = ops.cast(ops.argmax(logits, axis=1), dtype="i32")
    c = param("c", after.type)
    accepted = ops.cond(
        ops.has_child(after, chosen), after, chosen,
        then=Function("", [c, token], {"c": ops.get(ops.follow(c, token), index=0)}),
        otherwise=Function("", [c, token], {"c": c}),
    )  # fmt: skip
    settled = ops.settle(accepted)
    emitted = ops.emit(out, chosen)
    again = ops.lt(ops.emitted(emitted), i32(5))
    body = Function("", [s, out, token], {"again": again, "s": settled, "o": emitted, "t": chosen})
    looped = ops.loop(start(text), output, ints(3), body=body)
    end, last, _ = parts(looped)
    other = ops.sync(start(text, "draft"), end)
    _, more, _ = parts(ops.step(ops.fork(other, ints(0, 0)), ints(1, 2)))
    _, fed, _ = parts(ops.feed(end, ints(4, 5)))
    history = ops.history(end, i32(1), size=6)
    return Function("f", [text, output], {"output": last, "more": more, "fed": fed, "history": history, "n": ops.length(end)})


def test_a_program_with_everything() -> None:
    """Loops and conditions around trees: the reference's tokens and values."""
    function = whole_program()
    fake = Fake(function)
    for text in (np.array([1, 2], np.int32), np.zeros(0, np.int32)):
        same(fake.run("f", prompt=text), fake.expect(function, prompt=text))
    assert fake.used() == [0, 0]


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_programs(seed: int) -> None:
    """Changed words of a blob, its checksum left out, give errors or other results, but never a crash."""
    library()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", DAMAGE, str(seed)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, failed = map(int, done.stdout.split())
    assert refused > 500 and failed > 50


def test_checksum() -> None:
    """One changed bit anywhere behind the header is an error."""
    blob = Fake(stepped()).blob
    for at in range(24, len(blob), 7):
        damaged = bytearray(blob)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(RuntimeError, match="damaged: its checksum is wrong"):
            Fake(stepped(), blob=bytes(damaged))
    with pytest.raises(RuntimeError, match="no blob of programs"):
        Fake(stepped(), blob=bytes(64))
    with pytest.raises(RuntimeError, match="update Stemma"):
        Fake(stepped(), blob=blob[:8] + b"\x07" + blob[9:])
    with pytest.raises(RuntimeError, match="damaged"):
        Fake(stepped(), blob=b"")
