"""Code generation end to end on the CPU: hand-built programs in one library, compared with the float64 interpreter."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from stemma.backends import registry
from stemma.backends.cpu.toolchain import CpuToolchain, default_variants, machine_variants, resolve_variants
from stemma.codegen import pack
from stemma.codegen.build import build, program
from stemma.codegen.execute import Native, executable
from stemma.ir import (
    Array,
    CheckpointError,
    CompileError,
    Function,
    Module,
    Node,
    Tensor,
    WeightStore,
    dim,
    interpret,
    ops,
    parse_module,
    quantize_array,
)
from stemma.ir.types import round_bf16, widen_bf16
from stemma.passes.base import PassContext
from stemma.passes.fuse import Fuse, JoinLinears
from stemma.passes.incremental import Incremental
from tests.programs import tiny_lm
from tests.test_plan import graph

ROWS, BATCH, TIME = dim("rows", 1, 700), dim("batch", 1, 8), dim("time", 1, 300)
VARIANTS = list(dict.fromkeys([machine_variants()[0], "portable"]))
STORE = WeightStore()


def weight(name: str, *shape: int, dtype: str = "f32") -> Node:
    """A seeded random weight, registered once in the shared store."""
    if name not in STORE:
        values = (np.random.default_rng(len(STORE)).standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        bits = round_bf16(values)
        if dtype == "bf16":
            STORE.add(name, Tensor(dtype, shape), lambda: widen_bf16(bits), lambda: bits)
        else:
            STORE.add(name, Tensor(dtype, shape), lambda: values, lambda: values)
    node: Node = ops.weight(name=name, type=Tensor(dtype, shape))
    return node


def param(name: str, dtype: str, *shape: Any) -> Node:
    node: Node = ops.param(name=name, type=Tensor(dtype, shape))
    return node


def regions(inputs: list[Node], build: Any) -> list[Node]:
    """`fused` around what `build` makes of the inputs, by result."""
    params = [param(f"a{i}", n.dtype, *n.shape) for i, n in enumerate(inputs)]
    made = build(*params)
    results = made if isinstance(made, tuple) else (made,)
    node = ops.fused(*inputs, body=Function("", params, [(f"r{i}", r) for i, r in enumerate(results)]))
    return [ops.get(node, index=i) for i in range(len(results))] if len(results) > 1 else [node]


def region(inputs: list[Node], build: Any) -> Node:
    """`fused` with one result."""
    return regions(inputs, build)[0]


def mlp(name: str, kind: str) -> Function:
    """x -> gelu(linear + bias) -> linear + residual, with weights of one storage type."""
    x = param("x", "f32", ROWS, 64)

    def stored(label: str, *shape: int) -> Node:
        if kind in ("f32", "bf16"):
            return weight(f"{name}.{label}", *shape, dtype=kind)
        return ops.quantize(weight(f"{name}.{label}", *shape), dtype=kind)

    bias = weight(f"{name}.bias", 160)
    h = region([x, stored("up", 160, 64), bias], lambda a, w, b: ops.gelu(ops.linear(a, w, b), approximate="tanh"))
    y = region([h, stored("down", 64, 160), x], lambda a, w, r: ops.add(ops.linear(a, w), r))
    return Function(name, [x], {"y": y})


def gated() -> Function:
    """A joined gate and up product, split and multiplied: one kernel; then 8-bit activations into an int8 weight."""
    x = param("x", "f32", ROWS, 64)
    both = ops.concat(weight("gated.gate", 96, 64), weight("gated.up", 96, 64), axis=0)
    h = region(
        [ops.linear(x, both)],
        lambda a: ops.gated(ops.slice(a, axis=1, start=0, stop=96), ops.slice(a, axis=1, start=96, stop=192), activation="silu"),
    )
    y = ops.linear(ops.quantize(h, dtype="q8_g32"), ops.quantize(weight("gated.down", 70, 96), dtype="int8"))
    z = ops.linear(ops.cast(x, dtype="bf16"), weight("gated.low", 40, 64, dtype="bf16"))
    total, normed = regions([x, x, weight("gated.norm", 64)], lambda a, b, w: (ops.add(a, b), ops.rms_norm(a + b, w, eps=1e-6)))
    q = ops.linear(ops.quantize(normed, dtype="q8_g64"), ops.quantize(weight("gated.q", 48, 64), dtype="int4_g64"))
    layer = ops.layer_norm(x, weight("gated.a", 64), weight("gated.b", 64), eps=1e-5)
    b = ops.linear(ops.cast(layer, dtype="bf16"), weight("gated.low", 40, 64, dtype="bf16"))
    return Function("gated", [x], {"y": y, "h": h, "z": z, "total": total, "q": q, "b": b})


def norms() -> Function:
    """Norms alone and after a residual addition, rows of odd length included."""
    x, r, odd = param("x", "f32", ROWS, 96), param("r", "f32", ROWS, 96), param("odd", "f32", ROWS, 37)
    total, normed = regions(
        [x, r, weight("norms.a", 96)], lambda a, b, w: (ops.add(a, b), ops.rms_norm(ops.add(a, b), w, eps=1e-6))
    )
    layer = ops.layer_norm(total, weight("norms.b", 96), weight("norms.c", 96), eps=1e-5)
    results = {"sum": total, "rms": normed, "layer": layer, "odd": ops.rms_norm(odd, eps=1e-5), "soft": ops.softmax(odd, axis=1)}
    return Function("norms", [x, r, odd], results)


def tied() -> Function:
    """An embedding and a head that share one bf16 table; the table is stored once."""
    ids = param("ids", "i64", BATCH, TIME)
    table = weight("tied.table", 90, 64, dtype="bf16")
    h = ops.embedding(table, ids) * 3.0
    return Function("tied", [ids], {"logits": ops.linear(ops.rms_norm(h, weight("tied.norm", 64), eps=1e-6), table)})


def encoder() -> Function:
    """Attention with grouped heads and a mask, and without both."""
    x = param("x", "f32", BATCH, TIME, 64)
    mask = param("mask", "bool", BATCH, 1, 1, TIME)

    def heads(a: Node, n: int) -> Node:
        return ops.transpose(ops.reshape(a, shape=(BATCH, TIME, n, 16)), axes=(0, 2, 1, 3))

    q, k, v = (heads(ops.linear(x, weight(f"encoder.{n}", 16 * c, 64)), c) for n, c in (("q", 4), ("k", 2), ("v", 2)))
    masked = ops.attention(q, k, v, mask, causal=False, scale=0.25)
    causal = ops.attention(q, k, v, causal=True, window=9, scale=0.25, softcap=20.0)
    return Function("encoder", [x, mask], {"masked": masked, "causal": causal})


@lru_cache(maxsize=1)
def step() -> Module:
    """The decode step of a small model, derived and fused by the passes, as the compiler does it."""
    module, weights = tiny_lm(hidden=32, inner=64, layers=2)
    for name, values in weights.items():
        if name not in STORE:
            STORE.add(name, Tensor("f32", values.shape), lambda v=values: v, lambda v=values: v)  # type: ignore[misc]
    for one in (Incremental(rows=64), JoinLinears(), Fuse()):
        module = one.run(module, PassContext())
    return module


PROGRAMS = [
    [("scatter", 2, 0), ("exp", 2, 0), ("scatter", 3, 1), ("add", 4, 5)],
    [("exp", 2, 2), ("scatter", 2, 3), ("mul", 4, 2), ("scatter", 4, 0), ("softmax", 6, 0), ("add", 6, 7)],
    [("scatter", 0, 1), ("scatter", 3, 2), ("transpose", 4, 0), ("reduce_sum", 5, 3), ("scatter", 2, 5), ("add", 7, 6)],
]


@lru_cache(maxsize=1)
def whole() -> Module:
    """Every program of this file, compiled into one library."""
    random = [graph(p).with_results(zip(graph(p).result_names, graph(p).results)) for p in PROGRAMS]
    renamed = [Function(f"random{i}", f.params, zip(f.result_names, f.results)) for i, f in enumerate(random)]
    kinds = ("f32", "bf16", "int8", "int4_g32")
    functions = [*(mlp(f"mlp_{k}", k) for k in kinds), gated(), norms(), tied(), encoder(), *renamed, *step()]
    return Module(functions, {"kind": "model"})


@pytest.fixture(scope="module", params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Native:
    """The library of this file, for one instruction-set variant."""
    made = executable(whole(), STORE, variants=(request.param,), threads=2)
    assert isinstance(made, Native)
    return made


def compare(native: Native, name: str, inputs: Mapping[str, Array], tolerance: float = 1e-5) -> None:
    """Every result within a relative L2 distance of the interpreter's, on the values that were stored."""
    found = native.call(name, inputs)
    expected = interpret(whole()[name], inputs, STORE)
    for key, value in expected.items():
        assert found[key].shape == value.shape
        error = float(np.linalg.norm((found[key] - value).ravel())) / max(1e-30, float(np.linalg.norm(value.ravel())))
        assert error <= tolerance, f"{name}.{key}: relative error {error:.3g} of {value.shape}"


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "int4_g32"])
@pytest.mark.parametrize("rows", [1, 2, 65, 300])
def test_mlp(native: Native, kind: str, rows: int) -> None:
    compare(native, f"mlp_{kind}", {"x": normal(rows, 64)})


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_gated_pair_and_rounded_activations(native: Native, rows: int) -> None:
    compare(native, "gated", {"x": normal(rows, 64)}, tolerance=2e-4)  # a code of an activation may round the other way


@pytest.mark.parametrize("rows", [1, 64, 257])
def test_norms(native: Native, rows: int) -> None:
    compare(native, "norms", {"x": normal(rows, 96), "r": normal(rows, 96, seed=1), "odd": normal(rows, 37, seed=2)})


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 131)])
def test_tied_embedding(native: Native, shape: tuple[int, int]) -> None:
    compare(native, "tied", {"ids": np.random.default_rng(0).integers(0, 90, shape)})


@pytest.mark.parametrize("shape", [(1, 1), (2, 13), (1, 150)])
def test_encoder(native: Native, shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(3).random((shape[0], 1, 1, shape[1])) < 0.7
    mask[..., 0] = True
    compare(native, "encoder", {"x": normal(*shape, 64), "mask": mask})


@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_updates_in_place_and_copies(native: Native, index: int) -> None:
    inputs = {"x": normal(9, 8), "y": normal(9, 8, seed=1), "s": normal(9, 8, seed=2), "indices": np.array([4, 0, 7], np.int32)}
    compare(native, f"random{index}", inputs)


def decode_inputs(rows: int, done: int, outputs: list[int]) -> dict[str, Array]:
    """Rows done .. done+rows-1 of one sequence, in slots that are not in order."""
    slots = np.random.default_rng(5).permutation(40).astype(np.int32)
    tokens = np.random.default_rng(done).integers(0, 50, rows).astype(np.int32)
    return {
        "tokens": tokens, "positions": np.arange(done, done + rows, dtype=np.int32),
        "slots": slots[done : done + rows], "sequence": np.zeros(rows, np.int32), "table": slots[None, :30],
        "selected": np.array(outputs, np.int32),
    }  # fmt: skip


def test_step_with_caches(native: Native) -> None:
    """A prompt of 6, then one token, the caches carried along."""
    names = [p.attrs["name"] for p in step()["step"].params if "cache" in p.attrs["name"]]
    caches = {n: np.zeros((2, 40, 8), np.float32) for n in names}
    for rows, done, outputs in ((6, 0, [5]), (1, 6, [0])):
        inputs = decode_inputs(rows, done, outputs) | caches
        compare(native, "step", inputs)
        caches = {n: v for n, v in native.call("step", inputs).items() if n in caches}


def test_rows_do_not_depend_on_each_other_nor_on_threads(native: Native) -> None:
    x = normal(130, 64)
    alone = Native(native.program, STORE, (native.device.variant,), threads=1)
    for kind in ("f32", "bf16", "int8", "int4_g32"):
        every = native.call(f"mlp_{kind}", {"x": x})["y"]
        assert np.array_equal(alone.call(f"mlp_{kind}", {"x": x})["y"], every)
        for row in (0, 63, 129):
            assert np.array_equal(native.call(f"mlp_{kind}", {"x": x[row : row + 1]})["y"][0], every[row])


def test_sizes_out_of_range_are_refused(native: Native) -> None:
    from stemma.runtime.errors import StemmaRuntimeError

    index = [s.function.name for s in native.program.schedules].index("norms")
    launch = native.device.launch(index, 1, 8)
    with pytest.raises(StemmaRuntimeError, match="refuses the sizes"):
        launch.resize([701])
    with pytest.raises(StemmaRuntimeError, match="refuses the sizes"):
        native.device.launch(99, 1, 1).resize([1])


def test_profile_times_every_launch(native: Native) -> None:
    times = native.profile("norms", {"x": normal(4, 96), "r": normal(4, 96), "odd": normal(4, 37)})
    launches = next(s.launches for s in native.program.schedules if s.function.name == "norms")
    assert len(times) == len(launches) and (times > 0).all() and times.sum() < 1e9


def test_an_artifact_is_written_and_runs(tmp_path: Any) -> None:
    import stemma.runtime.model

    function = mlp("mlp_f32", "f32")
    module = Module([Function("forward", function.params, {"y": function.results[0]})], {"kind": "model", "name": "small"})
    seen: list[str] = []
    report = build(
        module, STORE, tmp_path / "small.stemma", variants=("native",), extra_files={"notes.txt": b"hello"},
        manifest_extra={"source": {"folder": "none"}}, progress=lambda stage, done, total: seen.append(stage),
    )  # fmt: skip
    assert report.bytes == (tmp_path / "small.stemma").stat().st_size and report.launches == {"forward": 2}
    assert {"generating code", "packing weights", "compiling kernels"} <= set(seen)
    with zipfile.ZipFile(tmp_path / "small.stemma") as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert parse_module(archive.read("ir.txt").decode()) is module
        assert archive.read("notes.txt") == b"hello"
    launches = manifest["functions"]["forward"]["launches"]
    assert [x["op"] for x in launches] == ["linear gelu", "linear add"] and launches[0]["flops"] == "20640*rows"
    x = normal(5, 64)
    found = stemma.runtime.model.load(tmp_path / "small.stemma").forward(x)
    value = found["y"] if isinstance(found, Mapping) else found
    expected = interpret(module["forward"], {"x": x}, STORE)["y"]
    assert np.linalg.norm(value - expected) <= 1e-5 * np.linalg.norm(expected)


# ---- scheduling and packing, nothing compiled ------------------------------------------------------------------------


@pytest.mark.quick
def test_templates_are_claimed_and_generated_kernels_shared() -> None:
    made = program(whole(), registry.get("cpu"))
    kernels = {
        s.function.name: [x.kernel.name.rpartition("_")[0] if x.kernel else "copy" for x in s.launches] for s in made.schedules
    }
    assert kernels["mlp_bf16"] == ["linear", "linear"]
    assert sorted(kernels["gated"]) == ["linear"] * 5 + ["norm"] * 2 + ["quantize_rows"] * 2
    assert kernels["tied"][-2:] == ["norm", "linear"] and "embedding" in kernels["tied"]
    assert kernels["encoder"].count("attention") == 2
    assert kernels["step"].count("attention") == 2 and "copy" not in kernels["step"]
    names = [x.kernel.name for s in made.schedules if s.function.name == "step" for x in s.launches if x.kernel]
    assert len(set(names)) < len(names)  # equal kernels of different layers are one
    assert made.source.count(f"static void {names[-1]}(") == 1


@pytest.mark.quick
def test_the_source_is_deterministic_and_says_where_launches_come_from() -> None:
    first, second = (program(Module([norms(), tied()]), registry.get("cpu")).source for _ in range(2))
    assert first == second
    assert "// ======== norms(rows)" in first and re.search(r"// 0: .*add rms_norm \(with residual\)", first)


@pytest.mark.quick
def test_a_table_shared_by_embedding_and_head_is_stored_once() -> None:
    made = program(Module([tied()]), registry.get("cpu"))
    assert [(p.buffer.name, p.layout) for p in made.table if p.buffer.name == "tied.table"] == [("tied.table", "panel")]


@pytest.mark.quick
def test_the_null_backend_renders_everything_and_runs_nothing() -> None:
    null = registry.get("null")
    module = Module([mlp("mlp_f32", "f32"), norms(), tied(), encoder(), *step()])
    made = program(module, null)
    assert "linear" in made.source and made.source.count("static void") >= 10
    with pytest.raises(CompileError, match="runs none"):
        executable(module, STORE, "null")


@pytest.mark.quick
def test_the_reference_backend_interprets() -> None:
    inputs = {"x": normal(2, 96), "r": normal(2, 96), "odd": normal(2, 37)}
    found = executable(Module([norms()]), STORE, "reference").call("norms", inputs)
    assert np.allclose(found["soft"].sum(1), 1)


@pytest.mark.quick
def test_an_operation_without_kernel_is_an_error_that_lists_it() -> None:
    x = param("x", "f32", 4, 32)
    v = param("v", "f32", 4, 32)
    body = Function("", [v], {"again": ops.gt(ops.reduce_sum(v, axes=(0, 1)), 3.0), "v": v * 0.5})
    module = Module([Function("f", [x], {"y": ops.get(ops.loop(x, body=body), index=0)})])
    with pytest.raises(CompileError, match=r"has no kernel for 1 operation.*loop"):
        program(module, registry.get("cpu"))


@pytest.mark.quick
def test_an_unknown_backend_and_target_are_errors() -> None:
    with pytest.raises(CompileError, match="no backend 'gpu'"):
        registry.get("gpu")


def blob(made: Any) -> bytes:
    return b"".join(bytes(c) for c in pack.stream(made.table, made.layout, STORE))


@pytest.mark.quick
def test_packing_by_rows_equals_packing_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(Module([mlp("mlp_int4_g32", "int4_g32"), mlp("mlp_bf16", "bf16"), gated()]), registry.get("cpu"))
    whole_blob = blob(made)
    monkeypatch.setattr(pack, "BLOCK", 1)
    assert blob(made) == whole_blob and len(whole_blob) == made.layout.total
    monkeypatch.setattr(STORE, "_raw", {})  # no stored elements: everything is loaded whole
    assert blob(made) == whole_blob


@pytest.mark.quick
def test_packed_weights_read_back() -> None:
    from stemma.backends.cpu.formats import unpack_linear

    made = program(Module([mlp("mlp_int4_g32", "int4_g32")]), registry.get("cpu"))
    data = np.frombuffer(blob(made), np.uint8)
    packed, offset = next((p, o) for p, o in zip(made.table, made.layout.offsets) if p.node.shape == (160, 64))
    found = unpack_linear(data[offset : offset + packed.bytes], 160, 64, "int4_g32")
    expected = quantize_array(STORE("mlp_int4_g32.up"), "int4_g32")
    assert np.array_equal(found.codes, expected.codes) and np.array_equal(found.scales, expected.scales)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_weight_with_nan_is_named(dtype: str) -> None:
    store = WeightStore()
    values = normal(64, 64)
    values[3, 5] = np.nan
    stored = round_bf16(values) if dtype == "bf16" else values
    store.add("broken", Tensor(dtype, (64, 64)), lambda: values, lambda: stored)
    x = param("x", "f32", ROWS, 64)
    module = Module([Function("f", [x], {"y": ops.linear(x, ops.weight(name="broken", type=Tensor(dtype, (64, 64))))})])
    made = program(module, registry.get("cpu"))
    with pytest.raises(CheckpointError, match="'broken' holds NaN"):
        list(pack.stream(made.table, made.layout, store))


# ---- the toolchain -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_no_compiler_is_an_error_that_names_the_cures(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"No C\+\+ compiler was found.*apt install g\+\+.*pip install ziglang.*CXX"):
        CpuToolchain().build("int x;", ("portable",), tmp_path / "x.so")


@pytest.mark.quick
def test_a_wrong_cxx_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for wrong in ("/nonexistent/compiler", "false"):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(CompileError, match=f"CXX='{wrong}' does not work"):
            CpuToolchain().build("int x;", ("portable",), tmp_path / "x.so")


@pytest.mark.quick
def test_a_rejected_source_shows_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("STEMMA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CompileError, match="failed at the .* kernels: .*no_such_type.*The source is kept in"):
        CpuToolchain().build("#if defined(STEMMA_VARIANT)\nno_such_type x;\n#endif\n", ("portable",), tmp_path / "x.so")
    assert not list((tmp_path / "cache").glob("build-*")) and not (tmp_path / "x.so").exists()


@pytest.mark.quick
def test_an_unwritable_cache_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEMMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(CompileError, match="The library cannot be written.*STEMMA_CACHE"):
        CpuToolchain().build("int x;", ("portable",), tmp_path / "x.so")


@pytest.mark.quick
def test_libraries_are_cached_by_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("STEMMA_CACHE", str(tmp_path / "cache"))
    source = 'extern "C" int answer() { return 42; }\n'.replace("extern", "#if !defined(STEMMA_VARIANT)\nextern") + "#endif\n"
    first = CpuToolchain().build(source, ("portable",), tmp_path / "a.so")
    again = CpuToolchain().build(source, ("portable",), tmp_path / "b.so")
    other = CpuToolchain().build(source.replace("42", "43"), ("portable",), tmp_path / "c.so")
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert (tmp_path / "a.so").read_bytes() == (tmp_path / "b.so").read_bytes() != (tmp_path / "c.so").read_bytes()


@pytest.mark.quick
def test_variant_names() -> None:
    assert resolve_variants(None) == default_variants() and resolve_variants(("native",)) == (machine_variants()[0],)
    assert resolve_variants(("portable", "x86-64-v4")) == ("x86-64-v4", "portable")
    with pytest.raises(CompileError, match="no instruction-set variant 'avx10'"):
        resolve_variants(("avx10",))
    with pytest.raises(CompileError, match="at least one"):
        resolve_variants(())
