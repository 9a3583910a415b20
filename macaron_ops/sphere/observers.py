"""What is measured of particles while they move: functions of a snapshot, ``(...)`` or ``(..., k)`` for a batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import particles
from .fields import Field

__all__ = [
    "OBSERVERS",
    "Observer",
    "Snapshot",
    "clusters",
    "effective_rank",
    "inner_products",
    "mean_product",
    "smallest_product",
]

CLOSE = (
    0.9999  # the inner product from which on two particles are one cluster: arXiv 2312.10794's code has rank(> .9999)
)
_ROWS = 1024  # particles whose products with all others exist at a time
BINS = 64
MASSES = 16


class Snapshot(NamedTuple):
    """What an observer sees.

    Attributes:
        t: the time. points: ``(..., n, d)``, unit rows. drift: ``(...)``, the largest way that a particle went in the
            last step, over the step; NaN at the start.
    """

    t: float
    points: Tensor
    drift: Tensor


Observer = Callable[[Field, Snapshot], Tensor]


def smallest_product(x: Tensor) -> Tensor:
    """The smallest inner product of two particles; n^2 products, never all in memory."""
    return torch.stack([block.amin((-1, -2)) for block in _products(x)]).amin(0)


def mean_product(x: Tensor) -> Tensor:
    """The mean inner product of two different particles, from the length of their sum; 1 for a single one."""
    n = particles(x).shape[-2]
    total = x.sum(-2).square().sum(-1)
    return (total - x.square().sum((-1, -2))) / (n * (n - 1)) if n > 1 else torch.ones_like(total)


def inner_products(x: Tensor, bins: int = BINS) -> Tensor:
    """The share of ordered pairs of different particles in each of ``bins`` equal bins of their product on [-1, 1]."""
    n = particles(x).shape[-2]
    counts = x.new_zeros(*x.shape[:-2], bins, dtype=torch.int64)
    for block in _products(x):
        place = ((block + 1.0) * (bins / 2)).to(torch.int64).clamp_(0, bins - 1).flatten(-2)
        counts.scatter_add_(-1, place, torch.ones_like(place))
    own = ((x.square().sum(-1) + 1.0) * (bins / 2)).to(torch.int64).clamp_(0, bins - 1)
    counts.scatter_add_(-1, own, -torch.ones_like(own))  # each with itself
    return counts.double() / max(n * (n - 1), 1)


def clusters(x: Tensor, close: float = CLOSE, most: int = 256) -> tuple[Tensor, Tensor]:
    """Clusters, found by leaders: the first particle without a cluster leads all those without one whose product with
    it is above ``close``.

    In particles that have gathered these are the clusters; of particles that have not it is a covering.

    Args:
        most: leaders that are looked for; particles beyond have no cluster.

    Returns:
        ``labels (..., n)``, -1 without a cluster, and ``masses (..., most)``, the clusters' shares of the particles in
        falling order, 0 where there are fewer.
    """
    particles(x)
    labels = torch.full(x.shape[:-1], -1, device=x.device)
    masses = []
    for label in range(most):
        free = labels < 0
        if not free.any():
            break
        leader = free.to(torch.int8).argmax(-1, keepdim=True)
        there = torch.take_along_dim(x, leader.unsqueeze(-1), dim=-2)
        led = free & ((x * there).sum(-1) > close)
        led |= torch.zeros_like(led).scatter(-1, leader, free.any(-1, keepdim=True))
        labels = torch.where(led, label, labels)
        masses.append(led.double().mean(-1))
    found = torch.stack(masses, -1).sort(-1, descending=True).values
    return labels, torch.nn.functional.pad(found, (0, most - found.shape[-1]))


def effective_rank(x: Tensor) -> Tensor:
    """``exp`` of the entropy of the singular values over their sum (Roy, Vetterli 2007, EUSIPCO): from 1 for particles
    on one line to d."""
    x = particles(x).double()
    gram = x.mT @ x if x.shape[-1] <= x.shape[-2] else x @ x.mT
    share = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    share = share / share.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def _products(x: Tensor):
    """``<x_i, x_j>`` in blocks of rows."""
    for rows in particles(x).split(_ROWS, dim=-2):
        yield rows @ x.mT


def _count(field: Field, seen: Snapshot) -> Tensor:
    labels, _ = clusters(seen.points)
    return labels.amax(-1) + 1


OBSERVERS: dict[str, Observer] = {
    "energy": lambda field, seen: field.energy(seen.points),
    "drift": lambda field, seen: seen.drift,
    "smallest_product": lambda field, seen: smallest_product(seen.points),
    "mean_product": lambda field, seen: mean_product(seen.points),
    "clusters": _count,
    "masses": lambda field, seen: clusters(seen.points)[1][..., :MASSES],
    "effective_rank": lambda field, seen: effective_rank(seen.points),
    "histogram": lambda field, seen: inner_products(seen.points),
}
