"""The pictures of a run, each drawn from its rows alone, for a light and a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .group import AFTER, BEFORE, COMPILED, EAGER, KEOPS, OURS, PRODUCTS, REFERENCE, SDPA
from .results import Row


@dataclass(frozen=True)
class Theme:
    name: str
    ink: str
    muted: str
    grid: str
    page: str


LIGHT = Theme("light", ink="#1d2129", muted="#667085", grid="#e4e7ec", page="#ffffff")
DARK = Theme("dark", ink="#e6e9ef", muted="#98a2b3", grid="#2f3542", page="#171a21")

# Colour tells the implementation, filling the scheme: Lie-Trotter is solid, Strang hollow.
_COLOURS = {
    EAGER: "#8a94a6",
    COMPILED: "#e08a3c",
    f"{OURS} auto": "#14532d",
    f"{OURS} reference": "#3b82c4",
    f"{OURS} native": "#1f9e89",
    f"{OURS} triton": "#8f5bd1",
    f"{OURS} cuda": "#c2417c",
    SDPA: "#d1495b",
    KEOPS: "#7c6f64",
    PRODUCTS: "#c9a227",
    BEFORE: "#8a94a6",
    f"{COMPILED} {BEFORE}": "#e08a3c",
    AFTER: "#1f9e89",
    f"{AFTER} {REFERENCE}": "#3b82c4",
}
_SCHEMES = ("Lie-Trotter", "Strang")


@dataclass(frozen=True)
class Plot:
    """A file name without its ending, a caption that says what is shown and against what, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[Theme], Figure]


def plots(document: dict[str, object]) -> list[Plot]:
    """Those for which the run has rows."""
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        layers = [row for row in mine if row["suite"] == "layers"]
        ops = [row for row in mine if row["suite"] == "ops"]
        model = [row for row in mine if row["suite"] == "model"]
        if layers:
            found += _layer_plots(layers, dtype)
        if ops:
            found.append(_ops_plot(ops, dtype))
        sentences = [row for row in model if row["subject"].startswith("MiniLM")]
        families = [row for row in model if row not in sentences]
        if sentences:
            found.append(_model_plot(sentences, dtype))
        if families:
            found.append(_families_plot(families, dtype))
        schemes = [row for row in mine if row["suite"] == "schemes"]
        if schemes:
            found.append(_schemes_plot(schemes, dtype))
    return found


def study_plots(document: dict[str, object]) -> list[Plot]:
    """Those of the studies that the run has."""
    from .studies import found, pictures

    return [plot for study, data in found(document) for plot in pictures.plots(study.name, data)]


def save(plot: Plot, theme: Theme) -> bytes:
    """The plot as PNG."""
    figure = plot.draw(theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=theme.page)
    plt.close(figure)
    return buffer.getvalue()


def write_all(document: dict[str, object], folder: Path) -> list[Path]:
    """Writes every plot of the run as a PNG for a light page."""
    folder.mkdir(exist_ok=True)
    paths = []
    for plot in [*plots(document), *study_plots(document)]:
        paths.append(folder / f"{plot.name}.png")
        paths[-1].write_bytes(save(plot, LIGHT))
    return paths


def _layer_plots(rows: Sequence[Row], dtype: str) -> list[Plot]:
    weighed = [row for row in rows if row["memory"]]
    known = all(row["memory"].get("activation_bytes") is not None for row in weighed)  # unlike on CUDA
    measure = "activation_bytes" if known else "peak_bytes"
    memory, what = _memory(weighed, measure), _MEASURES[measure]
    return [
        Plot(
            f"layers-speed-{dtype}",
            f"Speed of each layer over the eager Lie-Trotter layer of the same preset, {dtype}: above 1 is faster. "
            "Whiskers: p20 to p80 of the ratio.",
            lambda theme: _by_pass(rows, theme, _speed, "speed over eager Lie-Trotter (its time / this time)", 1.0),
        ),
        Plot(
            f"layers-share-{dtype}",
            f"Useful FLOP/s of each layer as a share of the GEMM rate measured in the same run, {dtype}.",
            lambda theme: _by_pass(rows, theme, _share, "share of the measured GEMM rate", None),
        ),
        Plot(
            f"layers-memory-{dtype}",
            f"Peak memory of one call above its inputs and parameters{what}, {dtype}, relative to eager Lie-Trotter: "
            "below 1 is less.",
            lambda theme: _by_pass(weighed, theme, memory, "peak memory / eager Lie-Trotter's", 1.0),
        ),
    ]


_MEASURES = {"activation_bytes": ", without its output and gradients", "peak_bytes": ""}


def _ops_plot(rows: Sequence[Row], dtype: str) -> Plot:
    return Plot(
        f"ops-speed-{dtype}",
        f"Each operator's speed over its eager form, {dtype}: above 1 is faster. Whiskers: p20 to p80 of the ratio.",
        lambda theme: _by_pass(rows, theme, _speed, "speed over the eager form (its time / this time)", 1.0),
    )


def _schemes_plot(rows: Sequence[Row], dtype: str) -> Plot:
    return Plot(
        f"schemes-speed-{dtype}",
        f"One step of each scheme, {dtype}: speed over its own eager form, above 1 is faster. Whiskers: p20 to p80 of "
        "the ratio.",
        lambda theme: _by_pass(rows, theme, _speed, "speed over eager (its time / this time)", 1.0),
    )


def _model_plot(rows: Sequence[Row], dtype: str) -> Plot:
    return Plot(
        f"model-tokens-{dtype}",
        f"MiniLM-L6 on real sentences, {dtype}: real tokens per second before and after replace_layers. "
        "Whiskers: p20 to p80.",
        lambda theme: _model(rows, theme),
    )


def _families_plot(rows: Sequence[Row], dtype: str) -> Plot:
    return Plot(
        f"families-speed-{dtype}",
        f"Models with random weights, {dtype}: speed after replace_layers over transformers' own layers, above 1 is "
        "faster. Whiskers: p20 to p80 of the ratio.",
        lambda theme: _by_pass(rows, theme, _speed, "speed over transformers (its time / this time)", 1.0),
    )


Value = tuple[float, float, float]  # middle, low, high


def _speed(row: Row) -> Value | None:
    ratio = row["speedup"]
    return (ratio["median"], ratio["p20"], ratio["p80"]) if ratio else None


def _share(row: Row) -> Value | None:
    value = row["share_of_gemm"]
    return (value, value, value) if value is not None else None


def _memory(rows: Sequence[Row], measure: str) -> Callable[[Row], Value | None]:
    def at(row: Row) -> tuple[str, str]:
        return row["subject"], row["pass"]

    base = {at(row): row["memory"][measure] for row in rows if row["variant"] == f"{EAGER} Lie-Trotter"}

    def value(row: Row) -> Value | None:
        if not base.get(at(row)):
            return None
        ratio = row["memory"][measure] / base[at(row)]
        return (ratio, ratio, ratio)

    return value


def _by_pass(
    rows: Sequence[Row], theme: Theme, value: Callable[[Row], Value | None], label: str, reference: float | None
) -> Figure:
    """One panel for each pass; subjects down the side, one mark a variant."""
    rows = [row for row in rows if value(row)] or rows
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    variants = sorted({row["variant"] for row in rows}, key=_rank)
    drawn = {(row["subject"], row["variant"]) for row in rows}
    lines = {subject: [name for name in variants if (subject, name) in drawn] for subject in subjects}
    most = max(len(line) for line in lines.values())
    height = 1.5 + len(subjects) * (0.22 + 0.125 * most)
    figure, panels = plt.subplots(
        1, len(passes), figsize=(9.2, height), sharey=True, squeeze=False, layout="constrained"
    )
    handles = {}
    for axes, direction in zip(panels[0], passes, strict=True):
        style(axes, theme)
        if reference is not None:
            axes.axvline(reference, color=theme.muted, linewidth=1, zorder=1)
        for line in range(1, len(subjects)):
            axes.axhline(line - 0.5, color=theme.grid, linewidth=0.8, zorder=0)
        for row in rows:
            found = value(row)
            if row["pass"] == direction and found:
                line = lines[row["subject"]]
                offset = (line.index(row["variant"]) - (len(line) - 1) / 2) / most
                handles[row["variant"]] = _mark(
                    axes, found, subjects.index(row["subject"]) + 0.84 * offset, row["variant"], theme
                )
        axes.set_yticks(range(len(subjects)), subjects, color=theme.ink)
        axes.set_ylim(len(subjects) - 0.5, -0.5)
        axes.set_xlabel(label, color=theme.muted, fontsize=8.5)
        axes.set_title(direction, color=theme.ink, fontsize=10, loc="left", fontweight="bold")
        if reference is None:
            axes.set_xlim(left=0)
    if reference is not None and max(axes.get_xlim()[1] for axes in panels[0]) > _WIDE * reference:
        for axes in panels[0]:
            _logarithmic(axes)
    legend(figure, {name: handles[name] for name in variants if name in handles}, theme)
    return figure


_WIDE = 5  # a ratio past which a linear axis would press the others together


def _logarithmic(axes: Axes) -> None:
    """Powers of two, as plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _mark(axes: Axes, value: Value, y: float, variant: str, theme: Theme):
    colour, hollow = _colour(variant), variant.endswith("Strang")
    middle, low, high = value
    axes.plot([low, high], [y, y], color=colour, linewidth=1.6, alpha=0.65, solid_capstyle="round", zorder=2)
    shape = "D" if variant == PRODUCTS else "s" if "lean" in variant else "o"
    return axes.plot(
        [middle],
        [y],
        shape,
        color=colour,
        markersize=5.4 if shape == "o" else 4.8,
        markerfacecolor=theme.page if hollow else colour,
        markeredgewidth=1.5,
        zorder=3,
    )[0]


def _model(rows: Sequence[Row], theme: Theme) -> Figure:
    """Bars of tokens/s, one panel for each workload."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    figure, panels = plt.subplots(1, len(subjects), figsize=(9.2, 2.4), squeeze=False, layout="constrained")
    for axes, subject in zip(panels[0], subjects, strict=True):
        style(axes, theme)
        mine = [row for row in rows if row["subject"] == subject]
        for y, row in enumerate(mine):
            speed, time = row["tokens_per_s"], row["time"]
            ends = (row["tokens"] / time["p80"], row["tokens"] / time["p20"])
            axes.barh(y, speed, height=0.62, color=_colour(row["variant"]), zorder=2)
            axes.plot(ends, [y, y], color=theme.ink, linewidth=1.4, zorder=3)
            axes.annotate(
                f"{speed:,.0f}",
                (max(ends), y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=theme.ink,
                fontsize=9,
            )
        axes.set_yticks(range(len(mine)), [row["variant"] for row in mine], color=theme.ink)
        axes.set_ylim(len(mine) - 0.4, -0.6)
        axes.set_xlim(0, 1.22 * max(row["tokens"] / row["time"]["p20"] for row in mine))
        axes.set_xlabel("real tokens per second", color=theme.muted, fontsize=8.5)
        axes.set_title(subject, color=theme.ink, fontsize=10, loc="left", fontweight="bold")
    return figure


def _rank(variant: str) -> tuple[int, str]:
    """The order of the colours, then Lie-Trotter before Strang."""
    names = list(_COLOURS)
    matching = [name for name in names if variant.startswith(name)]
    return (names.index(max(matching, key=len)) if matching else len(names)), variant


def _colour(variant: str) -> str:
    for scheme in _SCHEMES:
        variant = variant.removesuffix(f" {scheme}")
    return _COLOURS.get(variant.removesuffix(" lean"), "#d1495b")


def style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.page)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(which="both", colors=theme.muted, labelsize=8.5, length=0)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def legend(figure: Figure, handles: dict[str, object], theme: Theme) -> None:
    legend = figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=8.5,
        handletextpad=0.3,
        columnspacing=1.4,
    )
    for text in legend.get_texts():
        text.set_color(theme.ink)
