"""``attend_step`` on the CPU: ``csrc/cpu/attend_step_forward.cpp`` and ``attend_step_backward.cpp``."""

from typing import NamedTuple

import torch
from torch import Tensor

from macaron_ops.native import words_are_pairs
from macaron_ops.reference.attend_step import Options, Tensors

from .plan import alone, why_not_dtypes

__all__ = ["Saved", "backward", "forward", "saved_shapes", "why_not"]

PANEL, WIDEST = 32, 64  # csrc/cpu/head_panels.h


class Saved(NamedTuple):
    """What the backward pass may find; empty tensors where ``save`` did not keep it."""

    queries: Tensor  # fast: the projections in panels of heads (csrc/cpu/heads.h), words of four bytes
    keys: Tensor
    values: Tensor
    attended: Tensor  # lean and fast: the heads' outputs in panels (ceil(tokens / 32), H head_dim, 32), dtype of w_q
    statistics: Tensor  # lean and fast: (B, H, 2, T), float32: the scores' maximum, and 1 / sum
    total: Tensor  # fast, post placement: the sum before its normalisation (..., T, D), in the dtype of x


def why_not(request) -> str | None:
    return why_not_dtypes(request.x.dtype, request.tensors.w_q.dtype)


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    o, fast, kept = options, save == "fast", save != "none"
    batch, tokens, channels = x.shape[:-2].numel(), x.shape[-2], tensors.w_out.shape[1]
    keys = tokens if tensors.context is None else tensors.context.shape[-2]
    head_dim = channels // o.num_heads
    dtype = tensors.w_q.dtype
    pairs = words_are_pairs(dtype)

    def panels(heads: int, tokens: int) -> tuple[tuple[int, ...], torch.dtype]:
        width = PANEL if tokens > WIDEST else max(2, tokens + tokens % 2)
        words = -(-tokens // width) * width * (-(-head_dim // 2) if pairs else head_dim)
        return (batch * heads * words + WIDEST,) if fast else (0,), torch.float32

    return Saved(
        queries=panels(o.num_heads, tokens),
        keys=panels(o.num_kv_heads, keys),
        values=panels(o.num_kv_heads, keys),
        attended=((-(-batch * tokens // PANEL), channels, PANEL) if kept else (0,), dtype),
        statistics=((batch, o.num_heads, 2, tokens) if kept else (0,), torch.float32),
        total=(x.shape if fast and o.placement == "post" else (0,), x.dtype),
    )


forward, backward = alone("attend_step", Saved, saved_shapes)
