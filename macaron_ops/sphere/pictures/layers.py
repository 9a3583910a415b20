"""The tokens of a real model, layer by layer: what ``record_trajectories`` found."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from macaron_ops.integrations.trajectories import LayerRecord

__all__ = ["histograms", "jacobians", "quantities"]


def histograms(records: Sequence[LayerRecord], columns: int = 4) -> Figure:
    """The inner products of unit tokens in each layer, a panel each, over the input's in grey."""
    records = _some(records)
    rows = math.ceil(len(records) / columns)
    figure, panels = look.figure(rows, columns, (2.4 * columns, 1.9 * rows), sharex=True, sharey=True)
    first = records[0].histogram
    edges = torch.linspace(-1, 1, len(first) + 1)
    density = len(first) / 2
    for axes in panels[len(records) :]:
        axes.set_visible(False)
    for axes, record in zip(panels, records, strict=False):
        look.style(axes, "x")
        axes.stairs(first * density, edges, fill=True, color=look.GRID)
        axes.stairs(record.histogram * density, edges, fill=True, color=look.COLOURS[0], alpha=0.75)
        mean = record.mean_product.mean().item()
        axes.axvline(mean, color=look.COLOURS[3], linewidth=1.2)
        look.label(axes, record.name)
        axes.annotate(
            f"mean {mean:.2f}",
            (0.97, 0.9),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
            color=look.COLOURS[3],
        )
        axes.set_yticks([])
    for axes in panels[len(records) - columns if len(records) > columns else 0 : len(records)]:
        axes.set_xlabel("<x, y>", color=look.MUTED, fontsize=8.5)
        axes.tick_params(labelbottom=True)
    return figure


def quantities(records: Sequence[LayerRecord]) -> Figure:
    """Effective rank, groups and energies against the layer: mean, least and most over the sequences."""
    records = _some(records)
    figure, panels = look.figure(1, 3, (10.8, 3.4))
    _against(panels[0], records, [("effective rank", [r.effective_rank for r in records])])
    look.label(panels[0], "effective rank", "", "of the tokens of a sequence")
    _against(panels[1], records, [("groups", [r.clusters.double() for r in records])])
    look.label(panels[1], "groups of near tokens", "", "in a sequence")
    energies = [(f"beta = {beta:g}", [r.energies[beta] for r in records]) for beta in records[0].energies]
    _against(panels[2], records, energies)
    look.label(panels[2], "energy", "", "mean of exp(beta (<x, y> - 1))")
    panels[2].set_yscale("log")
    for set_formatter in (panels[2].yaxis.set_major_formatter, panels[2].yaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:.3g}" if f"{value:e}"[0] in "125" else "")
    if energies:
        look.legend(panels[2])
    for axes in panels[:2]:
        axes.set_ylim(bottom=0)
    return figure


def jacobians(records: Sequence[LayerRecord]) -> Figure:
    """The largest singular values of each layer's Jacobian: the mean over the sequences, one curve a layer.

    Raises:
        ValueError: they were not recorded.
    """
    records = [record for record in _some(records) if record.spectrum is not None]
    if not records:
        raise ValueError("records: expected some with a spectrum: record_trajectories(..., singular_values=8)")
    from matplotlib import colormaps

    figure, (axes,) = look.figure(1, 1, (6.4, 3.6))
    look.style(axes)
    colours = colormaps[look.SEQUENTIAL]
    for i, record in enumerate(records):
        values = record.spectrum.values
        ranks = range(1, values.shape[1] + 1)
        colour = colours(0.92 * i / max(len(records) - 1, 1))
        axes.plot(ranks, values.mean(0), "o-", color=colour, markersize=3.5, linewidth=1.5, label=record.name)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    look.label(axes, "singular values of the layers' Jacobians", "rank", "singular value")
    look.legend(axes, ncols=2)
    return figure


def _against(axes: Axes, records: Sequence[LayerRecord], curves: Sequence[tuple[str, list[torch.Tensor]]]) -> None:
    look.style(axes)
    at = range(len(records))
    for (name, values), colour in zip(curves, look.COLOURS, strict=False):
        axes.fill_between(
            at, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(at, [v.mean() for v in values], "o-", color=colour, markersize=4, linewidth=1.6, label=name)
    axes.set_xticks(at, _short([record.name for record in records]))
    axes.set_xlabel("layer", color=look.MUTED, fontsize=8.5)


def _short(names: Sequence[str]) -> list[str]:
    """Without the path that all have in common, where something is left of each; the first is the input."""
    paths = [name.split(".") for name in names[1:]]
    common = len(os.path.commonprefix(paths))
    if any(len(path) <= common for path in paths):
        return list(names)
    return [names[0], *(".".join(path[common:]) for path in paths)]


def _some(records: Sequence[LayerRecord]) -> Sequence[LayerRecord]:
    if not records:
        raise ValueError("records: expected those of record_trajectories; got none")
    return records
