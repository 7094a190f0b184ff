"""`stemma inspect model.stemma`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stemma.cli.output import console, handled, human_bytes, json_option, print_choices, show, table
from stemma.cli.quality import quality


@handled
def inspect_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, model.stemma.")],
    ir: Annotated[bool, typer.Option("--ir", help="Print the final IR.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print the launches: operations, barriers, who made them.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Print every packed weight.")] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Run one step and print each kernel's floor and measured time.")
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write everything into one HTML page.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="New tokens of the step that --roofline measures.")] = 1,
    context: Annotated[int | None, typer.Option(min=0, help="Cached tokens before them. Default: 128, at most what fits.")] = None,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Show what an artifact holds: sizes, passes with labels and measured losses, IR, launches, roofline."""
    from stemma.runtime import Artifact, InputError

    asked = {"--ir": ir, "--plan": plan, "--weights": weights, "--roofline": roofline, "--html": html is not None}
    if sum(asked.values()) > 1:
        raise InputError(f"Ask for one thing at a time, not {' and '.join(name for name, wanted in asked.items() if wanted)}.")
    with Artifact(model) as artifact:
        manifest: dict[str, Any] = dict(artifact.manifest.raw)
        text = artifact.read("ir.txt").decode()
    if html is not None:
        _write_page(html, manifest, model)
        show({"html": str(html)}, lambda: console.print(f"Wrote {html}.", markup=False))
    elif ir:
        show({"ir": text}, lambda: console.print(text, markup=False, end=""))
    elif plan:
        show(manifest["functions"], lambda: _plan(manifest))
    elif weights:
        show(manifest["weights"], lambda: _weights(manifest))
    elif roofline:
        _roofline(model, rows, context)
    else:
        show(manifest, lambda: _summary(model, manifest))


def _write_page(html: Path, manifest: dict[str, Any], model: Path) -> None:
    from stemma.cli.page import page
    from stemma.ir import StemmaError

    text = page(manifest, model.stat().st_size)
    try:
        html.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StemmaError(f"The page {html} cannot be written: {error.strerror}.") from None


def _summary(path: Path, manifest: dict[str, Any]) -> None:
    from stemma.runtime.manifest import parse_manifest

    console.print(
        f"{manifest['name']} ({manifest['kind']}), {human_bytes(path.stat().st_size)}, made by stemma {manifest['stemma']}",
        markup=False,
    )
    for target, entry in manifest["targets"].items():
        console.print(f"target {target}: {', '.join(entry['variants'])}", markup=False)
    for name, function in manifest["functions"].items():
        arguments = ", ".join(f"{t['name']}: {_type(t)}" for t in function["inputs"])
        results = ", ".join(f"{t['name']}: {_type(t)}" for t in function["results"])
        console.print(f"{name}({arguments}) -> {results}", markup=False)
        if function["states"]:
            first = function["states"][0]
            console.print(f"  {len(function['states'])} states such as {first['name']}: {_type(first)}", markup=False)
            types = " and ".join(dict.fromkeys(t["dtype"] for t in function["states"]))
            each = sum(t.nbytes({"slots": 1}) for t in parse_manifest(manifest).functions[name].states)
            console.print(f"  cache: {types}, {human_bytes(each)} per token", markup=False)
    by_type: dict[str, list[int]] = {}
    for tensor in manifest["weights"]["tensors"]:
        total = by_type.setdefault(tensor["dtype"], [0, 0])
        total[0] += 1
        total[1] += tensor["bytes"]
    table(("weights", "tensors", "bytes"), [(k, v[0], v[1]) for k, v in by_type.items()])
    passes = [
        (
            p["name"],
            p["label"],
            ", ".join(f"{k}={v}" for k, v in p["options"].items()),
            quality(p["loss"]) if p["label"] == "lossy" else "",
        )
        for p in manifest["passes"]
    ]
    table(("pass", "label", "options", "measured against the checkpoint"), passes)
    for p in manifest["passes"]:
        print_choices(p)
    _programs(manifest)


def _programs(manifest: dict[str, Any]) -> None:
    """The decoding programs, the models that they step, and what speculation needs."""
    from stemma.program_loss import program_quality

    for name, entry in manifest.get("further_models", {}).items():
        console.print(
            f"model {name}: {entry['source']['folder']}, preset {entry['preset']}, tokenizer {entry['tokenizer']}", markup=False
        )
    programs = manifest.get("programs", {})
    kept = {name: {*entry["results"], "output"} for name, entry in programs.items()}
    rows = [
        (
            name,
            entry.get("label", "") if entry.get("label") != "lossy" else f"lossy: {program_quality(entry.get('loss'))}",
            ", ".join(entry.get("models", ())),
            ", ".join(_option(p) for p in entry["params"] if p["name"] not in kept[name]),
            entry.get("doc", ""),
        )
        for name, entry in programs.items()
    ]
    if rows:
        table(("program", "label", "models", "takes", "what it does"), rows)
    speculated = [
        (name, s["draft"], s["nodes"], s["verify"], s["shape"], human_bytes(sum(s["bytes"].values())),
         ", ".join(f"{k} {human_bytes(v)}" for k, v in s["bytes"].items()))
        for name, s in ((name, entry.get("speculation")) for name, entry in programs.items()) if s
    ]  # fmt: skip
    if speculated:
        table(("speculated", "drafter", "nodes", "verify", "shape", "memory", "of which"), speculated)
    for reason in manifest.get("not_speculated", ()):
        console.print(f"not speculated: {reason}", markup=False)


def _option(parameter: dict[str, Any]) -> str:
    return f"{parameter['name']}={parameter['default']}" if "default" in parameter else str(parameter["name"])


def _type(tensor: dict[str, Any]) -> str:
    return f"{tensor['dtype']}[{', '.join(map(str, tensor['shape']))}]"


def _plan(manifest: dict[str, Any]) -> None:
    for name, function in manifest["functions"].items():
        rows = [
            (x["stage"], x["op"], x["what"], str(x["flops"]), str(x["bytes"]), x["by"], x["line"]) for x in function["launches"]
        ]
        table(("stage", "kernel", "how", "FLOP", "bytes", "by", "from"), rows, name)


def _weights(manifest: dict[str, Any]) -> None:
    rows = [
        (t["name"], t["dtype"], "x".join(map(str, t["shape"])), t["offset"], t["bytes"]) for t in manifest["weights"]["tensors"]
    ]
    table(("weight", "type", "shape", "offset", "bytes"), rows)


def _roofline(path: Path, rows: int, context: int | None) -> None:
    import stemma
    from stemma.cli.bench import print_roofline, roofline_data
    from stemma.runtime.roofline import measure_ceilings, roofline

    loaded = stemma.load(path)
    ceilings = measure_ceilings(loaded.device)
    context = max(0, min(128, loaded.context - rows)) if context is None else context
    step = roofline(loaded, ceilings, rows=rows, context=context)

    def text() -> None:
        units = ", ".join(
            f"{n} {v / 1e9:.0f} Gop/s" for n, v in (("f32", ceilings.f32), ("bf16", ceilings.bf16), ("int8", ceilings.int8)) if v
        )
        console.print(
            f"{loaded.threads} threads, {loaded.variant}: reads {ceilings.bandwidth / 1e9:.1f} GB/s, {units}", markup=False
        )
        print_roofline(step)

    show({"ceilings": vars(ceilings), **roofline_data(step)}, text)
