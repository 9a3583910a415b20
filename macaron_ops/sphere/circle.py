"""The continuum equation on the circle, on a grid: an independent check of the limit of many particles.

    d rho/dt + d(rho v)/d theta = 0,    v(theta) = <u[rho](theta), (-sin theta, cos theta)>

is what ``dx/dt = P_x u`` becomes when the particles become a density: sums over particles are integrals against rho. A
conservative finite-volume method with linear reconstruction (van Leer's limiter), upwind fluxes and Heun's method: the
mass is exact to rounding, the density stays non-negative, the order is 2 where rho is smooth. The integrals are sums
over cells with the whole kernel matrix, N x N; a convolution by FFT would lose the softmax's digits where a row's
weights are small, and could not take Q, K, V. Sources: van Leer 1979, J. Comput. Phys. 32:101; LeVeque, Finite Volume
Methods for Hyperbolic Problems, 2002, ch. 6.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from macaron_ops.ops.checks import number, positive_int

from .checks import positive
from .fields import Field, Perceptron, SelfAttention
from .parts import parts

__all__ = ["circle_flow", "circle_grid", "circle_points", "circle_quantiles"]

_FEWEST = 4  # cells: the limiter looks at three

Velocity = Callable[[Tensor], Tensor]


def circle_grid(cells: int) -> Tensor:
    """``(cells,)``: the angles of the cells' middles in float64, ``2 pi (i + 1/2) / cells``."""
    if positive_int("cells", cells) < _FEWEST:
        raise ValueError(f"cells: expected at least {_FEWEST}; got {cells}")
    return 2 * math.pi * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def circle_points(angles: Tensor) -> Tensor:
    """``(..., n, 2)``: the points of the circle at the angles ``(..., n)``."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def circle_quantiles(density: Tensor, n: int) -> Tensor:
    """``(n,)``: the angles below which the mass is ``(i + 1/2) / n``, i = 0 to n - 1: the n particles nearest to the
    density in W2, where 0 is not crossed. Within a cell the mass is evenly spread.

    Args:
        density: ``(cells,)``, per radian, on :func:`circle_grid`; its integral is divided out.
    """
    masses = _density(density)
    levels = (torch.arange(positive_int("n", n), dtype=torch.float64) + 0.5) / n
    ends = masses.cumsum(0) / masses.sum()
    cell = torch.searchsorted(ends, levels).clamp_max(len(ends) - 1)
    before = ends[cell] - masses[cell] / masses.sum()
    inside = (levels - before) / (masses[cell] / masses.sum())
    return 2 * math.pi / len(ends) * (cell + inside)


def circle_flow(field: Field, density: Tensor, time: float, *, step: float = 0.01, courant: float = 0.4) -> Tensor:
    """The density after ``time`` under the field.

    Args:
        field: of :class:`SelfAttention` without a causal mask and :class:`Perceptron` in two dimensions, their sums and
            multiples.
        density: ``(cells,)``, per radian, at least 0, on :func:`circle_grid`, in float64.
        time: at least 0.
        step: the longest; it has to resolve how fast the field itself changes.
        courant: in (0, 1/2]: no step moves mass by more than this part of a cell.

    Returns:
        ``(cells,)``; its sum is that of ``density``.

    Raises:
        ValueError, TypeError: an argument does not fit, or a field of another kind.
    """
    rho, time = _density(density).clone(), number("time", time, minimum=0.0)
    if not 0.0 < number("courant", courant) <= 0.5:
        raise ValueError(f"courant: expected a number in (0, 1/2]; got {courant}")
    step, width = positive("step", step), 2 * math.pi / len(rho)
    velocities = [_velocity(factor, part, len(rho)) for factor, part in parts(field)]

    def velocity(rho: Tensor) -> Tensor:
        return sum(part(rho) for part in velocities)

    left = time
    while left > 0.0:
        v = velocity(rho)
        fastest = v.abs().max().item()
        if not math.isfinite(fastest):
            raise ValueError(f"field: expected finite velocities; got {field!r}, which leaves float64")
        h = min(left, step, courant * width / fastest if fastest > 0.0 else math.inf)
        once = rho + h * _change(rho, v, width)
        rho = 0.5 * (rho + once + h * _change(once, velocity(once), width))
        left -= h
    return rho


def _change(rho: Tensor, v: Tensor, width: float) -> Tensor:
    """``-d(rho v)/d theta`` of the cells. Face i lies behind cell i, between it and cell i + 1."""
    ahead = rho.roll(-1) - rho
    behind = ahead.roll(1)
    slope = torch.where(ahead * behind > 0, 2 * ahead * behind / (ahead + behind), 0.0)
    flux = v.clamp_min(0) * (rho + slope / 2) + v.clamp_max(0) * (rho - slope / 2).roll(-1)
    return (flux.roll(1) - flux) / width


def _velocity(factor: float, field: Field, cells: int) -> Velocity:
    """The velocity at the faces, from a density."""
    middles = circle_grid(cells)
    faces = middles + math.pi / cells
    at, along = circle_points(faces), circle_points(faces + math.pi / 2)
    if isinstance(field, Perceptron):
        v = factor * (field.vectors(at) * along).sum(-1)
        return lambda rho: v
    if not isinstance(field, SelfAttention) or field.causal:
        raise ValueError(f"field: expected attention without a causal mask, perceptrons, their sums; got {field!r}")
    if field.width not in (None, 2):
        raise ValueError(f"field: expected one on the circle, d = 2; got d = {field.width}")
    points = circle_points(middles)
    heads = [_head(field, head, at, points) for head in range(field.heads)]

    def attention(rho: Tensor) -> Tensor:
        mass, total = rho * (2 * math.pi / cells), 0.0
        for weights, values in heads:
            sums = weights @ (mass[:, None] * values)
            u = sums[:, :2] / sums[:, 2:] if field.weighting == "softmax" else sums[:, :2]
            total = total + factor * (u * along).sum(-1)
        return total

    return attention


def _head(field: SelfAttention, head: int, at: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(beta <Q x, K y>)`` for faces x and cells y (over its row's largest for a softmax), and ``(V y, 1)``."""
    one = torch.eye(2, dtype=torch.float64)
    q, k, v = (
        one if m is None else (m if field.heads == 1 else m[head]).detach().double().cpu()
        for m in (field.Q, field.K, field.V)
    )
    scores = float(field.beta) * (at @ q.T) @ (points @ k.T).T
    if field.weighting == "softmax":
        scores -= scores.amax(-1, keepdim=True)
    return scores.exp(), torch.cat([points @ v.T, torch.ones_like(points[:, :1])], dim=-1)


def _density(density: object) -> Tensor:
    if not isinstance(density, Tensor) or density.dtype != torch.float64 or density.dim() != 1:
        raise TypeError("density: expected a tensor of shape (cells,) in float64")
    circle_grid(len(density))
    if not (density.isfinite().all() and (density >= 0).all() and density.sum() > 0):
        raise ValueError("density: expected finite numbers of at least 0 with a positive sum")
    return density
