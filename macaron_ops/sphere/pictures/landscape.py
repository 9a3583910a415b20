"""A perceptron's potential on the circle or on S^2, its critical points, and the atoms that particles gather in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from macaron_ops.sphere.atoms import Atoms
from macaron_ops.sphere.circle import circle_points
from macaron_ops.sphere.critical_points import CriticalPoint
from macaron_ops.sphere.fields import Perceptron

from . import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["angles", "atoms_against_beta", "curve", "potential", "potential_map"]

_KINDS = {
    "maximum": ("^", "#c2417c"),
    "minimum": ("v", "#1d6fb8"),
    "saddle": ("x", "#e08a3c"),
    "degenerate": ("s", "#8a94a6"),
}

_CLOUDS = tuple(look.COLOURS[i] for i in (0, 4, 5, 7))  # none of a kind's


def potential(
    perceptron: Perceptron, points: Sequence[CriticalPoint] = (), clouds: Mapping[str, Atoms] | None = None
) -> Figure:
    """The potential v with its critical points and with atoms, whose area is their mass.

    On the circle a curve over the angle; on S^2 an equal-area map (Mollweide), longitude about the third axis.

    Args:
        perceptron: of 2 or 3 coordinates, with a potential.
        points: critical points of single particles, ``find_critical_points(perceptron, 1, d)``.
        clouds: atoms of clouds of particles by name, each in a colour.

    Raises:
        ValueError: another number of coordinates.
    """
    d = perceptron.a.shape[-1]
    if d not in (2, 3):
        raise ValueError(f"perceptron: expected one on the circle or on S^2, d = 2 or 3; got d = {d}")
    if d == 2:
        figure, (axes,) = look.figure(1, 1, (7.2, 3.6))
        curve(axes, perceptron)
        look.label(axes, "the perceptron's potential on the circle", "angle", "v")
    else:
        figure, (axes,) = look.figure(1, 1, (7.6, 4.2), subplot_kw={"projection": "mollweide"})
        potential_map(figure, axes, perceptron)
        look.label(axes, "the perceptron's potential on the sphere")
    for kind, (mark, colour) in _KINDS.items():
        found = [point.x[0] for point in points if point.kind == kind]
        if found:
            at = torch.stack(found)
            style = {} if mark == "x" else {"edgecolor": look.PAGE}
            axes.scatter(*_coordinates(at, perceptron), marker=mark, s=46, color=colour, label=kind, zorder=4, **style)
    for (name, cloud), colour in zip((clouds or {}).items(), cycle(_CLOUDS), strict=False):
        x, y = _coordinates(cloud.positions, perceptron)
        sizes = (900 * cloud.masses).tolist()
        axes.scatter(x, y, s=sizes, facecolor="none", edgecolor=colour, linewidth=1.6, label=name, zorder=3)
    if points or clouds:
        figure.legend(
            loc="outside lower center", ncols=6, frameon=False, fontsize=8, labelcolor=look.INK, markerscale=0.7
        )
    return figure


def atoms_against_beta(
    betas: Sequence[float],
    found: Sequence[Sequence[Atoms]],
    bounds: Mapping[str, Sequence[float]] | None = None,
    title: str = "atoms",
) -> Figure:
    """Where the atoms lie (on the circle), how heavy each is and how many there are, against beta.

    Args:
        betas: above 0. found: for each beta the atoms of one or several clouds.
        bounds: of the masses, one for each beta, by name.

    Raises:
        ValueError: unequal lengths, or no atoms.
    """
    if len(betas) != len(found) or not betas or not all(found):
        raise ValueError(f"found: expected atoms for each of {len(betas)} betas; got {len(found)} lists")
    circle = found[0][0].positions.shape[-1] == 2
    figure, panels = look.figure(1, 2 + circle, (3.6 * (2 + circle), 3.4))
    for axes in panels:
        look.style(axes)
        axes.set_xscale("log", base=10 if max(betas) > 100 * min(betas) else 2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for beta, clouds in zip(betas, found, strict=True):
        for cloud in clouds:
            masses = cloud.masses.tolist()
            if circle:
                angle = torch.atan2(cloud.positions[:, 1], cloud.positions[:, 0]).tolist()
                panels[0].scatter(
                    [beta] * len(angle), angle, s=[4 + 160 * m for m in masses], color="#1f9e89", alpha=0.5
                )
            panels[-2].scatter([beta] * len(masses), masses, s=16, color="#1d6fb8", alpha=0.6, edgecolor="none")
            panels[-1].scatter([beta], [len(masses)], s=20, color="#c2417c", alpha=0.5, edgecolor="none")
    if circle:
        look.label(panels[0], f"{title}: where", "beta", "angle (area: mass)")
        angles(panels[0].yaxis)
    look.label(panels[-2], "mass of each", "beta", "share of the particles")
    look.label(panels[-1], "how many", "beta")
    for (name, bound), dashes in zip((bounds or {}).items(), ("--", ":", "-."), strict=False):
        marker = "_" if len(betas) == 1 else None  # a line through one point is not seen
        panels[-2].plot(betas, bound, dashes, color=look.MUTED, linewidth=1.3, marker=marker, label=name)
    if bounds:
        look.legend(panels[-2])
    panels[-2].set_ylim(0, 1.04)
    panels[-1].set_ylim(0, 1.12 * max(len(cloud.masses) for clouds in found for cloud in clouds))
    panels[-1].yaxis.get_major_locator().set_params(integer=True)
    return figure


def curve(axes: Axes, perceptron: Perceptron, upright: bool = False) -> None:
    """The potential over the angle; upright: the angle upwards."""
    look.style(axes)
    angle = torch.linspace(-math.pi, math.pi, 1441, dtype=torch.float64)
    v = perceptron.potential(circle_points(angle).to(perceptron.a.device))
    v = v.detach().cpu()
    axes.plot(*((v, angle) if upright else (angle, v)), color=look.INK, linewidth=1.6, zorder=2)
    if upright:
        return angles(axes.yaxis)
    axes.margins(y=0.16)  # for the largest atom
    angles(axes.xaxis)


def potential_map(figure: Figure, axes: Axes, perceptron: Perceptron) -> None:
    """The potential on a map of S^2."""
    longitude = torch.linspace(-math.pi, math.pi, 361, dtype=torch.float64)
    latitude = torch.linspace(-math.pi / 2, math.pi / 2, 181, dtype=torch.float64)
    up, around = torch.meshgrid(latitude, longitude, indexing="ij")
    x = torch.stack([up.cos() * around.cos(), up.cos() * around.sin(), up.sin()], dim=-1)
    v = perceptron.potential(x.to(perceptron.a.device)).detach().cpu()
    drawn = axes.contourf(longitude.numpy(), latitude.numpy(), v.numpy(), levels=32, cmap=look.SEQUENTIAL)
    axes.grid(color=look.PAGE, linewidth=0.4, alpha=0.4)
    axes.set_xticklabels([])
    axes.set_yticklabels([])
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7)
    bar.ax.set_title("v", color=look.MUTED, fontsize=9)
    bar.ax.tick_params(colors=look.MUTED, labelsize=8, length=0)
    bar.outline.set_visible(False)


def _coordinates(x: Tensor, perceptron: Perceptron) -> tuple[list[float], list[float]]:
    """In the picture: angle and potential on the circle, longitude and latitude on S^2."""
    along = torch.atan2(x[:, 1], x[:, 0]).tolist()
    if x.shape[-1] == 2:
        return along, perceptron.potential(x).tolist()
    return along, torch.asin(x[:, 2].clamp(-1, 1)).tolist()


def angles(axis: object) -> None:
    """Marks of an axis from -pi to pi."""
    marks = {-math.pi: "-π", -math.pi / 2: "-π/2", 0.0: "0", math.pi / 2: "π/2", math.pi: "π"}
    axis.set_ticks(list(marks), list(marks.values()))
