"""How heavy a cluster can be where attention repels: the second-order condition, and what is held to it."""

import math

import torch

from macaron_ops.ops.checks import positive_int

from .checks import positive
from .circle import circle_points
from .fields import Perceptron
from .measures import on_sphere

__all__ = ["cluster_mass_bound", "heaviest_arc"]

_GRID = 10_001


def cluster_mass_bound(
    beta: float, perceptron: Perceptron | None = None, *, factor: float = 1.0, n: int | None = None
) -> float:
    """On the circle, the most mass m that a cluster of diameter ``1 / (2 sqrt(beta))`` holds where ``factor E_beta +
    1/2 mean v`` has a minimum of second order: where the descent of ``factor * SelfAttention(beta,
    weighting="unnormalized") + perceptron`` can end.

    Moving one of n particles by itself must not lower the energy to second order. With ``k(s) = factor exp(beta cos s)
    / beta``, and k'' at most ``-pull`` within the cluster and at most ``push`` anywhere::

        0 <= -(m - 1/n) pull + (1 - m) push + 1/2 max v''

    For large beta and a perceptron that is small against ``factor exp(beta)`` that is ``m <= p / (p + c)`` with ``p = 2
    e^(-3/2)``, ``c = 3/4 e^(-1/8)``: 0.4027. The bound of arXiv 2601.21366, 0.5742, has half of c. Uphill there is no
    such bound: all particles at the maximum of v are a strict maximum.

    Args:
        beta: above 0. perceptron: of two coordinates, with a potential; None: none. factor: above 0.
        n: the number of particles; None: infinitely many.

    Returns:
        m, at most 1.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    beta, factor = positive("beta", beta), positive("factor", factor)
    reach = 1 / math.sqrt(beta)
    pull = -_second(beta, min(reach / 2, math.pi)).max().item()
    push = max(_second(beta, end).max().item() for end in (min(4 * reach, math.pi), math.pi))
    bend = 0.0
    if perceptron is not None:
        bend = _largest_bend(perceptron) / 2 * math.exp(-beta) / factor
    alone = 0.0 if n is None else pull / positive_int("n", n)
    return min(1.0, (push + bend + alone) / (push + pull)) if push + pull > 0 else 1.0


def heaviest_arc(x: torch.Tensor, angle: float) -> float:
    """The largest share of the particles ``x (n, 2)`` of the circle that lies in one closed arc of this angle.

    Raises:
        ValueError, TypeError: x is no cloud of unit points of the circle, or the angle is not above 0.
    """
    if on_sphere("x", x, dim=2).shape[-1] != 2:
        raise ValueError(f"x: expected points of the circle, 2 coordinates; got {x.shape[-1]}")
    at = torch.atan2(x[:, 1], x[:, 0]).double().sort().values
    turns = torch.cat([at, at + 2 * math.pi])
    slack = 64 * torch.finfo(x.dtype).eps  # what the coordinates say of an angle
    ends = torch.searchsorted(turns, at + positive("angle", angle) + slack, right=True)
    counts = (ends - torch.arange(len(at), device=x.device)).clamp_max(len(at))
    return counts.max().item() / len(at)


def _second(beta: float, end: float) -> torch.Tensor:
    """k'' over ``factor exp(beta)`` at angles from 0 to ``end``."""
    s = torch.linspace(0, end, _GRID, dtype=torch.float64)
    return (beta * s.sin() ** 2 - s.cos()) * torch.exp(-2 * beta * (s / 2).sin() ** 2)  # cos s - 1 would cancel


def _largest_bend(perceptron: Perceptron) -> float:
    """``max v''`` in the angle, by the exact second derivative on a grid; at least 0."""
    if not isinstance(perceptron, Perceptron) or perceptron.a.shape[-1] != 2:
        raise ValueError(f"perceptron: expected a Perceptron of two coordinates; got {perceptron!r}")

    def v(angle: torch.Tensor) -> torch.Tensor:
        return perceptron.potential(circle_points(angle)[None])[0]

    angle = torch.linspace(-math.pi, math.pi, 4097, dtype=torch.float64, device=perceptron.a.device)
    bends = torch.vmap(torch.func.grad(torch.func.grad(v)))(angle)
    return max(bends.max().item(), 0.0)
