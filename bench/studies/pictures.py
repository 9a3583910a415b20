"""The pictures of the studies, drawn from their numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..plots import Plot, Theme, legend, style

Data = dict[str, object]

# Colour tells the splitting, the mark the substep.
_COLOURS = {
    "lie_trotter_AB": "#8a94a6",
    "strang_BAB": "#1f9e89",
    "unsplit": "#1d6fb8",
    "lie_richardson2": "#e08a3c",
    "yoshida4_BAB": "#c2417c",
    "blanes_moan4_BAB": "#8f5bd1",
    "richardson_strang4": "#c9a227",
    "Lie-Trotter": "#8a94a6",
    "Strang (Macaron)": "#1f9e89",
}
_MARKS = {"euler": "o", "midpoint": "s", "heun": "s", "rk4": "D", "exact": "^"}
_MEASURES = {
    "lie_trotter": ("the layer", "#8a94a6"),
    "strang": ("Strang step", "#1f9e89"),
    "unsplit": ("parallel (unsplit Euler)", "#e08a3c"),
    "lie_trotter_exact": ("Lie-Trotter, exact substeps", "#1d6fb8"),
    "strang_exact": ("Strang, exact substeps", "#8f5bd1"),
    "commutator": ("commutator term", "#c2417c"),
}


def plots(name: str, data: Data) -> list[Plot]:
    """Those of one study."""
    return _PLOTS[name](data)


def _orders(data: Data) -> list[Plot]:
    caption = (
        "Observed order of each scheme (its own in brackets) with each kind of substep, on nonlinear "
        "fields that do not "
        "commute. A dash: there is no exact flow of a commutator or of A + B."
    )
    return [Plot("schemes-orders", caption, lambda theme: _matrix(data, theme))]


def _matrix(data: Data, theme: Theme) -> Figure:
    rows, substeps = data["rows"], data["substeps"]
    height = 0.9 + 0.27 * len(rows)
    figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
    style(axes, theme)
    axes.grid(visible=False)
    values = [[row["flat"][substep] for substep in substeps] for row in rows]
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    axes.imshow(shown, aspect="auto", cmap="viridis", vmin=0.5, vmax=6.5)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            ink = theme.muted if value is None else "#ffffff" if value < 4.5 else "#1d2129"
            text = "-" if value is None else f"{value:.2f}"
            axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=8.5)
    names = [f"{row['scheme']}  ({row['order']})" if "order" in row else row["scheme"] for row in rows]
    axes.set_yticks(range(len(rows)), names, color=theme.ink)
    axes.set_xticks(range(len(substeps)), substeps, color=theme.ink)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    return figure


def _work(data: Data) -> list[Plot]:
    caption = (
        "Error at time 1 against the evaluations of attention and FFN together (left) and against the time that they "
        "took (right), on a small layer's fields. Colour: splitting; circle: Euler, square: midpoint or Heun, diamond: "
        "RK4. Lower left is better."
    )
    return [Plot("schemes-work-precision", caption, lambda theme: _work_precision(data, theme))]


def _work_precision(data: Data, theme: Theme) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.6), sharey=True, layout="constrained")
    handles = {}
    sides = (("evaluations", "evaluations of A and B", 1.0), ("seconds", "milliseconds", 1e3))
    for axes, (key, label, unit) in zip(panels, sides, strict=True):
        style(axes, theme)
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        for curve in data["curves"]:
            handles[f"{curve['scheme']}, {curve['substep']}"] = axes.loglog(
                [unit * value for value in curve[key]],
                curve["errors"],
                color=_COLOURS[curve["scheme"]],
                marker=_MARKS[curve["substep"]],
                linestyle="--" if curve["scheme"] == "unsplit" else "-",
                markersize=4.5,
                linewidth=1.4,
            )[0]
        axes.set_xlabel(label, color=theme.muted, fontsize=8.5)
    panels[0].set_ylabel("largest error", color=theme.muted, fontsize=8.5)
    legend(figure, handles, theme)
    return figure


def _constants(data: Data) -> list[Plot]:
    caption = (
        f"Error at time 1 over that of Lie-Trotter with {data['steps']} Euler steps, {data['draws']} random layers: "
        "median, 25th to 75th (thick) and 10th to 90th percentile. Left of 1 is more accurate."
    )
    return [Plot("schemes-constants", caption, lambda theme: _ratios(data, theme))]


def _ratios(data: Data, theme: Theme) -> Figure:
    found = data["ratios"]
    figure, axes = plt.subplots(figsize=(8.2, 0.9 + 0.36 * len(found)), layout="constrained")
    style(axes, theme)
    axes.axvline(1.0, color=theme.muted, linewidth=1)
    for y, ratio in enumerate(found.values()):
        for low, high, width in (("10", "90", 1.5), ("25", "75", 4.5)):
            axes.plot([ratio[low], ratio[high]], [y, y], color="#1f9e89", linewidth=width, solid_capstyle="round")
        axes.plot([ratio["50"]], [y], "o", color=theme.ink, markersize=5, zorder=3)
    axes.set_yticks(range(len(found)), list(found), color=theme.ink)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("error / Lie-Trotter's", color=theme.muted, fontsize=8.5)
    return figure


def _minilm(data: Data) -> list[Plot]:
    by_layer = (
        f"{data['model']} on {data['sentences']} real sentences, {data['tokens']} tokens: distance from "
        f"the flow of each "
        "layer's own fields, in units of what the flow moves a token. Median and 10th to 90th percentile over tokens."
    )
    by_token = (
        "The same for each token of one sentence: the layer's own distance (top) and the commutator term (bottom), by "
        "layer from the first at the top."
    )
    return [
        Plot("schemes-minilm-layers", by_layer, lambda theme: _layers(data, theme)),
        Plot("schemes-minilm-tokens", by_token, lambda theme: _tokens(data["sentence"], theme)),
    ]


def _layers(data: Data, theme: Theme) -> Figure:
    layers = data["layers"]
    figure, axes = plt.subplots(figsize=(9.2, 4.2), layout="constrained")
    style(axes, theme)
    axes.grid(axis="x", visible=False)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    handles = {}
    for i, (measure, (name, colour)) in enumerate(_MEASURES.items()):
        found = [layer["errors"][measure] for layer in layers]
        x = [j + 0.13 * (i - (len(_MEASURES) - 1) / 2) for j in range(len(layers))]
        axes.vlines(x, [f["10"] for f in found], [f["90"] for f in found], color=colour, linewidth=1.8, alpha=0.6)
        handles[name] = axes.plot(x, [f["50"] for f in found], "o", color=colour, markersize=5.5)[0]
    axes.set_xticks(range(len(layers)), [layer["layer"] for layer in layers], color=theme.ink)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("distance / what the flow moves", color=theme.muted, fontsize=8.5)
    legend(figure, handles, theme)
    return figure


def _tokens(sentence: Data, theme: Theme) -> Figure:
    words = sentence["tokens"]
    figure, panels = plt.subplots(
        2, 1, figsize=(max(5.0, 0.24 * len(words) + 1.4), 4.6), sharex=True, layout="constrained"
    )
    for axes, measure in zip(panels, ("lie_trotter", "commutator"), strict=True):
        style(axes, theme)
        axes.grid(visible=False)
        values = sentence[measure]
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=_typical(values))
        axes.set_yticks(range(len(values)), range(len(values)), color=theme.ink)
        title = _MEASURES[measure][0]
        axes.set_title(title, color=theme.ink, fontsize=10, loc="left", fontweight="bold")
        bar = figure.colorbar(image, ax=axes, extend="max")
        bar.ax.tick_params(colors=theme.muted, labelsize=8)
        bar.outline.set_visible(False)
    panels[-1].set_xticks(range(len(words)), words, rotation=90, color=theme.ink)
    return figure


def _typical(values: Sequence[Sequence[float]]) -> float:
    """The 95th percentile, so that one token does not hide the others."""
    ordered = sorted(value for row in values for value in row)
    return ordered[int(0.95 * (len(ordered) - 1))]


def _training(data: Data) -> list[Plot]:
    caption = (
        f"Loss on text that was not trained on, {len(data['seeds'])} seeds of each scheme (thin) and "
        f"their mean (thick)."
    )
    return [Plot("schemes-training", caption, lambda theme: _curves(data, theme))]


def _curves(data: Data, theme: Theme) -> Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    style(axes, theme)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    handles = {}
    for name, runs in data["curves"].items():
        for run in runs:
            axes.plot(run["at"], run["losses"], color=_COLOURS[name], linewidth=0.8, alpha=0.6)
        mean = [sum(losses) / len(losses) for losses in zip(*(run["losses"] for run in runs), strict=True)]
        handles[name] = axes.plot(runs[0]["at"], mean, color=_COLOURS[name], linewidth=2.2)[0]
    axes.set_xlabel("steps", color=theme.muted, fontsize=8.5)
    axes.set_ylabel("nats per character", color=theme.muted, fontsize=8.5)
    legend(figure, handles, theme)
    return figure


_PLOTS: dict[str, Callable[[Data], list[Plot]]] = {
    "orders": _orders,
    "work": _work,
    "constants": _constants,
    "minilm": _minilm,
    "training": _training,
}
