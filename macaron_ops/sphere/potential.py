"""The perceptron's potential on the circle and on S^2: grids, and where it is largest."""

import math

import torch
from torch import Tensor

from .critical_points import newton, rotations
from .fields import Perceptron

__all__ = ["covering_grid", "potential_maximum"]


def potential_maximum(perceptron: Perceptron) -> tuple[Tensor, float]:
    """``(point (d,), value)``: where the perceptron's potential v is largest on the circle or on S^2, and v there.

    The 16 best points of a grid (4096 on the circle, 16384 on a Fibonacci lattice on S^2) are polished by Newton's
    method; a neuron sharper than the grid may hide a higher one.

    Raises:
        ValueError, TypeError: not a perceptron of 2 or 3 coordinates, or one without a potential.
    """
    if not isinstance(perceptron, Perceptron):
        raise TypeError(f"perceptron: expected a Perceptron; got {perceptron!r}")
    grid = covering_grid(perceptron.a.shape[-1]).to(perceptron.a.device)
    best = perceptron.potential(grid).topk(16).indices
    candidates = grid[best]
    turns = rotations(perceptron, candidates[:1])
    polished = [newton(perceptron, start[None], 50, 1e-12, climb=True, turns=turns) for start in candidates]
    candidates = torch.cat([candidates, *(point.x for point in polished if point is not None)])
    values = perceptron.potential(candidates)
    top = int(values.argmax())
    return candidates[top], values[top].item()


def covering_grid(d: int) -> Tensor:
    """Points that leave no large gap: even angles on the circle, a Fibonacci lattice on S^2."""
    if d == 2:
        angle = 2 * math.pi * torch.arange(4096, dtype=torch.float64) / 4096
        return torch.stack([angle.cos(), angle.sin()], dim=-1)
    if d == 3:
        count = 16384
        i = torch.arange(count, dtype=torch.float64)
        z, turn = 1 - (2 * i + 1) / count, i * math.pi * (3 - math.sqrt(5.0))
        r = (1 - z * z).sqrt()
        return torch.stack([r * turn.cos(), r * turn.sin(), z], dim=-1)
    raise ValueError(f"perceptron: expected one on the circle or on S^2, d = 2 or 3; got d = {d}")
