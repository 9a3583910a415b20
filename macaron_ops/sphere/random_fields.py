"""Random perceptrons of a given size, as experiments draw them."""

import torch

from macaron_ops.ops.checks import number, positive_int
from macaron_ops.splitting import to_sphere

from .fields import Perceptron
from .primitives import Activation

__all__ = ["random_perceptron"]


def random_perceptron(
    k: int,
    d: int,
    activation: str | Activation = "relu",
    *,
    size: float = 1.0,
    bias: float = 0.0,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Perceptron:
    """``sum_j w_j act(a_j . x + b_j) a_j`` with directions uniform on the sphere, in float64.

    Args:
        k: neurons. d: coordinates.
        size: what the normal weights are scaled to, ``sum_j |w_j|``; with an activation of slope at most 1 it is a
            Lipschitz constant of ``u``.
        bias: standard deviation of the b_j.
        generator: lies on the device.
    """
    draw = {"dtype": torch.float64, "device": device, "generator": generator}
    a = to_sphere(torch.randn(positive_int("k", k), positive_int("d", d), **draw))
    b, w = torch.randn(2, k, **draw)
    return Perceptron(a, number("bias", bias, minimum=0.0) * b, number("size", size) * w / w.abs().sum(), activation)
