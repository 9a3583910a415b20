"""``sphere_attend_step`` on the CPU: ``csrc/cpu/sphere_attend_step.cpp``."""

from typing import NamedTuple

import torch
from torch import Tensor

from macaron_ops.reference.sphere_attend_step import Options, Tensors

from .plan import run_backward, run_forward, why_not_dtypes

__all__ = ["Saved", "backward", "forward", "saved_shapes", "why_not"]


class Saved(NamedTuple):
    """What the backward pass forms the weights from, ``w_ij = 2^(beta log2(e) <q_i, k_j> - shift_i) / total_i``, and
    where they led; empty with ``save="none"``. All float32."""

    u: Tensor  # (..., n, D)
    shift: Tensor  # (..., n)
    total: Tensor  # (..., n)


def why_not(request) -> str | None:
    return why_not_dtypes(request.x.dtype, request.x.dtype)


def forward(x: Tensor, tensors: Tensors, options: Options, save: str) -> tuple[Tensor, Saved]:
    y, saved = run_forward("sphere_attend_step", x, tensors, options, save)
    return y, Saved(*saved) if saved else Saved(*(x.new_empty(0, dtype=torch.float32) for _ in Saved._fields))


def backward(
    grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors: Tensors, saved: Saved, options: Options
) -> tuple[Tensor | None, Tensors]:
    grad_x, grads = run_backward("sphere_attend_step", grad, needs, x, tensors, saved, options)
    return grad_x, Tensors(*grads)


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    keep = save != "none"
    rows = x.shape[:-1] if keep else (0,)
    return Saved((x.shape if keep else (0,), torch.float32), (rows, torch.float32), (rows, torch.float32))
