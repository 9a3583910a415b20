"""Transformers as particles on the unit sphere: fields, energies, flows.

fields, primitives    self-attention and perceptrons as fields, their energies
measures, distances   initial measures, W2 between clouds
circle                the continuum equation on a grid of the circle
"""

from .circle import circle_flow, circle_grid, circle_points, circle_quantiles
from .distances import sliced_wasserstein, wasserstein, wasserstein_circle
from .fields import Field, Perceptron, Scaled, SelfAttention, Sum
from .measures import atomic, samples, uniform, von_mises_fisher
from .primitives import ACTIVATIONS, Activation

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Field",
    "Perceptron",
    "Scaled",
    "SelfAttention",
    "Sum",
    "atomic",
    "circle_flow",
    "circle_grid",
    "circle_points",
    "circle_quantiles",
    "samples",
    "sliced_wasserstein",
    "uniform",
    "von_mises_fisher",
    "wasserstein",
    "wasserstein_circle",
]
