"""Transformers as particles on the unit sphere: fields, energies, flows.

fields, primitives    self-attention and perceptrons as fields, their energies
"""

from .fields import Field, Perceptron, Scaled, SelfAttention, Sum
from .primitives import ACTIVATIONS, Activation

__all__ = ["ACTIVATIONS", "Activation", "Field", "Perceptron", "Scaled", "SelfAttention", "Sum"]
