"""Transformers as particles on the unit sphere: fields, energies, flows.

fields, primitives    self-attention and perceptrons as fields, their energies
measures, distances   initial measures, W2 between clouds
circle                the continuum equation on a grid of the circle
critical_points, hessian, potential, atoms, bounds    where flows end, of what kind that is, what it is made of
"""

from .atoms import Atoms, atoms, cluster_threshold
from .bounds import cluster_mass_bound, heaviest_arc
from .circle import circle_flow, circle_grid, circle_points, circle_quantiles
from .critical_points import CriticalPoint, find_critical_points
from .distances import sliced_wasserstein, wasserstein, wasserstein_circle
from .fields import Field, Perceptron, Scaled, SelfAttention, Sum
from .hessian import hessian
from .measures import atomic, samples, uniform, von_mises_fisher
from .potential import potential_maximum
from .primitives import ACTIVATIONS, Activation
from .random_fields import random_perceptron

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Atoms",
    "CriticalPoint",
    "Field",
    "Perceptron",
    "Scaled",
    "SelfAttention",
    "Sum",
    "atomic",
    "atoms",
    "circle_flow",
    "circle_grid",
    "circle_points",
    "circle_quantiles",
    "cluster_mass_bound",
    "cluster_threshold",
    "find_critical_points",
    "heaviest_arc",
    "hessian",
    "potential_maximum",
    "random_perceptron",
    "samples",
    "sliced_wasserstein",
    "uniform",
    "von_mises_fisher",
    "wasserstein",
    "wasserstein_circle",
]
