"""``normalize_step`` on the CPU: ``csrc/cpu/normalize_step.cpp``."""

from torch import Tensor

from macaron_ops.reference.normalize_step import Options, Saved, Tensors, saved_shapes

from .plan import run_backward, run_forward, why_not_dtypes

__all__ = ["Saved", "backward", "forward", "saved_shapes", "why_not"]


def why_not(request) -> str | None:
    return why_not_dtypes(request.x.dtype, request.tensors.u.dtype)


def forward(x: Tensor, tensors: Tensors, options: Options, save: str) -> tuple[Tensor, Saved]:
    y, _ = run_forward("normalize_step", x, tensors, options, save)
    return y, Saved()


def backward(
    grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors: Tensors, saved: Saved, options: Options
) -> tuple[Tensor | None, Tensors]:
    grad_x, grads = run_backward("normalize_step", grad, needs, x, tensors, saved, options)
    return grad_x, Tensors(*grads)
