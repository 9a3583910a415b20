"""Transformers as particles on the unit sphere: fields, energies, flows.

fields, primitives      self-attention and perceptrons as fields, their energies
normalization           where layers normalise, as laws of speed
simulate, flows         particles along a field; steps
observers               what is measured on the way
trajectory, checkpoint  files
exact                   what theory gives for comparison
phase_diagram           clustering against time and temperature
pictures                all of it drawn
"""

from .exact import orthonormal_product, single_cluster_bound, speed_at_orthonormal, time_to_product
from .fields import Field, Perceptron, Scaled, SelfAttention, Sum
from .normalization import NORMALIZATIONS, Normalization
from .observers import OBSERVERS, Snapshot, clusters, effective_rank, inner_products, mean_product, smallest_product
from .primitives import ACTIVATIONS, Activation
from .simulate import simulate
from .trajectory import Trajectory

__all__ = [
    "ACTIVATIONS",
    "NORMALIZATIONS",
    "OBSERVERS",
    "Activation",
    "Field",
    "Normalization",
    "Perceptron",
    "Scaled",
    "SelfAttention",
    "Snapshot",
    "Sum",
    "Trajectory",
    "clusters",
    "effective_rank",
    "inner_products",
    "mean_product",
    "orthonormal_product",
    "simulate",
    "single_cluster_bound",
    "smallest_product",
    "speed_at_orthonormal",
    "time_to_product",
]
