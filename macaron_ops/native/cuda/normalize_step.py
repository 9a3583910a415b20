"""``normalize_step`` in CUDA C++: ``csrc/cuda/normalize_step.cu``."""

import torch
from torch import Tensor

from macaron_ops.reference.normalize_step import DIRECTIONS, Saved, saved_shapes

from .library import TRITON, why_not_dtype, why_not_on
from .rows import why_not_width

__all__ = ["Saved", "backward", "forward", "saved_shapes", "slower", "why_not"]

_ops = torch.ops.macaron_ops_cuda


def slower(request) -> str | None:
    """By bench/results/2026-11-26-nvidia-h200-ops-rows-cuda.json, 16,384 x 512; as launched from Python it is ahead."""
    return "on an H200 Triton's takes 0.92 (bfloat16) to 0.99 (float32) of its time" if TRITON else None


def why_not(request) -> str | None:
    x = request.x
    return why_not_dtype(x.dtype) or why_not_width(x.shape[-1], x.dtype) or why_not_on(x.device)


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Saved]:
    """y, shape and dtype of x."""
    o = options
    direction = DIRECTIONS.index(o.direction)
    return _ops.normalize_step_forward(x, tensors.u, tensors.step_tensor, o.step, direction, o.eps), Saved()


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options):
    """The gradients in x and in (u, step_tensor), None where not needed."""
    o = options
    direction = DIRECTIONS.index(o.direction)
    grads = _ops.normalize_step_backward(grad, x, *tensors, o.step, direction, o.eps, *needs)
    grad_x, grad_u, grad_step = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_x, type(tensors)(grad_u, grad_step)
