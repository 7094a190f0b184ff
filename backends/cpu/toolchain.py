"""Finds a C++ compiler, builds one library per artifact from objects per instruction-set variant, and caches both.

The source is compiled once per variant with -DSTEMMA_VARIANT=<identifier>, in parallel processes, and once more without it for the
dispatcher. The decoding machine (folder `machine`) is one more object, the same for every artifact. Objects are linked with the
least demanding first: of an inline function that several objects define (the standard library's), the linker keeps the first, so
that code built for AVX-512 is never reached on a machine without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stemma.backends.base import Built
from stemma.ir import CompileError

FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w",
    "-pthread",
)  # fmt: skip
CURES = (
    "Install one (Debian or Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; any machine with "
    "pip: pip install ziglang), or name one in the environment variable CXX."
)


@dataclass(frozen=True)
class Variant:
    """An instruction-set variant: compiler flags (gcc and clang; zig), and the CPU features that must all be present."""

    name: str
    flags: tuple[str, ...]
    zig: tuple[str, ...]
    features: frozenset[str]

    @property
    def identifier(self) -> str:
        """The name as a C identifier."""
        return self.name.replace("-", "_")


_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "osxsave"})
_V4 = frozenset(
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512vbmi", "avx512_vbmi2"}
)
VARIANTS = {
    v.name: v
    for v in (
        Variant(
            "x86-64-v4", ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"),
            ("-mcpu=x86_64_v4+avx512vnni+avx512bf16+avx512vbmi+avx512vbmi2",), _V3 | _V4,
        ),
        Variant("x86-64-v3", ("-march=x86-64-v3",), ("-mcpu=x86_64_v3",), _V3),
        Variant("portable", (), ("-mcpu=baseline",), frozenset()),
    )
}  # fmt: skip
"""Every variant, best first."""


def default_variants() -> tuple[str, ...]:
    """The variants that a library for this kind of processor holds."""
    return tuple(VARIANTS) if platform.machine().lower() in ("x86_64", "amd64") else ("portable",)


@lru_cache(maxsize=1)
def machine_variants() -> tuple[str, ...]:
    """The variants that this machine can run, best first; only "portable" where the CPU's features cannot be read."""
    features: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                features = set(line.partition(":")[2].split()) | {"osxsave"}
                break
    features |= {"lzcnt"} if "abm" in features else set()
    return tuple(name for name in default_variants() if VARIANTS[name].features <= features)


def resolve_variants(variants: Sequence[str] | None) -> tuple[str, ...]:
    """Variant names in the order of preference; "native" is the best one of this machine, None all; CompileError if unknown."""
    if variants is None:
        return default_variants()
    wanted = {machine_variants()[0] if v == "native" else v for v in variants}
    if unknown := wanted - VARIANTS.keys():
        known = ", ".join(["native", *VARIANTS])
        raise CompileError(f"There is no instruction-set variant {sorted(unknown)[0]!r}. Known: {known}.")
    if not wanted:
        raise CompileError("No instruction-set variant was asked for: give at least one.")
    return tuple(name for name in VARIANTS if name in wanted)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that was seen to work: its command, its first line of --version, whether it is zig's."""

    command: tuple[str, ...]
    version: str
    zig: bool

    def flags(self, variant: Variant | None) -> tuple[str, ...]:
        """All flags for one variant, or for the dispatcher."""
        if variant is None:
            return (*FLAGS, *(VARIANTS["portable"].zig if self.zig else ()))
        special = variant.zig if self.zig else variant.flags
        return (*FLAGS, *special, f"-DSTEMMA_VARIANT={variant.identifier}", f'-DSTEMMA_VARIANT_NAME="{variant.name}"')


MACHINE = Path(__file__).with_name("machine")
_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


@lru_cache(maxsize=1)
def machine_source() -> str:
    """The decoding machine as one text: machine.cpp with its own headers in place of their includes."""
    included: set[str] = set()

    def text(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        content = (MACHINE / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: text(found[1]), content)

    return text("machine.cpp")


_PROBE = '#include <atomic>\n#include <cmath>\n#include <thread>\nextern "C" int stemma_probe() { return 1; }\n'


def find_compiler() -> Compiler:
    """The first of $CXX, g++, clang++ and the ziglang wheel that builds a shared library; CompileError naming the cures."""
    return _find(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@lru_cache(maxsize=8)
def _find(cxx: str, path: str) -> Compiler:
    tried: list[str] = []
    if cxx:
        command = tuple(shlex.split(cxx))
        compiler, problem = _check(command)
        if compiler is None:
            raise CompileError(f"The compiler named by CXX={cxx!r} does not work: {problem} Correct or unset CXX. {CURES}")
        return compiler
    candidates: list[tuple[str, ...]] = [(p,) for name in ("g++", "clang++") if (p := shutil.which(name, path=path))]
    if importlib.util.find_spec("ziglang") is not None:
        candidates.append((sys.executable, "-m", "ziglang", "c++"))
    for command in candidates:
        compiler, problem = _check(command)
        if compiler is not None:
            return compiler
        tried.append(f"{' '.join(command)}: {problem}")
    seen = "No C++ compiler was found" if not tried else f"No working C++ compiler was found ({'; '.join(tried)})"
    raise CompileError(f"{seen}; looked for $CXX, g++, clang++ and the ziglang package. {CURES}")


def _check(command: tuple[str, ...]) -> tuple[Compiler | None, str]:
    zig = command[-1:] == ("c++",) and ("ziglang" in command or Path(command[0]).name.startswith("zig"))
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
        if shown.returncode:
            return None, f"--version exits with {shown.returncode}."
        with tempfile.TemporaryDirectory(prefix="stemma-") as folder:
            source, output = Path(folder, "probe.cpp"), Path(folder, "probe.so")
            source.write_text(_PROBE)
            made = subprocess.run(
                [*command, "-std=c++20", "-fPIC", "-shared", "-pthread", "-o", str(output), str(source)],
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            if made.returncode or not output.exists():
                return None, f"it cannot build a small C++20 library: {_first_lines(made.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{error}."
    version = (shown.stdout or shown.stderr).splitlines()
    return Compiler(command, version[0] if version else "", zig), ""


def cache_folder() -> Path:
    """Where objects and libraries are kept: $STEMMA_CACHE, else $XDG_CACHE_HOME/stemma, else ~/.cache/stemma."""
    if given := os.environ.get("STEMMA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stemma"


class CpuToolchain:
    """Builds CPU libraries with an object cache that several processes may use at once (entries appear by renaming)."""

    def describe(self) -> str:
        """The compiler found and the variants that this machine runs; CompileError when there is no compiler."""
        return f"{find_compiler().version}; runs {', '.join(machine_variants())}"

    def build(self, source: str, variants: Sequence[str] | None, output: Path) -> Built:
        """Compile `source` for the variants (None: all) and link `output`.

        Raises CompileError when there is no compiler, when it rejects the source, or when the cache or output cannot be written.
        """
        started = time.perf_counter()
        names = resolve_variants(variants)
        compiler = find_compiler()
        declared = "".join(f" X({VARIANTS[n].identifier})" for n in names)
        units: list[tuple[Variant | None, tuple[str, ...]]] = [(None, (f"-DSTEMMA_VARIANTS={declared.strip()}",))]
        units += [(VARIANTS[n], ()) for n in reversed(names)]
        jobs = [
            Job(compiler, source, (*compiler.flags(v), *extra), f"the {v.name if v else 'dispatcher'} kernels")
            for v, extra in units
        ]
        jobs.insert(1, Job(compiler, machine_source(), (*compiler.flags(None), "-O2"), "the decoding machine"))
        library_key = _digest("library", *compiler.command, compiler.version, *(j.key for j in jobs))
        folder = cache_folder()
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            cached = folder / f"{library_key}.so"
            found = cached.exists()
            if not found:
                folder.mkdir(parents=True, exist_ok=True)
                objects = compile_all(jobs, folder)
                with _temporary(folder) as scratch:
                    made = scratch / "library.so"
                    command = [*compiler.command, "-shared", "-pthread", "-o", str(made), *map(str, objects)]
                    linked = subprocess.run(command, capture_output=True, text=True)
                    _finish(linked.returncode, linked.stderr, "linking the library", None)
                    os.replace(made, cached)
            shutil.copyfile(cached, output)
        except OSError as error:
            raise CompileError(
                f"The library cannot be written: {error}. Check the space and rights of {folder} (or set STEMMA_CACHE) and of "
                f"{output.parent}."
            ) from None
        return Built(output, names, time.perf_counter() - started, found)


@dataclass(frozen=True)
class Job:
    """One object to compile; `label` says what it holds."""

    compiler: Compiler
    source: str
    flags: tuple[str, ...]
    label: str

    @property
    def key(self) -> str:
        """Content hash of everything the object depends on."""
        return _digest(*self.compiler.command, self.compiler.version, *self.flags, self.source)


def compile_all(jobs: Sequence[Job], folder: Path) -> list[Path]:
    """The objects, in order, from the cache or compiled by as many processes as there are cores.

    Jobs start in the order given from the second on, the dispatcher (the first, the quickest) last.
    """
    paths = [folder / f"{job.key}.o" for job in jobs]
    waiting = [(job, path) for job, path in zip(jobs, paths, strict=True) if not path.exists()]
    waiting = waiting[1:] + waiting[:1]
    if not waiting:
        return paths
    with _temporary(folder) as scratch:
        running: list[tuple[Job, Path, Path, subprocess.Popen[bytes]]] = []
        try:
            while waiting or running:
                while waiting and len(running) < max(1, os.cpu_count() or 1):
                    job, path = waiting.pop(0)
                    made = scratch / f"{len(waiting)}.o"
                    source = made.with_suffix(".cpp")
                    source.write_text(job.source, encoding="utf-8")
                    command = [*job.compiler.command, *job.flags, "-c", str(source), "-o", str(made)]
                    with made.with_suffix(".txt").open("wb") as errors:
                        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
                    running.append((job, path, made, process))
                time.sleep(0.01)
                for entry in [r for r in running if r[3].poll() is not None]:
                    job, path, made, process = entry
                    running.remove(entry)
                    text = made.with_suffix(".txt").read_text(errors="replace")
                    _finish(process.returncode, text, job.label, made.with_suffix(".cpp"))
                    os.replace(made, path)
        finally:
            for _, _, _, process in running:
                process.kill()
                process.wait()
    return paths


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _finish(code: int, errors: str, what: str, source: Path | None) -> None:
    if code == 0:
        return
    kept = ""
    if source is not None:
        path = Path(tempfile.gettempdir()) / f"stemma-rejected-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.cpp"
        shutil.copyfile(source, path)
        kept = f" The source is kept in {path}."
    if code < 0:
        raise CompileError(f"The C++ compiler was stopped by signal {-code} at {what} (out of memory?).{kept}")
    raise CompileError(f"The C++ compiler failed at {what}: {_first_lines(errors)}{kept}")


def _first_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()] or text.strip().splitlines()
    return " | ".join(line[:300] for line in lines[:count]) or "(no message)"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
