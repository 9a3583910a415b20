"""How the pictures look: the colours and the axes of the benchmark's plots, on a light page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GRID", "INK", "MUTED", "PAGE", "SEQUENTIAL", "figure", "label", "legend", "save", "style"]

INK, MUTED, GRID, PAGE = "#1d2129", "#667085", "#e4e7ec", "#ffffff"
COLOURS = ("#1f9e89", "#1d6fb8", "#e08a3c", "#c2417c", "#8f5bd1", "#c9a227", "#8a94a6", "#14532d")
SEQUENTIAL = "viridis"


def figure(rows: int, columns: int, size: tuple[float, float], **options: object) -> tuple[Figure, Sequence[Axes]]:
    """A figure and its axes in one row of reading. It has no window and no global state: ``save`` writes it."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained", facecolor=PAGE)
    axes = drawn.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    return drawn, axes


def style(axes: Axes, grid: str = "both") -> None:
    axes.set_facecolor(PAGE)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", colors=MUTED, labelsize=8.5, length=0)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def label(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, color=INK, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, color=MUTED, fontsize=8.5)
    axes.set_ylabel(y, color=MUTED, fontsize=8.5)


def legend(axes: Axes, **options: object) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, handletextpad=0.4, **options)


def save(drawn: Figure, path: Path | str) -> Path:
    """Writes the figure as PNG, and returns where."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=160, facecolor=PAGE)
    return path
