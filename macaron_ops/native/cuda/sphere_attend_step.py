"""``sphere_attend_step`` in CUDA C++, for particles of few channels: ``csrc/cuda/sphere_attend_step.cu``."""

import torch
from torch import Tensor

from macaron_ops.native.cpu.sphere_attend_step import Saved, saved_shapes
from macaron_ops.reference.normalize_step import DIRECTIONS

from .library import untimed as slower
from .library import why_not_dtype, why_not_on

__all__ = ["Saved", "backward", "forward", "saved_shapes", "slower", "why_not"]

WIDEST = 16  # channels that a thread keeps in registers
_ops = torch.ops.macaron_ops_cuda


def why_not(request) -> str | None:
    x, query = request.x, request.tensors.query
    width = max(x.shape[-1], 0 if query is None else query.shape[-1])
    if width > WIDEST:
        return f"particles have at most {WIDEST} channels, not {width}: more are a matter of matrix products"
    return why_not_dtype(x.dtype) or why_not_on(x.device)


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Saved]:
    """y, shape and dtype of x, and what the backward pass forms the weights from."""
    y, *saved = _ops.sphere_attend_step_forward(x, *tensors, *_encoded(options), save != "none")
    return y, Saved(*saved)


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options):
    """The gradients in x and in the tensors, None where not needed."""
    grads = _ops.sphere_attend_step_backward(grad, x, *tensors, *saved, *_encoded(options), list(map(int, needs)))
    grad_x, *rest = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_x, type(tensors)(*rest)


def _encoded(options) -> tuple:
    o = options
    return o.step, o.beta, o.weighting == "softmax", DIRECTIONS.index(o.direction), o.causal, o.eps
