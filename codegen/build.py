"""The driver of code generation: a module and its weights become source, a library and an artifact."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stemma.backends import registry
from stemma.backends.base import Backend, Built
from stemma.codegen import pack
from stemma.codegen.artifact import Member, Stream, write_artifact
from stemma.codegen.emit import emit, function_table
from stemma.codegen.join import join
from stemma.codegen.legalize import Offers, legalize
from stemma.codegen.program import MEMBER, lower_programs, models_of, program_table, programs_of, without_programs
from stemma.codegen.schedule import Packed, Schedule, Weights, schedule
from stemma.ir import CompileError, Module, WeightStore, print_module

FORMAT, ABI = 2, 2
WEIGHTS = "weights.bin"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Program:
    """A module made ready for one backend: schedules, packed weights and their places, source text."""

    backend: Backend
    schedules: tuple[Schedule, ...]
    table: tuple[Packed, ...]
    layout: pack.Layout
    source: str


@dataclass(frozen=True)
class BuildReport:
    """What a build made. bytes: size of the artifact; seconds by stage; launches by function."""

    path: Path
    bytes: int
    weight_bytes: int
    seconds: Mapping[str, float]
    variants: tuple[str, ...]
    launches: Mapping[str, int]
    library_cached: bool


def program(module: Module, backend: Backend, title: str = "") -> Program:
    """Legalize, schedule, plan and emit. CompileError names every operation that the backend cannot run."""
    offers = Offers(backend)
    functions = legalize(tuple(join(join(f, offers), offers) for f in module), offers)
    weights = Weights(offers)
    schedules = tuple(schedule(f, offers, weights) for f in functions)
    layout = pack.place(weights.table)
    emitted = emit(schedules, layout.offsets, backend, title or str(module.properties.get("name", "module")))
    return Program(backend, schedules, weights.table, layout, emitted.source)


def build(
    module: Module,
    weights: WeightStore,
    output: str | Path,
    *,
    targets: Sequence[str] = ("cpu",),
    variants: Sequence[str] | None = None,
    extra_files: Mapping[str, bytes | Path] | Sequence[Path] = (),
    manifest_extra: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Write the artifact `output`: kernels for each target, packed weights, final IR, manifest.

    variants: instruction sets of the CPU library ("native": the best of this machine); default all. extra_files: further members,
    as bytes or as files to copy (a list of files keeps their names). manifest_extra: entries to add to the manifest, such as
    passes, loss, source. The library is compiled while weights are packed. Raises CompileError and CheckpointError; `output` is
    then left as it was.
    """
    report = progress or (lambda stage, done, total: None)
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    backend = target_backend(targets)
    report("generating code", 0, 1)
    made = program(without_programs(module), backend, f"{module.properties.get('name', Path(output).stem)}")
    extra = extra_files if isinstance(extra_files, Mapping) else {path.name: path for path in extra_files}
    seconds["generate"] = time.perf_counter() - started
    manifest = _manifest(module, made, Path(output).stem, manifest_extra or {})
    if manifest["models"]:
        blob = lower_programs(programs_of(module), models_of(module), manifest["functions"], weights)
        extra = {MEMBER: blob, **extra}
    toolchain = backend.toolchain
    if toolchain is None:
        raise CompileError(f"The backend {backend.name} builds no library, so no artifact can be written for it.")
    with tempfile.TemporaryDirectory(prefix="stemma-") as folder, ThreadPoolExecutor(1) as background:
        library = background.submit(toolchain.build, made.source, variants, Path(folder) / "kernels.so")
        members = _members(module, weights, made, library, manifest, extra, report, seconds)
        write_artifact(output, manifest, members)
        built = library.result()
    seconds["total"] = time.perf_counter() - started
    seconds["library"] = built.seconds
    return BuildReport(
        Path(output), Path(output).stat().st_size, made.layout.total, seconds, built.variants,
        {s.function.name: len(s.launches) for s in made.schedules}, built.cached,
    )  # fmt: skip


def target_backend(targets: Sequence[str]) -> Backend:
    """The one backend that is named; CompileError when it builds no artifacts, or not exactly one is named."""
    known = [name for name in registry.names() if registry.get(name).toolchain is not None]
    for name in targets:
        if name not in known:
            raise CompileError(f"Artifacts cannot be built for the target {name!r}; targets that can: {', '.join(known)}.")
    if len(set(targets)) != 1:
        raise CompileError(f"Exactly one target is needed, given: {', '.join(targets) or 'none'}.")
    return registry.get(targets[0])


def _members(
    module: Module,
    weights: WeightStore,
    made: Program,
    library: Future[Built],
    manifest: dict[str, Any],
    extra: Mapping[str, bytes | Path],
    report: Progress,
    seconds: dict[str, float],
) -> Iterator[Member]:
    """The members in the order they are written; the library last, as it is compiled meanwhile."""
    target = f"targets/{made.backend.name}"
    yield "ir.txt", print_module(module, f"final, for {made.backend.name}").encode()
    yield f"{target}/source.cpp", made.source.encode()
    for name, content in extra.items():
        yield name, content.read_bytes() if isinstance(content, Path) else content
    started = time.perf_counter()

    def chunks() -> Iterator[bytes | memoryview]:
        for chunk in pack.stream(made.table, made.layout, weights, lambda done, total: report("packing weights", done, total)):
            if library.done():
                library.result()  # a compiler's error ends the work at once
            yield chunk

    yield WEIGHTS, Stream(made.layout.total, chunks())
    seconds["pack"] = time.perf_counter() - started
    report("compiling kernels", 0, 1)
    built = library.result()
    report("compiling kernels", 1, 1)
    manifest["targets"] = {made.backend.name: {"library": f"{target}/kernels.so", "variants": list(built.variants)}}
    yield f"{target}/kernels.so", built.path.read_bytes()


def _manifest(module: Module, made: Program, name: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    properties = dict(module.properties)
    functions = {s.function.name: function_table(s, i) for i, s in enumerate(made.schedules)}
    manifest: dict[str, Any] = {
        "format": FORMAT, "abi": ABI, "stemma": _version(), "kind": properties.get("kind", "model"),
        "name": properties.get("name", name), "targets": {}, "functions": functions, "passes": [], "loss": None, "source": {},
    }  # fmt: skip
    if manifest["kind"] == "causal_lm":
        rows = [d for d in functions.get("step", {}).get("dims", []) if d["name"] == "rows"]
        manifest["limits"] = {"context": properties.get("context", 0), "rows": rows[0]["hi"] if rows else 0}
        eos = properties.get("eos", ())
        manifest["vocab"] = properties.get("vocab")
        manifest["eos"] = list(eos) if isinstance(eos, tuple) else [eos] if eos is not None else []
        manifest["bos"] = properties.get("bos")
    manifest["models"] = [asdict(m) for m in models_of(module)]
    manifest["programs"] = {p.function.name: program_table(p) for p in programs_of(module)}
    manifest["weights"] = {"member": WEIGHTS, "bytes": made.layout.total, "sha256": "", "tensors": weight_table(made)}
    return manifest | dict(extra)


def weight_table(made: Program) -> list[dict[str, Any]]:
    """Name, element type, shape, layout, offset and bytes of every packed weight."""
    return [
        {"name": p.buffer.name, "dtype": p.node.dtype, "shape": list(p.node.shape), "layout": p.layout, "offset": offset,
         "bytes": p.bytes}
        for p, offset in zip(made.table, made.layout.offsets, strict=True)
    ]  # fmt: skip


def _version() -> str:
    try:
        return version("stemma-compiler")
    except PackageNotFoundError:
        return "0+checkout"
