"""``sphere_attend_step`` on the CPU: ``csrc/cpu/sphere_attend_step.cpp``."""

from typing import NamedTuple

import torch
from torch import Tensor

from macaron_ops.reference.sphere_attend_step import Options, Tensors

from .plan import alone, why_not_dtypes

__all__ = ["Saved", "backward", "forward", "saved_shapes", "why_not"]


class Saved(NamedTuple):
    """What the backward pass forms the weights from, ``w_ij = 2^(beta log2(e) <q_i, k_j> - shift_i) / total_i``, and
    where they led; empty with ``save="none"``. All float32."""

    u: Tensor  # (..., n, D)
    shift: Tensor  # (..., n)
    total: Tensor  # (..., n)


def why_not(request) -> str | None:
    return why_not_dtypes(request.x.dtype, request.x.dtype)


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    keep = save != "none"
    rows = x.shape[:-1] if keep else (0,)
    return Saved((x.shape if keep else (0,), torch.float32), (rows, torch.float32), (rows, torch.float32))


forward, backward = alone("sphere_attend_step", Saved, saved_shapes)
