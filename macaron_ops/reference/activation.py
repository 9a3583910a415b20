"""The FFN's activations and their gradients.

relu, gelu (erf), gelu_tanh, silu            (..., F)  -> (..., F)
swiglu = silu(gate) * up, geglu = gelu(gate) * up      (..., 2F) -> (..., F), gate channels first
                                                       Shazeer 2020, arXiv 2002.05202
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "GATED", "activate", "activate_backward"]

_FORWARD = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
_BACKWARD = {
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0.0),
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward.default,
}
GATED = {"swiglu": "silu", "geglu": "gelu"}
ACTIVATIONS = (*_FORWARD, *GATED)


def activate(z: Tensor, activation: str | Callable[[Tensor], Tensor]) -> Tensor:
    """The activation of the pre-activation ``z``; a callable is applied as it is."""
    if callable(activation):
        return activation(z)
    if activation in GATED:
        gate, up = z.chunk(2, dim=-1)
        return _FORWARD[GATED[activation]](gate) * up
    return _FORWARD[activation](z)


def activate_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient in ``z``."""
    if activation in GATED:
        gate, up = z.chunk(2, dim=-1)
        name = GATED[activation]
        return torch.cat([_BACKWARD[name](grad * up, gate), grad * _FORWARD[name](gate)], dim=-1)
    return _BACKWARD[activation](grad, z)
