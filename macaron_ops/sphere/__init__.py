"""Transformers as particles on the unit sphere: fields, energies, flows, critical points.

fields, primitives      self-attention and perceptrons as fields, their energies
normalization           where layers normalise, as laws of speed
simulate, flows         particles along a field; steps
observers               what is measured on the way
trajectory, checkpoint  files
exact                   what theory gives for comparison
measures, distances     initial measures, W2 between clouds
circle                  the continuum equation on a grid of the circle
critical_points, hessian, potential, atoms, bounds    where flows end, of what kind that is, what it is made of
phase_diagram           clustering against time and temperature
pictures                all of it drawn
"""

from .atoms import Atoms, atoms, cluster_threshold
from .bounds import cluster_mass_bound, heaviest_arc
from .circle import circle_flow, circle_grid, circle_points, circle_quantiles
from .critical_points import CriticalPoint, find_critical_points
from .distances import sliced_wasserstein, wasserstein, wasserstein_circle
from .exact import orthonormal_product, single_cluster_bound, speed_at_orthonormal, time_to_product
from .fields import Field, Perceptron, Scaled, SelfAttention, Sum
from .hessian import hessian
from .measures import atomic, samples, uniform, von_mises_fisher
from .normalization import NORMALIZATIONS, Normalization
from .observers import OBSERVERS, Snapshot, clusters, effective_rank, inner_products, mean_product, smallest_product
from .phase_diagram import PhaseDiagram, phase_diagram
from .potential import potential_maximum
from .primitives import ACTIVATIONS, Activation
from .random_fields import random_perceptron
from .simulate import simulate
from .trajectory import Trajectory

__all__ = [
    "ACTIVATIONS",
    "NORMALIZATIONS",
    "OBSERVERS",
    "Activation",
    "Atoms",
    "CriticalPoint",
    "Field",
    "Normalization",
    "Perceptron",
    "PhaseDiagram",
    "Scaled",
    "SelfAttention",
    "Snapshot",
    "Sum",
    "Trajectory",
    "atomic",
    "atoms",
    "circle_flow",
    "circle_grid",
    "circle_points",
    "circle_quantiles",
    "cluster_mass_bound",
    "cluster_threshold",
    "clusters",
    "effective_rank",
    "find_critical_points",
    "heaviest_arc",
    "hessian",
    "inner_products",
    "mean_product",
    "orthonormal_product",
    "phase_diagram",
    "potential_maximum",
    "random_perceptron",
    "samples",
    "simulate",
    "single_cluster_bound",
    "sliced_wasserstein",
    "smallest_product",
    "speed_at_orthonormal",
    "time_to_product",
    "uniform",
    "von_mises_fisher",
    "wasserstein",
    "wasserstein_circle",
]
