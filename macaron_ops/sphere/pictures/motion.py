"""Particles on the circle and on S^2 while they move, and what was measured on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from macaron_ops.sphere.fields import Field, Perceptron, Scaled, Sum
from macaron_ops.sphere.trajectory import Trajectory

from . import look
from .landscape import angles, curve, potential_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["observed", "particles", "perceptron_of", "staircase"]

_SHOWN = 400  # particles whose ways are drawn


def particles(path: Trajectory, field: Field, moments: int = 4, logarithmic: bool = False) -> Figure:
    """Where the particles are: on the circle their angles against time, on S^2 maps (Mollweide) at some times; with the
    potential of the field's perceptrons, where it has some.

    Args:
        path: with its points kept, ``(frames, n, d)``, d = 2 or 3. moments: maps on S^2. logarithmic: the axis of time.

    Raises:
        ValueError: other points.
    """
    points, times = path.points.double(), path.times
    if points.dim() != 3 or points.shape[-1] not in (2, 3) or len(points) != len(times):
        raise ValueError(
            f"path: expected all frames of one cloud on the circle or on S^2, (frames, n, 2 or 3); got "
            f"{tuple(points.shape)} of {len(times)} frames"
        )
    perceptron = perceptron_of(field)
    if points.shape[-1] == 2:
        return _circle(points[:, :_SHOWN], times, perceptron, logarithmic)
    columns = min(moments, len(times), 2) if len(times) > 1 else 1
    rows = -(-min(moments, len(times)) // columns)
    figure, panels = look.figure(rows, columns, (4.6 * columns, 2.45 * rows), subplot_kw={"projection": "mollweide"})
    for axes, i in zip(panels, _spread(times, len(panels)), strict=True):
        if perceptron is None:
            axes.grid(color=look.GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.set_xticklabels([])
            axes.set_yticklabels([])
        else:
            potential_map(figure, axes, perceptron)
        x, y, z = points[i].unbind(-1)
        axes.scatter(torch.atan2(y, x), z.clamp(-1, 1).asin(), s=9, color=look.COLOURS[3], edgecolor="none", alpha=0.7)
        look.label(axes, f"t = {times[i]:.3g}")
    return figure


def observed(path: Trajectory, logarithmic: bool = False) -> Figure:
    """Each number that was measured, against time: curves, one for each of a batch; shares of clusters stacked."""
    shown = {name: value for name, value in path.observed.items() if name != "histogram"}
    if not shown:
        raise ValueError("path: expected observers that draw curves; got none")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = look.figure(rows, columns, (3.8 * columns, 2.8 * rows))
    for axes, (name, value) in zip(panels, shown.items(), strict=False):
        look.style(axes)
        _one(axes, path.times, name, value.double())
        if logarithmic:
            _logarithmic(axes, path.times)
        look.label(axes, name.replace("_", " "), "t")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    return figure


def staircase(paths: Sequence[Trajectory], names: Sequence[str]) -> Figure:
    """Metastability: the energy in its own scale and the number of clusters against the logarithm of time.

    Plateaus are clusters that wait exponentially long for one another (Geshkovski, Koubbi, Polyanskiy, Rigollet 2024,
    arXiv 2410.06833).

    Args:
        paths: with the observers ``energy`` and ``clusters``.
    """
    figure, (energy, count) = look.figure(1, 2, (9.2, 3.4))
    for path, name, colour in zip(paths, names, look.COLOURS, strict=False):
        later = path.times > 0
        e = path.observed["energy"].double()
        energy.plot(path.times[later], (e / e.amax())[later], color=colour, linewidth=1.6, label=name)
        count.step(path.times[later], path.observed["clusters"][later], color=colour, linewidth=1.4, where="post")
    for axes, title, y in ((energy, "energy, share of its largest", ""), (count, "clusters", "")):
        look.style(axes)
        axes.set_xscale("log")
        look.label(axes, title, "t", y)
    count.set_yscale("log", base=2)
    count.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    look.legend(energy)
    return figure


def _circle(points: Tensor, times: Tensor, perceptron: Perceptron | None, logarithmic: bool) -> Figure:
    if perceptron is None:
        figure, panels = look.figure(1, 1, (7.2, 4.0))
    else:
        figure, panels = look.figure(1, 2, (8.4, 4.0), sharey=True, width_ratios=(3, 1))
    angle = torch.atan2(points[..., 1], points[..., 0])
    jump = (angle.diff(dim=0).abs() > math.pi).nonzero()
    lines = angle.clone()
    lines[jump[:, 0] + 1, jump[:, 1]] = torch.nan  # a line does not cross the page where an angle turns over
    axes = panels[0]
    look.style(axes)
    axes.plot(times, lines, color=look.COLOURS[0], linewidth=0.7, alpha=0.55)
    angles(axes.yaxis)
    if logarithmic:
        _logarithmic(axes, times)
    look.label(axes, "particles on the circle", "t", "angle")
    if perceptron is not None:
        curve(panels[1], perceptron, upright=True)
        look.label(panels[1], "its potential", "v")
    return figure


def _one(axes: Axes, times: Tensor, name: str, value: Tensor) -> None:
    if name == "masses":
        shares = value.reshape(len(times), -1, value.shape[-1]).mean(1)
        axes.stackplot(times, shares.T, colors=look.COLOURS, edgecolor=look.PAGE, linewidth=0.3)
        axes.set_ylim(0, 1)
        return
    value = value.reshape(len(times), -1)
    many = value.shape[1] > 1
    axes.plot(times, value, color=look.COLOURS[1], linewidth=0.8 if many else 1.6, alpha=0.5 if many else 1.0)
    if name == "drift":
        axes.set_yscale("log")


def _logarithmic(axes: Axes, times: Tensor) -> None:
    axes.set_xscale("log")
    axes.set_xlim(times[times > 0][0], times[-1])


def _spread(times: Tensor, count: int) -> list[int]:
    """Frames: the first, the last, and between them such that the time doubles or so."""
    if count == 1:
        return [len(times) - 1]
    wanted = times[-1] * torch.linspace(0, 1, count, dtype=torch.float64) ** 2
    return [int((times - t).abs().argmin()) for t in wanted]


def perceptron_of(field: Field) -> Perceptron | None:
    """The field's perceptron, where it is one alone or a multiple."""
    terms = field.fields if isinstance(field, Sum) else (field,)
    found = [term for term in terms if not term.interacts]
    if len(found) != 1:
        return None
    (term,) = found
    if isinstance(term, Scaled):
        inner = term.field
        return Perceptron(inner.a, inner.b, term.factor * inner.weight, inner.activation)
    return term
