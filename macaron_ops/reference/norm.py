"""The normalisations N(x) over the last dimension, and their gradients.

    layer    (x - mean(x)) / sqrt(var(x) + eps)        var biased              Ba et al. 2016, arXiv 1607.06450
    rms      x / sqrt(mean(x^2) + eps)                                         Zhang, Sennrich 2019, arXiv 1910.07467
    sphere   S(x) = x / max(|x|, eps)                  the retraction to the unit sphere
    None     x

each followed by ``* weight + bias`` where they are given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import sum_rows

__all__ = ["NORMS", "normalize", "normalize_backward", "unit", "unit_backward"]

NORMS = ("layer", "rms", "sphere", None)


def unit(x: Tensor, eps: float) -> Tensor:
    """``S(x) = x / max(|x|, eps)``."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def unit_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """``(g - y <g, y>) / |x|`` with ``y = S(x)``; ``g / eps`` inside the ball of radius ``eps``."""
    length = x.norm(dim=-1, keepdim=True)
    y = x / length.clamp_min(eps)
    radial = torch.where(length >= eps, (grad * y).sum(-1, keepdim=True), 0.0)
    return (grad - y * radial) / length.clamp_min(eps)


def _standardize(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` normalised without weight or bias, and what they were multiplied by ``(..., 1)``."""
    if norm == "layer":
        y, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    elif norm == "rms":
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y = x * rstd
    else:
        rstd = x.norm(dim=-1, keepdim=True).clamp_min(eps).reciprocal()
        y = x * rstd
    return y, rstd


def normalize(x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``N(x) * weight + bias`` over the last dimension of ``x (..., D)``; ``weight`` and ``bias`` are ``(D,)``."""
    if norm is None:
        return x
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y, _ = _standardize(x, norm, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    norm: str | None,
    weight: Tensor | None,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`normalize` in ``(x, weight, bias)``; ``None`` where ``needs`` is false.

    With ``y`` the standardised row and ``g = grad * weight``:  ``rstd (g - y mean(g y))`` for rms, minus also
    ``rstd mean(g)`` for layer, and ``(g - y <g, y>) / |x|`` for sphere.
    """
    if norm is None:
        return grad if needs[0] else None, None, None
    y, rstd = _standardize(x, norm, eps)
    grad_weight = sum_rows(grad * y) if needs[1] else None
    grad_bias = sum_rows(grad) if needs[2] else None
    if not needs[0]:
        return None, grad_weight, grad_bias
    g = grad if weight is None else grad * weight
    if norm == "sphere":
        return unit_backward(g, x, eps), grad_weight, grad_bias
    g_y = y * (g * y).mean(-1, keepdim=True)
    g_1 = g.mean(-1, keepdim=True) if norm == "layer" else 0.0
    return rstd * (g - g_y - g_1), grad_weight, grad_bias
