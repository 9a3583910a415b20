"""Substeps: how one operator alone is advanced, exactly or by an explicit Runge-Kutta method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EXACT", "RUNGE_KUTTA", "Operator", "RungeKutta", "bracket"]

Field = Callable[..., Tensor]
EXACT = "exact"


class Operator(NamedTuple):
    """One term of the right-hand side, for :func:`integrate`.

    Attributes:
        field: ``field(x)``, the velocity; shape of x. What Runge-Kutta substeps need.
        flow: ``flow(x, s)``, where x has come after the time s under this term alone. What ``"exact"`` needs.
        timed: they also take the time, ``field(t, x)`` and ``flow(t, x, s)``. Each operator has a clock of its own,
            which only its own substeps move; that keeps the order of the scheme.
    """

    field: Field | None = None
    flow: Field | None = None
    timed: bool = False

    def velocity(self, t: float | Tensor, x: Tensor) -> Tensor:
        return self.field(t, x) if self.timed else self.field(x)

    def exact(self, t: float | Tensor, x: Tensor, s: float | Tensor) -> Tensor:
        return self.flow(t, x, s) if self.timed else self.flow(x, s)


@dataclass(frozen=True)
class RungeKutta:
    """An explicit method by its tableau: slope i is that at ``x + s sum_j rows[i][j] slope_j``."""

    order: int
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    source: str

    @property
    def evaluations(self) -> int:
        """Of the field, in one substep."""
        return len(self.weights)

    def __call__(self, velocity: Field, t: float | Tensor, x: Tensor, s: float | Tensor) -> Tensor:
        slopes: list[Tensor] = []
        for row in self.rows:
            slopes.append(velocity(t + sum(row) * s, _moved(x, s, row, slopes)))
        return _moved(x, s, self.weights, slopes)


def _moved(x: Tensor, s: float | Tensor, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + (weight * s) * slope
    return x


_KUTTA = "Kutta 1901, Z. Math. Phys. 46:435-453"

RUNGE_KUTTA = {
    "euler": RungeKutta(1, ((),), (1.0,), "Euler 1768; a residual layer is one such step"),
    "midpoint": RungeKutta(2, ((), (0.5,)), (0.0, 1.0), "Runge 1895, Math. Ann. 46:167-178"),
    "heun": RungeKutta(2, ((), (1.0,)), (0.5, 0.5), "Heun 1900, Z. Math. Phys. 45:23-38; two stages"),
    "rk4": RungeKutta(4, ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), _KUTTA),
}


def bracket(f: Field, g: Field) -> Field:
    """``[f, g] = g' f - f' g``, the field of the commutator of the two Lie derivatives."""

    def field(x: Tensor) -> Tensor:
        return torch.func.jvp(g, (x,), (f(x),))[1] - torch.func.jvp(f, (x,), (g(x),))[1]

    return field
