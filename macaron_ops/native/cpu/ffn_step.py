"""``ffn_step`` on the CPU: ``csrc/cpu/ffn_step.cpp``."""

from typing import NamedTuple

import torch
from torch import Tensor

from macaron_ops.reference.ffn_step import Options, Tensors

from .plan import alone, why_not_dtypes

__all__ = ["Saved", "backward", "forward", "saved_shapes", "slower", "why_not"]

PANEL = 32  # tokens side by side
_COPY_PAYS = 2048  # tokens: at D = 512, F = 2048 on two cores of a Xeon with AVX-512 the gain of one is the copy's time


class Saved(NamedTuple):
    """What the backward pass may find; empty tensors where ``save`` did not keep it."""

    hidden: Tensor  # fast: the pre-activations in panels (ceil(tokens / 32), F or 2F, 32), in the dtype of w_in
    total: Tensor  # fast, post placement: the sum before its normalisation (..., D), in the dtype of x


def why_not(request) -> str | None:
    return why_not_dtypes(request.x.dtype, request.tensors.w_in.dtype)


def slower(request) -> str | None:
    """Matrices that lie transposed, as GPT-2's do, are copied in each call, which torch's products need not do."""
    t, o, tokens = request.tensors, request.options, request.x.shape[:-1].numel()
    transposed = not (t.w_in.is_contiguous() and t.w_out.is_contiguous())
    if transposed and t.w_in.dtype == torch.float32 and tokens < _COPY_PAYS and not (o.dropout or o.activation_dropout):
        return f"w_in or w_out lies transposed and would be copied, for fewer than {_COPY_PAYS} tokens"
    return None


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    fast = save == "fast"
    panels = -(-x.shape[:-1].numel() // PANEL)
    hidden = (panels, tensors.w_in.shape[0], PANEL) if fast else (0,)
    total = x.shape if fast and options.placement == "post" else (0,)
    return Saved((hidden, tensors.w_in.dtype), (total, x.dtype))


forward, backward = alone("ffn_step", Saved, saved_shapes)
