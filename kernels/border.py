"""What a substep of a layer hands to its neighbour beside y or dy, so that a row is not read again for it.

    forward    the substep before writes n = N(y) of the one after, in the epilogue that writes y
    backward   the substep after writes g = drop(dx) of the one before, and sums it for the gradient of b_out, in the
               row kernel that writes dx

Forward a program must hold whole rows of y: D <= 256. A narrow FFN, which is one kernel, asks for nothing. The norm is
that of y as it is rounded, which the backward pass finds again. Backward every width is handed over, where the substep
after ends with a row kernel (pre placement with a norm, x trained) and the one before would begin with one: it drops,
or its weights have another dtype than x (autocast), or no row kernel of its own reads dy later.

``Ahead`` and ``Behind`` are arguments of the raw operators: what was handed over, and what the neighbour asks for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import OUTPUT_STREAM, Dropout
from .linear_residual import ROW, Norm
from .sums import Sum

__all__ = ["ALONE_AHEAD", "ALONE_BEHIND", "Ahead", "Behind", "ahead_shape", "behind_shapes", "begins", "ends"]


class Ahead(NamedTuple):
    """Forward: N(x) of this substep, if the one before has left it, and what the one after begins with."""

    normalized: Tensor | None = None  # (..., D) in the dtype of the products' operands
    next_norm: str | None = None  # None: nothing is asked for
    next_eps: float = 0.0
    next_norm_weight: Tensor | None = None
    next_norm_bias: Tensor | None = None
    next_dtype: torch.dtype | None = None

    def norm(self, y: Tensor) -> Norm:
        """What follows the residual sum, which goes to ``y``."""
        weight, bias = (t if t is None else t.contiguous() for t in (self.next_norm_weight, self.next_norm_bias))
        return Norm(self.next_norm, weight, bias, self.next_eps, y, True)


class Behind(NamedTuple):
    """Backward: g of this substep, if the one after has left it, and what the one before begins with; b_out's gradient
    is then c times the sum of its g over the rows."""

    dropped: Tensor | None = None  # (M, D) in the dtype of w_out
    before_seed: Tensor | None = None
    before_stream: int = 0
    before_dropout: float = 0.0
    before_step: float = 0.0
    before_dtype: torch.dtype | None = None  # of g; None: it is not asked for
    before_bias_dtype: torch.dtype | None = None  # of b_out's gradient; None: it is not asked for

    @property
    def dropout(self) -> Dropout:
        return Dropout.of(self.before_dropout, self.before_seed, self.before_stream + OUTPUT_STREAM)

    @property
    def sum(self) -> Sum | None:
        return None if self.before_bias_dtype is None else Sum(self.before_bias_dtype, self.before_step)


ALONE_AHEAD, ALONE_BEHIND = Ahead(), Behind()


def is_post(o) -> bool:
    return o.placement == "post" and o.norm is not None


def begins(x: Tensor, t, o, w: Tensor) -> tuple:
    """What a substep asks of the one before it, forward: the fields of :class:`Ahead` after the first; ``w`` is the
    first product's."""
    if o.placement == "post" or o.norm is None or x.shape[-1] > ROW:
        return ()
    return o.norm, o.eps, t.norm_weight, t.norm_bias, w.dtype


def ends(x: Tensor, needs: tuple[bool, ...], t, o) -> tuple:
    """What a substep asks of the one after it, backward: the fields of :class:`Behind` after the first."""
    if is_post(o):
        return ()
    need = type(t)(*needs[1:])
    differs = o.dropout > 0.0 or t.w_out.dtype != x.dtype  # g from dy
    need_g = differs and any((needs[0], *need._replace(b_out=False)))
    need_sum = need.b_out and (differs or o.norm is None or not needs[0])
    by_bias = t.b_out.dtype if need_sum else None
    return t.seed, o.stream, o.dropout, o.step, t.w_out.dtype if need_g else None, by_bias


def hands_ahead(x: Tensor, o, ahead: Ahead) -> bool:
    """Whether a substep leaves what the next asks for."""
    return ahead.next_norm is not None and not is_post(o) and x.numel() > 0


def hands_behind(x: Tensor, needs: tuple[bool, ...], t, o, behind: Behind) -> bool:
    """Whether a substep leaves what the one before it asks for. One sum of its last row kernel is for a b_out: the
    substep's own where nothing was dropped."""
    asked = behind.before_dtype is not None or behind.before_bias_dtype is not None
    own_sum = type(t)(*needs[1:]).b_out and o.dropout == 0.0 and t.w_out.dtype == x.dtype
    return asked and needs[0] and o.placement == "pre" and o.norm is not None and not own_sum and x.numel() > 0


def ahead_shape(x: Tensor, t, o, ahead: Ahead) -> tuple[tuple[int, ...], torch.dtype]:
    """Of what a substep leaves the next one."""
    return (x.shape, ahead.next_dtype) if hands_ahead(x, o, ahead) else ((0,), x.dtype)


def behind_shapes(
    x: Tensor, needs: tuple[bool, ...], t, o, behind: Behind
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of what a substep leaves the one before it: g and b_out's gradient."""
    hands, width = hands_behind(x, needs, t, o, behind), x.shape[-1]
    shapes = (x.numel() // width, width), (width,)
    dtypes = behind.before_dtype, behind.before_bias_dtype
    return [(s, d) if hands and d is not None else ((0,), x.dtype) for s, d in zip(shapes, dtypes, strict=True)]
