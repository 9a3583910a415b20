"""Normalised rows in CUDA C++, forward and backward: ``csrc/cuda/norm_rows.cu``; what stands around products.

s = a x + c z,    n = N(s) weight + bias,    ds = N'(dn weight) + a residual
"""

import torch
from torch import Tensor

__all__ = ["norm_rows", "norm_rows_backward"]

NORMS = ("layer", "rms", "sphere")
_ops = torch.ops.macaron_ops_cuda


def norm_rows(
    x: Tensor,
    z: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual_scale: float = 1.0,
    step: float = 1.0,
    keep_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(n, s)`` of x and z ``(..., D)``, in their dtype; s is empty unless it is to be kept."""
    return _ops.norm_rows_forward(x, z, weight, bias, residual_scale, step, NORMS.index(norm), eps, keep_sum)


def norm_rows_backward(
    grad: Tensor,
    s: Tensor,
    norm: str,
    weight: Tensor | None,
    eps: float,
    needs: tuple[bool, bool, bool],
    *,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in ``(s, weight, bias)``, the latter two in float32; None where ``needs`` is false."""
    grads = _ops.norm_rows_backward(grad, s, weight, residual, residual_scale, NORMS.index(norm), eps, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
