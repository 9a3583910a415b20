"""Transformers as interacting particles on the unit sphere."""

from .distances import sliced_wasserstein, wasserstein, wasserstein_circle
from .measures import atomic, samples, uniform, von_mises_fisher

__all__ = [
    "atomic",
    "samples",
    "sliced_wasserstein",
    "uniform",
    "von_mises_fisher",
    "wasserstein",
    "wasserstein_circle",
]
