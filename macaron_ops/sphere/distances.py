"""The Wasserstein distance W2 between clouds of particles on the unit sphere.

``W2(mu, nu)^2 = min over couplings of the mean of cost(x, y)^2``, with the geodesic cost (the angle between x and y) or
the chordal one (``|x - y|``), which is never larger. Three ways to it, each exact for what it says:

    wasserstein            any d, some thousand particles: a linear assignment, or a linear program for masses
    wasserstein_circle     d = 2, millions: transport on a periodic line (Delon, Salomon, Sobolevski 2010)
    sliced_wasserstein     any d, millions: the mean over directions of what the projections are apart
"""

from collections.abc import Callable

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from macaron_ops.ops.checks import choice, positive_int

from .measures import _masses, on_sphere

__all__ = ["COSTS", "sliced_wasserstein", "wasserstein", "wasserstein_circle"]

COSTS = ("geodesic", "chordal")

_ASSIGNMENT = 5000  # particles a side: 200 MB of costs, and the time grows with the cube
_PROGRAM = 200_000  # pairs: the variables of the linear program
_BYTES = 2**28  # of projections sorted at a time
_GOLDEN = (5**0.5 - 1) / 2


def wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    cost: str = "geodesic",
    x_masses: Tensor | None = None,
    y_masses: Tensor | None = None,
) -> float:
    """W2 by scipy, in float64: an assignment where both clouds have n particles and no masses, else a linear program.

    Args:
        x: ``(n, d)``; y: ``(m, d)``, rows of unit length.
        cost: ``"geodesic"`` or ``"chordal"``.
        x_masses: ``(n,)``; y_masses: ``(m,)``, of any sums; None: equal ones.

    Raises:
        ValueError, TypeError: an argument does not fit, or the clouds are too large: the message names what is not.
        ModuleNotFoundError: without scipy.
    """
    from scipy import optimize, sparse

    x, y = _clouds(x, y)
    choice("cost", cost, COSTS)
    n, m = len(x), len(y)
    if n == m and x_masses is None and y_masses is None:
        if n > _ASSIGNMENT:
            raise ValueError(f"x, y: expected at most {_ASSIGNMENT} particles; got {n}: sliced_wasserstein takes more")
        squares = _costs(x, y, cost).square().numpy()
        return float(squares[optimize.linear_sum_assignment(squares)].mean()) ** 0.5
    if n * m > _PROGRAM:
        raise ValueError(
            f"x, y: expected at most {_PROGRAM} pairs where the sizes differ or masses are given; got {n} x {m}: "
            "sliced_wasserstein takes more"
        )
    a, b = _masses("x_masses", x_masses, n).numpy(), _masses("y_masses", y_masses, m).numpy()
    rows = sparse.kron(sparse.eye(n), numpy.ones((1, m)))
    columns = sparse.kron(numpy.ones((1, n)), sparse.eye(m))
    found = optimize.linprog(
        _costs(x, y, cost).square().flatten().numpy(),
        A_eq=sparse.vstack([rows, columns]).tocsr()[:-1],  # the last equation follows from the others
        b_eq=numpy.concatenate([a, b])[:-1],
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"the linear program of W2 was not solved: {found.message}")
    return max(found.fun, 0.0) ** 0.5


def wasserstein_circle(
    x: Tensor, y: Tensor, *, x_masses: Tensor | None = None, y_masses: Tensor | None = None
) -> float:
    """Geodesic W2 on the circle, exact for any sizes and masses, in float64 and ``O((n + m) log(n + m))``.

    With the quantile functions of the angles, continued by ``Q(t + 1) = Q(t) + 2 pi``, W2^2 is the minimum over a of
    ``integral_0^1 (Q_x(t) - Q_y(t + a))^2 dt``, which is convex and piecewise linear in a. Source: Delon, Salomon,
    Sobolevski 2010, SIAM J. Appl. Math. 70:2239. W2^2 is found to about 1e-14.

    Args:
        x: ``(n, 2)``; y: ``(m, 2)``, rows of unit length.
        x_masses: ``(n,)``; y_masses: ``(m,)``, of any sums; None: equal ones.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    x, y = _clouds(x, y)
    if x.shape[-1] != 2:
        raise ValueError(f"x: expected points of the circle, 2 coordinates; got {x.shape[-1]}")
    at, levels = _quantiles(x, _masses("x_masses", x_masses, len(x)))
    other, other_levels = _quantiles(y, _masses("y_masses", y_masses, len(y)))

    def apart(a: float) -> float:
        ends = numpy.concatenate([levels, (other_levels - a) % 1.0, [0.0, 1.0]])
        ends.sort(kind="stable")  # four sorted runs, which timsort merges
        middle, width = (ends[1:] + ends[:-1]) / 2, numpy.diff(ends)
        turns, rest = numpy.divmod(middle + a, 1.0)
        i = numpy.searchsorted(levels, middle).clip(max=len(at) - 1)
        j = numpy.searchsorted(other_levels, rest).clip(max=len(other) - 1)
        return float(width @ (at[i] - other[j] - 2 * numpy.pi * turns) ** 2)

    return max(_least(apart, -1.0, 1.0), 0.0) ** 0.5


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = 128, generator: torch.Generator | None = None
) -> float:
    """``sqrt(mean over directions u of W2(<x, u>, <y, u>)^2)``: no more than the chordal W2 over ``sqrt(d)``.

    The projections are sorted in one batch as large as memory allows; sizes may differ. Rabin et al. 2011.

    Args:
        x: ``(n, d)``; y: ``(m, d)``, rows of unit length, one dtype and device, in which the work is done.
        projections: how many random directions; the Monte Carlo error falls with their square root.
        generator: draws the directions; it lies on the device of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    x, y = _clouds(x, y, wide=False)
    n, m, d = len(x), len(y), x.shape[-1]
    shape = (positive_int("projections", projections), d)
    directions = torch.randn(shape, dtype=torch.float64, device=x.device, generator=generator)
    directions = F.normalize(directions, dim=-1).to(x.dtype)
    ends = torch.cat([torch.arange(1, size + 1, dtype=torch.float64, device=x.device) / size for size in {n, m}])
    ends = ends.sort().values
    width = torch.diff(ends, prepend=ends.new_zeros(1))
    middle = ends - width / 2
    i, j = ((middle * size).long().clamp_max(size - 1) for size in (n, m))
    chunk = max(1, _BYTES // (len(ends) * x.element_size()))
    total = 0.0
    for block in directions.split(chunk):
        p, q = (torch.sort(block @ cloud.T, dim=-1).values for cloud in (x, y))
        difference = p - q if n == m else p[:, i] - q[:, j]
        total += (difference.square().double() * width).sum().item()
    return (total / projections) ** 0.5


def _clouds(x: object, y: object, *, wide: bool = True) -> tuple[Tensor, Tensor]:
    """Both, checked; ``wide``: detached, in float64 on the CPU."""
    x, y = on_sphere("x", x, dim=2), on_sphere("y", y, dim=2)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected {x.shape[-1]} coordinates, as x; got {y.shape[-1]}")
    if wide:
        return x.detach().double().cpu(), y.detach().double().cpu()
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(f"y: expected {x.dtype} on {x.device}, as x; got {y.dtype} on {y.device}")
    return x.detach(), y.detach()


def _costs(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """``(n, m)``; the angle by the atan2 of half-chords, which is exact for near and for opposite points."""
    chord = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if cost == "chordal":
        return chord
    return 2 * torch.atan2(chord, torch.cdist(x, -y, compute_mode="donot_use_mm_for_euclid_dist"))


def _quantiles(x: Tensor, masses: Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The angles in order, and the mass up to and with each."""
    angles, order = torch.atan2(x[:, 1], x[:, 0]).sort()
    levels = masses[order].cumsum(0)
    return angles.numpy(), (levels / levels[-1]).numpy()


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a convex function, by golden sections down to the last bits of its argument."""
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    values = [function(a) for a in inner]
    while high - low > 1e-14:
        if values[0] <= values[1]:
            high, inner = inner[1], [inner[1] - _GOLDEN * (inner[1] - low), inner[0]]
            values = [function(inner[0]), values[0]]
        else:
            low, inner = inner[0], [inner[1], inner[0] + _GOLDEN * (high - inner[0])]
            values = [values[1], function(inner[1])]
    return min(values)
