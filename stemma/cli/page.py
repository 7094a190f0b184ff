"""The report page of an artifact: one self-contained HTML file, made from its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from stemma.cli.output import human_bytes
from stemma.cli.quality import quality

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
body { color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; width: 100% }
th, td { text-align: left; padding: .25rem .6rem; vertical-align: top }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums }
code { font-size: 13px } .lossy { color: #a40000; font-weight: 600 } .identical { color: #1a6b1a }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } td { border-color: #333 }
  .lossy { color: #ff8a80 } .identical { color: #8fd18f }
}
"""


def page(manifest: Mapping[str, Any], size: int) -> str:
    """The page for an artifact of `size` bytes."""
    parts = [f"<h1>{escape(manifest['name'])}</h1>", f"<p>{_summary(manifest, size)}</p>"]
    loss = manifest.get("loss")
    verdict = (
        f"<span class=lossy>lossy</span>: {escape(quality(loss))}"
        if loss
        else "<span class=identical>identical</span> to the checkpoint"
    )
    parts.append(f"<p>Results are {verdict}.</p>")
    passes = [
        (p["name"], _label(p["label"]), ", ".join(f"{k}={v}" for k, v in p["options"].items()),
         f"{p['seconds'] * 1e3:.0f}", quality(p["loss"]) if p["label"] == "lossy" else "")
        for p in manifest["passes"]
    ]  # fmt: skip
    parts += [
        "<h2>Passes</h2>",
        _table(("pass", "label", "options", "ms", "measured against the checkpoint"), passes, html={1}, numbers={3}),
    ]
    programs = [
        (name, _label(p.get("label", "")), ", ".join(p.get("models", ())), _names(p["params"]),
         (p.get("speculation") or {}).get("draft", ""), p.get("doc", ""))
        for name, p in manifest["programs"].items()
    ]  # fmt: skip
    if programs:
        parts += ["<h2>Programs</h2>", _table(("program", "label", "models", "takes", "drafter", "what"), programs, html={1})]
    for name, function in manifest["functions"].items():
        rows = [(x["stage"], x["op"], x["what"], x["flops"], x["bytes"], x["line"]) for x in function["launches"]]
        parts += [f"<h2>{escape(name)}: {len(rows)} launches</h2>"]
        parts.append(_table(("stage", "kernel", "how", "FLOP", "bytes", "from"), rows, numbers={0}))
    weights = [(t["name"], t["dtype"], "x".join(map(str, t["shape"])), f"{t['bytes']:,}") for t in manifest["weights"]["tensors"]]
    parts += ["<h2>Weights</h2>", _table(("weight", "type", "shape", "bytes"), weights, numbers={3})]
    title = f"<title>{escape(manifest['name'])}</title>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style><body>{"".join(parts)}</body></html>\n'
    )


def _label(label: object) -> str:
    text = escape(str(label))
    return f'<span class="{text}">{text}</span>'


def _names(parameters: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(p["name"] for p in parameters)


def _summary(manifest: Mapping[str, Any], size: int) -> str:
    targets = "; ".join(f"{name}: {', '.join(entry['variants'])}" for name, entry in manifest["targets"].items())
    return escape(f"{manifest['kind']}, {human_bytes(size)}, made by stemma {manifest['stemma']}; {targets}")


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], html: set[int] | None = None, numbers: set[int] | None = None
) -> str:
    def cell(index: int, value: object) -> str:
        kind = " class=n" if index in (numbers or ()) else ""
        return f"<td{kind}>{value if index in (html or ()) else escape(str(value))}</td>"

    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(cell(i, v) for i, v in enumerate(row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
