"""``sphere_attend_step`` in CUDA C++, for particles of few channels: ``csrc/cuda/sphere_attend_step.cu``."""

import torch
from torch import Tensor

from macaron_ops.native.cpu.sphere_attend_step import Saved, saved_shapes
from macaron_ops.reference.normalize_step import DIRECTIONS

from .library import untimed, why_not_dtype, why_not_on

__all__ = ["Saved", "backward", "forward", "saved_shapes", "slower", "why_not"]

WIDEST = 16  # channels that a thread keeps in registers
TIMED = 4  # channels, in float32: bench/results/2026-11-26-nvidia-h200-ops-sphere.json has D = 3
_ops = torch.ops.macaron_ops_cuda


def slower(request) -> str | None:
    """On an H200 32,768 particles at D = 3 take 0.39 of Triton's time, 0.75 with the gradients; 262,144 the same."""
    return None if request.x.dtype == torch.float32 and _width(request) <= TIMED else untimed(request)


def why_not(request) -> str | None:
    width = _width(request)
    if width > WIDEST:
        return f"particles have at most {WIDEST} channels, not {width}: more are a matter of matrix products"
    return why_not_dtype(request.x.dtype) or why_not_on(request.x.device)


def _width(request) -> int:
    x, query = request.x, request.tensors.query
    return max(x.shape[-1], 0 if query is None else query.shape[-1])


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
