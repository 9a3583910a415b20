"""Critical points of a field's energy, and of what kind they are.

    flow      x <- S(x + h P_x u), h for each start by what its energy says, until it hardly moves
    polish    Newton's method on the product of spheres, on the modes whose eigenvalue is not 0, each uphill
    test      the eigenvalues of the Riemannian Hessian of ``n E``: all negative, up to rotations that change nothing,
              at a strict maximum, where the flow of the field ends

Everything is float64.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from macaron_ops.ops.checks import positive_int
from macaron_ops.splitting import to_sphere

from .atoms import Atoms, atoms
from .checks import positive
from .fields import Field, SelfAttention
from .hessian import gradient, gradient_scale, hessian
from .measures import on_sphere, uniform
from .parts import parts

__all__ = ["CriticalPoint", "find_critical_points", "newton", "rotations"]

_NULL = 1e-9  # of the largest eigenvalue: below, a mode is one that nothing holds
_SAME = 1e-6  # relative: energies and spectra of points that are one up to rotations and the particles' order
_LONGEST = 0.3  # radians that a Newton step may move a particle


@dataclass(frozen=True)
class CriticalPoint:
    """A stationary cloud.

    Attributes:
        x: ``(n, d)``. energy: E there. residual: the largest ``|n grad E|`` of a particle.
        eigenvalues: ``(n (d - 1),)``, of the Riemannian Hessian of ``n E``, ascending. Along unnormalised attention and
            perceptrons they are the rates at which perturbations grow; under softmax attention the rates have the same
            signs.
        nullity: how many of them are 0, to ``1e-9`` of the largest. symmetry: how many of those are
            rotations of the whole cloud under which the energy of every cloud stays.
        starts: how many of the starts ended here, up to rotations and the order of the particles.
    """

    x: Tensor
    energy: float
    residual: float
    eigenvalues: Tensor
    nullity: int
    symmetry: int
    starts: int = 1

    @property
    def index(self) -> int:
        """The number of directions in which the energy rises."""
        return int((self.eigenvalues > self._null).sum())

    @property
    def kind(self) -> str:
        """``"maximum"`` or ``"minimum"``, strict up to rotations; ``"saddle"``; ``"degenerate"``: the second order
        does not tell."""
        falls = len(self.eigenvalues) - self.index - self.nullity
        if self.index and falls:
            return "saddle"
        if self.nullity > self.symmetry:
            return "degenerate"
        return "minimum" if self.index else "maximum"

    @property
    def stable(self) -> bool:
        """Whether the flow of the field comes back after any small perturbation, up to a rotation."""
        return self.kind == "maximum"

    def atoms(self, threshold: float = 1e-3) -> Atoms:
        """Its :func:`~macaron_ops.sphere.atoms`, by an angle."""
        return atoms(self.x, threshold)

    @property
    def _null(self) -> float:
        return _NULL * self.eigenvalues.abs().max().item()


def find_critical_points(
    field: Field,
    n: int | None = None,
    d: int | None = None,
    *,
    starts: int = 16,
    x0: Tensor | None = None,
    steps: int = 500,
    polish: int = 200,
    tolerance: float = 1e-10,
    generator: torch.Generator | None = None,
) -> list[CriticalPoint]:
    """Critical points of the field's energy that flows from many starts lead to, of different energy or spectrum.

    Flow and polish climb, to maxima, or to saddles on which particles have met exactly; with ``steps=0`` the bare
    Newton's method starts at once, and ends at critical points of every kind. ``-field`` asks for what the descent
    finds.

    Example::

        for point in find_critical_points(SelfAttention(4.0, weighting="unnormalized"), n=12, d=2):
            print(point.kind, point.energy, point.atoms().masses)

    Args:
        field: with an energy that its velocity climbs particle by particle: attention with symmetric Q^T K = V and no
            causal mask, perceptrons, sums of unnormalised attention and perceptrons, multiples.
        n, d: particles and coordinates of ``starts`` uniform starts; or
        x0: ``(starts, n, d)``, the starts themselves, rows of unit length.
        steps: of the flow, at most; 0: no flow. polish: steps of Newton's method, at most.
        tolerance: of the largest ``|n grad E|`` of a particle, in units of the largest ``|n dE/dx|`` of the start.
        generator: draws the starts.

    Returns:
        The highest energy first. Starts that Newton's method does not bring to ``tolerance`` are not among them: the
        attributes ``starts`` then sum to less than their number.

    Raises:
        ValueError, TypeError: an argument does not fit, the field has no energy, or does not climb it.
    """
    positive("tolerance", tolerance)
    polish = positive_int("polish", polish)
    if steps != 0:
        positive_int("steps", steps)
    x = _starts(n, d, starts, x0, generator)
    _require_gradient(field, x)
    x = _flow(field, x, steps, tolerance)
    turns, found = rotations(field, x), []
    for start in x:
        point = newton(field, start, polish, tolerance, climb=steps > 0, turns=turns)
        if point is None:
            continue
        same = next((i for i, other in enumerate(found) if _same(point, other)), None)
        if same is None:
            found.append(point)
        else:
            found[same] = replace(found[same], starts=found[same].starts + 1)
    return sorted(found, key=lambda point: -point.energy)


def _starts(n: int | None, d: int | None, starts: int, x0: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if x0 is None:
        if n is None or d is None:
            raise ValueError("n, d: expected both, or x0")
        return uniform(n, d, batch=(positive_int("starts", starts),), generator=generator)
    if n is not None or d is not None:
        raise ValueError("x0: expected None where n and d are given")
    return on_sphere("x0", x0, dim=3).detach().double()


def _require_gradient(field: Field, x: Tensor) -> None:
    """That the velocity is a positive multiple, for each particle, of the gradient of the energy."""
    if not isinstance(field, Field):
        raise TypeError(f"field: expected a Field; got {field!r}")
    added = [part for _, part in parts(field)]
    softmax = [part for part in added if isinstance(part, SelfAttention) and part.weighting == "softmax"]
    if softmax and (len(added) > 1 or softmax[0].heads > 1):
        raise ValueError(
            f"field: expected one that climbs its energy; got {field!r}, where each head of softmax attention has a "
            "metric of its own: weighting='unnormalized' has one scale for heads and perceptrons"
        )
    x = uniform(*x.shape[-2:], generator=torch.Generator().manual_seed(0)).to(x.device)  # at a start both may be 0
    velocity, slope = field(x), gradient(field, x)
    if not (velocity.isfinite().all() and slope.isfinite().all()):
        raise ValueError(
            f"field: expected finite velocities; got {field!r}, which leaves float64 (unnormalised weights, exp(beta), "
            "do so past beta = 709)"
        )
    along = (velocity * slope).sum(-1)
    across = velocity - (along / slope.square().sum(-1).clamp_min(1e-300)).unsqueeze(-1) * slope
    if across.norm() > 1e-6 * velocity.norm() or (along < -1e-6 * velocity.norm() * slope.norm()).any():
        raise ValueError(
            f"field: expected one that climbs its energy; got {field!r}, whose velocity has another direction"
        )


@torch.no_grad()
def _flow(field: Field, x: Tensor, steps: int, tolerance: float) -> Tensor:
    """Where each start ``(starts, n, d)`` ends. A step that lowers the energy is taken again with half its length."""
    if steps == 0:
        return x
    energy, velocity = field.energy(x), field(x)
    fastest = velocity.norm(dim=-1).amax(-1)
    at_first = fastest.max().item() or 1.0
    h = 0.1 / fastest.clamp_min(1e-3 * at_first)
    for _ in range(steps):
        tried = to_sphere(x + h[:, None, None] * velocity)
        reached = field.energy(tried)
        better = reached >= energy - 1e-14 * energy.abs()
        x = torch.where(better[:, None, None], tried, x)
        energy, h = torch.where(better, reached, energy), torch.where(better, 1.2 * h, 0.5 * h)
        velocity = field(x)
        if velocity.norm(dim=-1).max() <= 1e3 * tolerance * at_first:
            break
    return x


def newton(
    field: Field, x: Tensor, steps: int, tolerance: float, *, climb: bool, turns: Tensor
) -> CriticalPoint | None:
    """The critical point that Newton's method comes to from ``(n, d)``; None where it does not within the steps.

    ``climb``: every mode's step is uphill, whatever the sign of its eigenvalue, which ends at a maximum. ``turns``: the
    field's :func:`rotations`.
    """
    scale = gradient_scale(field, x)
    for _ in range(steps + 1):
        slope, matrix, basis = hessian(field, x)
        residual = slope.norm(dim=-1).max().item()
        values, modes = torch.linalg.eigh(matrix)
        if residual <= tolerance * scale:
            return _point(field, turns, x, residual, values, basis)
        held = values.abs() > _NULL * values.abs().max()
        coordinates = modes.T @ (basis.mT @ slope.unsqueeze(-1)).flatten()
        move = modes @ torch.where(held, coordinates / (values.abs() if climb else -values), 0.0)
        move = (basis @ move.reshape(len(x), -1, 1)).squeeze(-1)
        longest = move.norm(dim=-1).max().item()
        if not math.isfinite(longest) or longest == 0.0:
            return None
        x = _shorter(field, x, move * min(1.0, _LONGEST / longest), residual, climb)
    return None


def _shorter(field: Field, x: Tensor, move: Tensor, residual: float, climb: bool) -> Tensor:
    """The step, halved until the gradient falls or, where it is to ``climb``, the energy rises; whole where that never
    happens, to leave where Newton's method is stuck."""
    energy = field.energy(x)
    slack = 1e-13 * energy.abs()  # what rounding may take near the top
    for halvings in range(8):
        tried = to_sphere(x + 0.5**halvings * move)
        gain = field.energy(tried) - energy
        if climb and gain > slack:
            return tried
        if (not climb or gain >= -slack) and gradient(field, tried).norm(dim=-1).max() < residual:
            return tried
    return to_sphere(x + move)


def _point(field: Field, turns: Tensor, x: Tensor, residual: float, values: Tensor, basis: Tensor) -> CriticalPoint:
    null = values.abs() <= _NULL * values.abs().max()
    moved = (basis.mT @ torch.einsum("kde,ne->knd", turns, x).unsqueeze(-1)).flatten(1)
    symmetry = int((torch.linalg.svdvals(moved) > 1e-6 * math.sqrt(len(x))).sum()) if len(turns) else 0
    return CriticalPoint(x, field.energy(x).item(), residual, values, int(null.sum()), symmetry)


def rotations(field: Field, x: Tensor) -> Tensor:
    """``(s, d, d)``: a basis of the rotations, as skew matrices, that change the energy of no cloud of the shape of x.

    They are what the gradients at random clouds are orthogonal to.
    """
    n, d = x.shape[-2:]
    rows, columns = torch.triu_indices(d, d, 1)
    turns = torch.zeros(len(rows), d, d, dtype=torch.float64)
    turns[range(len(rows)), rows, columns], turns[range(len(rows)), columns, rows] = 1.0, -1.0
    clouds = uniform(n, d, batch=(2 * len(rows) + 2,), generator=torch.Generator().manual_seed(0)).to(x.device)
    turns, slopes = turns.to(x.device), gradient(field, clouds)
    rises = torch.einsum("tnd,kde,tne->tk", slopes, turns, clouds)
    _, values, modes = torch.linalg.svd(rises)
    still = values <= 1e-9 * slopes.norm(dim=(-2, -1)).max()
    return torch.einsum("sk,kde->sde", modes[still], turns)


def _same(a: CriticalPoint, b: CriticalPoint) -> bool:
    largest = b.eigenvalues.abs().max().item()
    spectra = (a.eigenvalues - b.eigenvalues).abs().max().item()
    return spectra <= _SAME * largest and abs(a.energy - b.energy) <= _SAME * max(abs(b.energy), largest / len(b.x))
