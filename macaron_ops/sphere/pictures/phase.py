"""The phase diagram of clustering, with the exact curve over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from macaron_ops.sphere.phase_diagram import PhaseDiagram

from . import look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["phase_diagram"]


def phase_diagram(diagram: PhaseDiagram, columns: int = 300) -> Figure:
    """The share of starts that have clustered, beta across and time upwards; the time of half of them, and that of
    orthonormal particles, which those of high dimension are nearly."""
    end, betas = diagram.meta["t"], diagram.betas
    times = torch.linspace(0, end, columns + 1, dtype=torch.float64)
    figure, (axes,) = look.figure(1, 1, (7.6, 4.6))
    look.style(axes)
    axes.grid(False)
    edges = torch.cat(
        [1.5 * betas[:1] - 0.5 * betas[1:2], (betas[1:] + betas[:-1]) / 2, 1.5 * betas[-1:] - 0.5 * betas[-2:-1]]
    )
    if len(betas) == 1:
        edges = torch.stack([betas[0] - 0.5, betas[0] + 0.5])
    middles = (times[1:] + times[:-1]) / 2
    drawn = axes.pcolormesh(
        edges, times, diagram.share(middles).T, cmap=look.SEQUENTIAL, vmin=0, vmax=1, rasterized=True
    )
    axes.plot(betas, diagram.median(), color=look.PAGE, linewidth=1.4, linestyle=":", label="half of them")
    axes.plot(betas, diagram.orthonormal(), color="#ffb454", linewidth=1.8, label="orthonormal start, exact")
    axes.set_ylim(0, end), axes.set_xlim(edges[0], edges[-1])
    bar = figure.colorbar(drawn, ax=axes)
    bar.ax.set_title("clustered", color=look.MUTED, fontsize=9)
    bar.ax.tick_params(colors=look.MUTED, labelsize=8, length=0)
    bar.outline.set_visible(False)
    n, d, batch = (diagram.meta[name] for name in ("n", "d", "batch"))
    look.label(axes, f"{n} particles, d = {d}: share of {batch:,} starts in one cluster", "beta", "t")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=look.PAGE, loc="center right")
    return figure
