"""Initial measures on the unit sphere, as clouds of particles.

Every sampler draws in float64 from one ``torch.Generator`` and rounds once: a seed gives the same cloud in every dtype.
A cloud has shape ``(*batch, n, d)`` and rows of unit length.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from macaron_ops.ops.checks import number, positive_int

from .checks import points_on_sphere

__all__ = ["atomic", "on_sphere", "samples", "uniform", "von_mises_fisher"]


def uniform(
    n: int,
    d: int,
    *,
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(*batch, n, d)`` independent points, uniform on ``S^{d-1}``.

    Args:
        n, d: at least 1 and 2. batch: leading sizes, each its own cloud.
        dtype: of the result. device: where it lies; a generator has to be there, too.

    Raises:
        ValueError, TypeError: a size is no positive integer.
    """
    shape = (*(positive_int("batch", size) for size in batch), positive_int("n", n), _dimension(d))
    points = torch.randn(shape, dtype=torch.float64, device=device, generator=generator)
    return F.normalize(points, dim=-1).to(dtype)


def von_mises_fisher(
    n: int,
    mean: Tensor,
    concentration: float,
    *,
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(*batch, n, d)`` independent points with the density ``exp(concentration <mean, x>)`` up to a constant.

    The component along the mean is drawn by Wood's rejection (A. Wood 1994, Comm. Stat. Simulation 23:157), which
    accepts about two of three proposals or more. Its Beta variable is ``(1 + t) / 2`` with t a
    coordinate of a uniform point, and ``1 - w^2`` is formed without cancellation: concentrations of 1e12 work.

    Args:
        mean: ``(d,)``, of unit length, on the device of the result.
        concentration: at least 0 (uniform).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    mean = on_sphere("mean", mean, dim=1).double()
    kappa, d = number("concentration", concentration, minimum=0.0), _dimension(mean.shape[-1])
    shape = (*(positive_int("batch", size) for size in batch), positive_int("n", n))
    count, found, have = math.prod(shape), [], 0
    draw = {"dtype": torch.float64, "device": mean.device, "generator": generator}
    b = (d - 1) / (2 * kappa + math.hypot(2 * kappa, d - 1))
    while have < count:
        z = (1 + F.normalize(torch.randn(count, d, **draw), dim=-1)[:, 0]) / 2
        scale = 1 / (1 - (1 - b) * z)
        w, across = (1 - (1 + b) * z) * scale, 2 * (b * z * (1 - z)).clamp_min(0).sqrt() * scale
        # Wood's kappa (w - w0) + (d - 1) log((1 - w0 w) / (1 - w0^2)) with w0 = (1 - b) / (1 + b), w put in
        tilt = (1 - 2 * z) * scale
        log_ratio = kappa * 2 * b / (1 + b) * tilt + (d - 1) * torch.log1p(-(1 - b) / 2 * tilt)
        accepted = log_ratio >= torch.rand(count, **draw).log()
        found.append(torch.stack([w, across], dim=-1)[accepted])
        have += len(found[-1])
    w, across = torch.cat(found)[:count].unbind(-1)
    sideways = torch.randn(count, d, **draw)
    sideways = F.normalize(sideways - (sideways @ mean)[:, None] * mean, dim=-1)
    points = w[:, None] * mean + across[:, None] * sideways
    return F.normalize(points, dim=-1).reshape(*shape, d).to(dtype)


def atomic(n: int, positions: Tensor, masses: Tensor | None = None) -> Tensor:
    """``(n, d)``: n particles on k atoms, as near to the masses as n equal particles can be (largest remainders).

    Args:
        positions: ``(k, d)``, of unit length. masses: ``(k,)``, positive, of any sum; None: all the same.

    Raises:
        ValueError, TypeError: an argument does not fit, or an atom would get no particle.
    """
    positions = on_sphere("positions", positions, dim=2)
    k = len(positions)
    masses = _masses("masses", masses, k)
    share = positive_int("n", n) * masses
    counts = share.floor().long()
    left = n - int(counts.sum())
    counts[(share - counts).argsort(descending=True, stable=True)[:left]] += 1
    if int(counts.min()) == 0:
        raise ValueError(f"n: expected enough particles for each of the {k} atoms; got {n}, which leaves one empty")
    return positions.repeat_interleave(counts.to(positions.device), dim=0)


def samples(points: Tensor, n: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """``(n, d)``: the user's own points; n of them drawn with replacement, or all where n is None.

    Raises:
        ValueError, TypeError: the points are not ``(m, d)`` with rows of unit length, or n is no positive integer.
    """
    points = on_sphere("points", points, dim=2)
    if n is None:
        return points
    drawn = torch.randint(len(points), (positive_int("n", n),), device=points.device, generator=generator)
    return points[drawn]


def on_sphere(name: str, x: object, *, dim: int | None = None) -> Tensor:
    """``x``, which has at least one row, and rows of unit length up to the rounding of its dtype.

    Args:
        name: of the argument, for the message. dim: the number of dimensions; None: two or more.

    Raises:
        TypeError: no floating tensor. ValueError: another shape, no row, a row not finite or not of unit length.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating tensor; got {got}")
    if x.dim() < 2 if dim is None else x.dim() != dim:
        shape = {None: "(..., n, d)", 1: "(d,)", 2: "(n, d)", 3: "(starts, n, d)"}[dim]
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(x.shape)}")
    if x.numel() == 0 or x.shape[-1] < 2:
        raise ValueError(f"{name}: expected at least one point and two coordinates; got shape {tuple(x.shape)}")
    points_on_sphere(name, x if x.dim() > 1 else x[None])
    return x


def _dimension(d: object) -> int:
    if positive_int("d", d) < 2:
        raise ValueError(f"d: expected at least 2, the circle; got {d}")
    return d


def _masses(name: str, masses: object, k: int) -> Tensor:
    """``(k,)`` in float64 on the CPU, with sum 1."""
    if masses is None:
        return torch.full((k,), 1 / k, dtype=torch.float64)
    if not isinstance(masses, Tensor) or tuple(masses.shape) != (k,):
        got = tuple(masses.shape) if isinstance(masses, Tensor) else type(masses).__name__
        raise ValueError(f"{name}: expected a tensor of shape ({k},); got {got}")
    masses = masses.detach().double().cpu()
    if not (masses.isfinite().all() and (masses >= 0).all() and masses.sum() > 0):
        raise ValueError(f"{name}: expected finite numbers of at least 0 with a positive sum")
    return masses / masses.sum()
