"""The perceptron's activations and their primitives ``phi`` with ``phi' = 2 act``.

The 2 makes the perceptron's field half the gradient of its potential, which puts it on one scale with attention's
energy (Alvarez-Lopez, Geshkovski, Ruiz-Balet 2026, arXiv 2601.21366). Each primitive is twice differentiable by
autograd wherever the activation is once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Activation"]


class Activation(NamedTuple):
    """``act`` and ``phi``, both elementwise; no ``primitive`` where it has no closed form, and then no energy."""

    name: str
    function: Callable[[Tensor], Tensor]
    primitive: Callable[[Tensor], Tensor] | None


def _gelu_primitive(z: Tensor) -> Tensor:
    """``z^2 Phi(z) + z pdf(z) - Phi(z)``. Without the last term the derivative is not 2 gelu."""
    pdf = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return (z * z - 1.0) * torch.special.ndtr(z) + z * pdf


def _tanh_primitive(z: Tensor) -> Tensor:
    """``2 log cosh z``; logaddexp does not overflow, and is smooth at 0 where |z| is not."""
    return 2.0 * (torch.logaddexp(z, -z) - math.log(2.0))


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("relu", F.relu, lambda z: F.relu(z).square()),
        Activation("gelu", F.gelu, _gelu_primitive),
        Activation("gelu_tanh", lambda z: F.gelu(z, approximate="tanh"), None),
        Activation("tanh", torch.tanh, _tanh_primitive),
        Activation("identity", lambda z: z, torch.square),
    )
}
