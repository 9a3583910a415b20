"""The atoms of a cloud: groups of particles that are chained together by short distances, as positions and masses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from macaron_ops.ops.checks import positive_int

from .checks import positive
from .measures import on_sphere

__all__ = ["Atoms", "atoms", "cluster_threshold"]

_BLOCK = 2**22  # pairs that are looked at at a time


class Atoms(NamedTuple):
    """``positions (k, d)``, of unit length, and ``masses (k,)`` of sum 1, the heaviest first; ``labels (n,)``: which
    atom a particle belongs to; ``diameters (k,)``: the largest angle between an atom's position and its particles,
    twice, which bounds the angle between any two of them."""

    positions: Tensor
    masses: Tensor
    labels: Tensor
    diameters: Tensor


def atoms(x: Tensor, threshold: float) -> Atoms:
    """Single linkage: two particles belong to one atom where a chain of particles leads from one to the other whose
    links are angles of at most ``threshold``. An atom lies at the normalised mean of its particles.

    Linear memory, and the time of all pairs: 100,000 particles take some seconds.

    Args:
        x: ``(n, d)``, rows of unit length.
        threshold: in radians; :func:`cluster_threshold` has the published one.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    x = on_sphere("x", x, dim=2).detach()
    reach = 2 * math.sin(min(positive("threshold", threshold), math.pi) / 2)
    labels = torch.full((len(x),), -1, dtype=torch.long, device=x.device)
    found = 0
    while len(free := (labels < 0).nonzero().flatten()):
        front = free[:1]
        labels[front] = found
        while len(front) and len(free := (labels < 0).nonzero().flatten()):
            front = free[_near(x[free], x[front], reach)]
            labels[front] = found
        found += 1
    masses = torch.bincount(labels).double() / len(x)
    order = masses.argsort(descending=True, stable=True)
    labels = order.argsort()[labels]
    centres = x.new_zeros(found, x.shape[-1], dtype=torch.float64).index_add_(0, labels, x.double())
    centres = centres / centres.norm(dim=-1, keepdim=True)
    chord = (x.double() - centres[labels]).norm(dim=-1).clamp_max(2)
    farthest = masses.new_zeros(found).scatter_reduce_(0, labels, chord, "amax")
    return Atoms(centres.to(x.dtype), masses[order], labels, 4 * torch.asin(farthest / 2))


def cluster_threshold(beta: float, d: int, c: float = 1.0) -> float:
    """``min(c / sqrt(beta), pi / (2 d))`` in radians (Alvarez-Lopez, Geshkovski, Ruiz-Balet 2026, arXiv 2601.21366)."""
    return min(positive("c", c) / math.sqrt(positive("beta", beta)), math.pi / (2 * positive_int("d", d)))


def _near(points: Tensor, front: Tensor, reach: float) -> Tensor:
    """Which points are within ``reach`` of one of the front."""
    near = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for block in front.split(max(1, _BLOCK // len(points))):
        near |= (torch.cdist(points, block, compute_mode="donot_use_mm_for_euclid_dist") <= reach).any(-1)
    return near
