"""The row kernels around a normalisation as functions with gradients: Triton's, and those of the CUDA library.

No operator is these rows alone: substeps launch them between their products. Here they are timed by themselves. The sum
x + z that is normalised is part of the CUDA kernel; Triton's has torch's addition before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # torch's default
BACKENDS = ("triton", "cuda")


def eager(
    norm: str, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """N(x + z) with its parameters, as PyTorch writes it."""
    s = x if z is None else x + z
    if norm == "layer":
        return F.layer_norm(s, s.shape[-1:], norm_weight, norm_bias, EPS)
    if norm == "rms":
        return F.rms_norm(s, s.shape[-1:], norm_weight, EPS)
    return F.normalize(s, dim=-1, eps=EPS) * norm_weight


def fused(
    norm: str, backend: str, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """The same by the kernels of ``backend``, one of ``BACKENDS``."""
    return {"triton": _Triton, "cuda": _Cuda}[backend].apply(norm, x, norm_weight, norm_bias, z)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, norm: str, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None) -> Tensor:
        from macaron_ops.kernels.norm_rows import normalize_rows
        from macaron_ops.kernels.rows import as_rows

        s = x if z is None else x + z
        ctx.norm, ctx.summed = norm, z is not None
        ctx.save_for_backward(s, weight, bias)
        return normalize_rows(as_rows(s), norm, weight, bias, EPS, x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        from macaron_ops.kernels.norm_rows import normalize_rows_backward
        from macaron_ops.kernels.rows import as_rows
        from macaron_ops.kernels.sums import Sum

        s, weight, bias = ctx.saved_tensors
        wanted = Sum(weight.dtype)
        sums = (wanted, None if bias is None else wanted, None)
        total, _, (by_weight, by_bias, _) = normalize_rows_backward(
            as_rows(grad), as_rows(s), ctx.norm, weight, EPS, total=s.dtype, sums=sums
        )
        ds = total.view(s.shape)
        return None, ds, by_weight, by_bias, ds if ctx.summed else None


class _Cuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, norm: str, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None) -> Tensor:
        from macaron_ops.native.cuda.norm_rows import norm_rows

        n, s = norm_rows(x, z, norm, weight, bias, EPS, keep_sum=z is not None)
        ctx.norm, ctx.summed = norm, z is not None
        ctx.save_for_backward(s if ctx.summed else x, weight, bias)
        return n

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        from macaron_ops.native.cuda.norm_rows import norm_rows_backward

        s, weight, bias = ctx.saved_tensors
        ds, by_weight, by_bias = norm_rows_backward(grad, s, ctx.norm, weight, EPS, (True, True, bias is not None))
        by_bias = None if bias is None else by_bias.to(bias.dtype)
        return None, ds, by_weight.to(weight.dtype), by_bias, ds if ctx.summed else None
