"""report.html: one file with everything a reader needs. It loads nothing, and is light or dark as the reader is."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from . import compare, goals, numbers, studies, table
from .compare import Comparison
from .group import AFTER, OURS
from .results import SCHEMA, Row
from .style import CSS

if TYPE_CHECKING:
    from .plots import Plot

_SUITES = {
    "model": (
        "Models",
        "The trained MiniLM-L6 on real English sentences, or models with random weights, before and after "
        "<code>macaron_ops.replace_layers</code>.",
    ),
    "layers": (
        "Layers: Lie-Trotter against Strang",
        "One pre-norm encoder layer at equal parameters. Lie-Trotter: attention, then one FFN of width F. "
        "Strang (Macaron): half a step of an FFN of width F/2, attention, half a step of another.",
    ),
    "ops": ("Operators", "Each operator against its eager form and its bare matrix products."),
    "schemes": (
        "Splitting schemes",
        "One step of each scheme, all stages with one attention and one FFN of full width, fused against eager.",
    ),
    "sphere": (
        "Particles on the sphere",
        "Rows of the phase diagram of clustering (32 particles on the circle, one beta, many starts); steps of many.",
    ),
    "ngpt": (
        "nGPT: what the sphere costs",
        "One causal layer of nGPT beside a pre-norm (rms) layer with the same matrices, rotary positions and swiglu; "
        "speeds are over our own pre-norm layer.",
    ),
}

_METHOD = """
<p>Every variant is checked before it is timed: the output and every gradient against float64, with no more than
twice the error of eager PyTorch in the same dtype plus one unit in the last place (torch.compile, which is not ours:
half of the dtype's digits). A variant that fails has no time.</p>
<p>Variants of a table run interleaved, one sample of each in a round, each round starting with another variant.
Times are medians with the 20th and 80th percentiles. A speed is the median over the rounds of <em>the denominator's
time divided by this variant's time</em>, so 1.10x is faster than the denominator and 0.90x is slower; it is green
or red when the 20th to 80th percentiles lie on one side of 1, grey when they do not.</p>
<p>On a GPU, times are those of CUDA graph replays where all variants of a table could be captured, else of launches
from Python between two CUDA events; the other of the two is in <code>results.json</code>. <em>ffn_step</em> and the
row kernels have other copies of their tensors at each call there, three times the L2 cache together.</p>
<p>TFLOP/s counts the matrix products that the layer needs (backward twice the forward), not what an implementation
recomputes. <em>of ceiling</em> divides it by the rate of a large square matrix product in the same dtype, measured in
this run; of row kernels it is the share of the copy bandwidth, counting what must be read or written once. <em>bare
products</em> are the layer's own matrix products with nothing between them; <em>of products</em> is their time divided
by this variant's: 100% where everything else is free.</p>
<p><em>peak MiB</em> is the high-water mark of torch's allocator during one call above its inputs and parameters;
<em>activ. MiB</em> is the same without what the call returns, its output and gradients; <em>kept MiB</em> is what
the forward leaves behind for the backward, its output included. Native kernels also have scratch memory outside that
allocator: its own high-water mark is added to the first two, which makes them upper bounds. Up to 64 MiB of scratch
wait for the next call and are not counted while they do.</p>
"""


def render(document: dict[str, object], headlines: Sequence[str], comparison: Comparison | None = None) -> str:
    """The page, as text."""
    device = document["environment"].get("device", {}).get("name", "unknown device")
    parts = [
        _header(document, device),
        _list("headlines", headlines) if headlines else "",
        _goals(document),
        _notes(document),
        _comparison(comparison) if comparison else "",
        *(_suite(name, document) for name in _SUITES),
        *(_study(study, data) for study, data in studies.found(document)),
        f'<section id="method"><h2>How it was measured</h2>{_METHOD}</section>',
        _environment(document),
    ]
    body = "\n".join(part for part in parts if part)
    title = f"macaron_ops bench: {escape(device)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _header(document: dict[str, object], device: str) -> str:
    environment, gemm = document["environment"], document["ceilings"].get("gemm", {})
    facts = {
        "Device": device,
        "Threads": environment.get("threads"),
        "torch": environment.get("versions", {}).get("torch"),
    }
    facts |= {f"GEMM {dtype}": f"{numbers.rate(rate['flops_per_s'])} TFLOP/s" for dtype, rate in gemm.items()}
    if "copy" in document["ceilings"]:
        facts["Copy"] = f"{numbers.digits(document['ceilings']['copy']['bytes_per_s'] / 1e9)} GB/s"
    facts |= {"Commit": environment.get("commit"), "Wall time": f"{numbers.clock_time(document['seconds'])} min"}
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
        if value is not None
    )
    state = ""
    if document["status"] != "complete":
        state = f'<p class="warning">This run is {escape(document["status"])}: below is what it finished.</p>'
    when, command = escape(document["started"]), escape(document["command"])
    return (
        '<header><p class="kicker">macaron_ops bench</p><h1>Transformer layers as splittings, measured</h1>'
        f'<p class="muted">{when} &middot; <code>{command}</code></p>{state}<dl class="facts">{cards}</dl></header>'
    )


def _notes(document: dict[str, object]) -> str:
    notes = document["notes"] + ([] if can_draw() else ["matplotlib is not installed here: there are no pictures."])
    return _list("notes", notes) if notes else ""


def can_draw() -> bool:
    """Whether there can be pictures."""
    return importlib.util.find_spec("matplotlib") is not None


def _goals(document: dict[str, object]) -> str:
    """What the fused backends are meant to reach, and what of it this run reached."""
    findings = goals.findings(document)
    if not findings:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in goals.COLUMNS)
    body = "".join(_goal_row(finding) for finding in findings)
    left = len(goals.GOALS) - len(findings)
    text = f"{sum(finding.met for finding in findings)} of {len(findings)} met"
    text += f"; this run has no measurements for {left} more." if left else "."
    return (
        f'<section id="goals"><h2>Goals</h2><p>Ratios of medians of one run. {text}</p><div class="scroll">'
        f'<table class="goals"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _goal_row(finding: goals.Finding) -> str:
    what, *cells = finding.cells()
    kinds = ("", "", "", "faster" if finding.met else "slower", "")
    values = "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr><th>{escape(what)}</th>{values}</tr>"


def _list(kind: str, lines: Iterable[str]) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _suite(name: str, document: dict[str, object]) -> str:
    rows = [row for row in document["rows"] if row["suite"] == name]
    if not rows:
        return ""
    title, text = _SUITES[name]
    tables = "".join(_table(section) for section in table.sections(rows))
    return f'<section id="{name}"><h2>{title}</h2><p>{text}</p>{_pictures(document | {"rows": rows})}{tables}</section>'


def _study(study: studies.Study, data: studies.Data) -> str:
    pictures = ""
    if can_draw():
        from .studies import pictures as drawn

        pictures = "".join(_figure(plot) for plot in drawn.plots(study.name, data))
    head, *rows = study.table(data)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return (
        f'<section id="{study.name}"><h2>{escape(study.title)}</h2>{pictures}<p>{escape(study.text)}</p>'
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _pictures(document: dict[str, object]) -> str:
    if not can_draw():
        return ""
    from . import plots

    return "".join(_figure(plot) for plot in plots.plots(document))


def _figure(plot: Plot) -> str:
    from . import plots

    light, dark = (_data_uri(plots.save(plot, theme)) for theme in (plots.LIGHT, plots.DARK))
    caption = escape(plot.caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure>'
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(rows: list[Row]) -> str:
    first = rows[0]
    heads = (*table.COLUMNS, table.speedup_column(rows))
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    products = table.products_seconds(rows)
    body = "".join(_table_row(row, len(heads), products) for row in rows)
    return (
        f"<h3>{escape(first['subject'])} <span>{escape(first['pass'])}, {escape(first['dtype'])}</span></h3>"
        f'<p class="muted">{escape(numbers.shape(first))}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _table_row(row: Row, columns: int, products: float | None) -> str:
    if row["status"] != "ok":
        why = f'<td colspan="{columns - 1}">{escape(table.reason(row))}</td>'
        return f'<tr class="bad"><th>{escape(row["variant"])}</th>{why}</tr>'
    name, *cells = table.cells(row, products)
    ours = " class='ours'" if row["variant"].startswith((OURS, AFTER)) else ""
    values = "".join(f"<td>{escape(cell)}</td>" for cell in cells[:-1])
    return f"<tr{ours}><th>{escape(name)}</th>{values}<td class='{_verdict(row)}'>{escape(cells[-1])}</td></tr>"


def _verdict(row: Row) -> str:
    ratio = row["speedup"]
    if not ratio or row["variant"] == ratio["over"]:
        return "same"
    return "faster" if ratio["p20"] > 1 else "slower" if ratio["p80"] < 1 else "same"


def _comparison(comparison: Comparison) -> str:
    warnings = (
        _list("notes", (f"Not the same machine or software: {text}" for text in comparison.warnings))
        if comparison.warnings
        else ""
    )
    moved = [change for change in comparison.changes if change.verdict != compare.SAME]
    lines = "".join(f'<li class="{change.verdict}">{escape(str(change))}</li>' for change in moved)
    unmatched = f"{len(comparison.only_new)} measurements are new, {len(comparison.only_old)} are gone."
    return (
        f'<section id="compare"><h2>Against the older run</h2><p>{escape(comparison.summary())} {unmatched}</p>'
        f'{warnings}<ul class="changes">{lines}</ul></section>'
    )


def _environment(document: dict[str, object]) -> str:
    shown = {name: document[name] for name in ("environment", "options", "ceilings")}
    text = escape(json.dumps(shown, indent=2))
    return (
        '<section id="environment"><h2>Where it was measured</h2>'
        f"<p>Every number above, with all percentiles, is in <code>results.json</code> ({SCHEMA}) beside this file.</p>"
        f"<details><summary>Environment, options and ceilings</summary><pre>{text}</pre></details></section>"
    )
