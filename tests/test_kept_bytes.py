"""Memory of what speculation keeps: the reported bounds hold for full native structures, and are no wild guesses."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

from stemma.backends.cpu.toolchain import Job, cache_folder, compile_all, find_compiler, machine_source
from stemma.ir import PassError, State, Tensor
from stemma.passes.kept_bytes import kept_bytes
from tests.native_ops import shims

FULL = r"""
#define API extern "C" __attribute__((visibility("default")))
static int64_t live;
void* operator new(size_t n) {
  char* p = (char*)malloc(n + 16);
  *(size_t*)p = n;
  live += (int64_t)n;
  return p + 16;
}
void operator delete(void* p) noexcept {
  if (!p) return;
  live -= (int64_t)*(size_t*)((char*)p - 16);
  free((char*)p - 16);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }
namespace stemma {
template <class F> int64_t bytes_of(const std::string& kind, std::vector<int64_t> args, F fill) {
  const int64_t before = live;
  Object* made = make_state(kind, args);
  fill(made);
  const int64_t found = live - before;
  delete made;
  return live == before ? found : -1;
}
API int64_t trie_bytes(int64_t capacity) {
  return bytes_of("trie", {capacity}, [&](Object* o) {
    for (int64_t i = 0; i < capacity; ++i) ((tables::Trie*)o)->grow((int32_t)(i / 3), (int32_t)(i % 3), 1);
  });
}
API int64_t ngrams_bytes(int64_t order, int64_t k) {
  return bytes_of("ngrams", {order, k}, [&](Object* o) {
    std::vector<int32_t> context((size_t)order);
    for (int32_t i = 0; i < (int32_t)tables::Ngrams::CONTEXTS; ++i) {
      for (int32_t& token : context) token = i;
      ((tables::Ngrams*)o)->at(context.data(), order);
    }
  });
}
API int64_t recycling_bytes(int64_t vocab, int64_t k) { return bytes_of("recycling", {vocab, k}, [](Object*) {}); }
API int64_t governor_bytes(int64_t size, int64_t sources) {
  return bytes_of("governor", {size, sources}, [](Object* o) {
    for (int64_t rows = 1; rows <= governor::ROWS; ++rows) ((governor::Governor*)o)->curve.take(rows, 1.0 + (double)rows);
    ((governor::Governor*)o)->cost(3);
  });
}
}  // namespace stemma
"""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The machine, which counts what it has allocated."""
    compiler, folder = find_compiler(), cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    fake = Path(__file__).with_name("fake_machine.cpp").read_text()
    flags = (*compiler.flags(None), "-O2")
    jobs = [Job(compiler, text, flags, "a machine that counts") for text in (machine_source() + FULL, fake, shims())]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "counting.so")
        command = [*compiler.command, "-shared", "-pthread", *map(str, compile_all(jobs, folder)), "-o", str(output)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(output))


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("trie", (100,)), ("trie", (4096,)), ("trie", (65535,)), ("trie", (65536,)), ("trie", (70000,)),
        ("ngrams", (2, 1)), ("ngrams", (4, 10)), ("recycling", (5000, 8)), ("governor", (16, 1)), ("governor", (64, 4)),
    ],
)  # fmt: skip
def test_full_states_fit_the_bound(kind: str, args: tuple[int, ...]) -> None:
    measure = getattr(library(), f"{kind}_bytes")
    measure.restype, measure.argtypes = ctypes.c_int64, [ctypes.c_int64] * len(args)
    found, bound = measure(*args), kept_bytes(State(kind, args))
    assert found <= bound + 512 and bound <= 4 * found + 32768  # 512: the object itself


def test_other_values() -> None:
    assert kept_bytes(Tensor("i32", (5, 8))) == 160 and kept_bytes(Tensor("bool", ())) == 1
    with pytest.raises(PassError, match="cannot be kept; there are: tensors and the states trie, ngrams, recycling, governor"):
        kept_bytes(State("output"))
