"""``ffn_step``: the FFN step, forward and backward, in two regimes.

    pre    y = a x + c drop(W_out drop_h(act(W_in N(x) + b_in)) + b_out)
    post   y = N(a x + c drop(W_out drop_h(act(W_in x + b_in)) + b_out))

forward, narrow      one kernel (``narrow_ffn``: D <= 128, float32 64)
forward, wider       n = N(x)                                        a row kernel
                     z = n W_in^T + b_in, h = drop(act(z))           one product with its epilogue (``hidden``)
                     y = a x + c drop(h W_out^T + b_out)             another (``linear_residual``)
                     y = N(y), post placement                        the same kernel, D > 256: a row kernel
backward             g = drop(dy), db_out; post: dN first            a row kernel (none without dropout, norm or bias)
                     dz = drop(c g W_out) act'(z), h again, db_in    one product; relu has h and needs no z
                     dn = dz W_in                                    a product; without a norm it adds a dy
                     dx = dN(dn) + a dy, n again, norm's parameters  a row kernel
                     dW_out = c g^T h,  dW_in = dz^T n               two products over the tokens

What is not needed is not computed. Statistics are never stored: the row kernels read the row anyway. h and n are
computed again in the backward pass, z only with ``save="lean"``, for which a row kernel forms n first. In a layer the
first row kernel of either pass may be part of the neighbour's last kernel (``border``).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import border
from .border import ALONE_AHEAD, ALONE_BEHIND, Ahead, Behind, ahead_shape, behind_shapes, ends
from .dropout import HIDDEN_STREAM, OUTPUT_STREAM, Dropout
from .hidden import hidden_again, hidden_backward, hidden_forward
from .linear_residual import linear_residual
from .narrow_ffn import NARROW, narrow_ffn
from .rows import as_rows
from .sublayer import (
    after,
    is_post,
    operand,
    residual_sum,
    sum_for,
    through_norm,
    through_output,
    why_not_rows,
    y_and_next,
)
from .sums import Later
from .weight_gradient import weight_gradient

__all__ = [
    "Ahead", "Behind", "Saved", "ahead_shape", "backward", "begins", "behind_shapes", "ends", "forward", "saved_shapes",
    "slower", "why_not",
]  # fmt: skip


class Saved(NamedTuple):
    """What the backward pass may find; empty tensors where ``save`` did not keep it."""

    hidden: Tensor  # fast: the pre-activations (..., F), gated (..., 2F), relu h itself, in the dtype of w_in
    total: Tensor  # fast, post placement with a norm: the sum before it (..., D), in the dtype of x


def why_not(request) -> str | None:
    return why_not_rows(request.x, request.tensors.w_in)


def slower(request) -> str | None:
    """Not measured yet: the tiles of float32 are small and, without tf32, off the tensor cores."""
    wide = request.x.shape[-1] > NARROW[4]
    if request.tensors.w_in.dtype == torch.float32 and wide:
        return "in float32 cuBLAS is expected to run the products faster"
    return None


def saved_shapes(x: Tensor, tensors, options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    fast = save == "fast"
    hidden = (*x.shape[:-1], tensors.w_in.shape[0]) if fast else (0,)
    total = x.shape if fast and is_post(options) else (0,)
    return Saved((hidden, tensors.w_in.dtype), (total, x.dtype))


def begins(x: Tensor, tensors, options) -> tuple:
    """What it asks of the substep before it."""
    return () if _narrow(x, tensors) else border.begins(x, tensors, options, tensors.w_in)


def _narrow(x: Tensor, t) -> bool:
    """Whether the forward pass is one kernel."""
    return x.shape[-1] <= NARROW[t.w_in.dtype.itemsize]


def forward(x: Tensor, tensors, options, save: str, ahead: Ahead = ALONE_AHEAD) -> tuple[Tensor, Saved, Tensor | None]:
    """y, shape and dtype of x, what ``save`` keeps, and what the next substep asks for."""
    t, o = _without_gaps(tensors), options
    saved = Saved(
        *(torch.empty(shape, dtype=d, device=x.device) for shape, d in saved_shapes(x, tensors, options, save))
    )
    rows = as_rows(x)
    if rows.count == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), saved, None
    hidden_dropout, output_dropout = _dropouts(t, o)
    z = saved.hidden if save == "fast" else None
    total = saved.total if save == "fast" and is_post(o) else None
    norm, dtype = after(x, t, o, total, ahead)
    if _narrow(x, t):
        last = torch.empty(x.shape, dtype=dtype, device=x.device)
        narrow_ffn(rows, t, o, hidden_dropout, output_dropout, last, z, norm)
    else:
        n = operand(rows, t.w_in.dtype, t, o, ahead.normalized)
        h = hidden_forward(n, t.w_in, t.b_in, o.activation, hidden_dropout, z, True)
        last = residual_sum(rows, t, o, h, output_dropout, dtype, norm)
    y, n = y_and_next(last, norm)
    return y.view(x.shape), saved, n


def backward(
    grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options, behind: Behind = ALONE_BEHIND
):
    """The gradients in x and in the tensors, and what the substep before asks for. What is not needed is None and costs
    nothing."""
    need_x, t, o = needs[0], _without_gaps(tensors), options
    need = type(t)(*needs[1:])
    found = dict.fromkeys(t._fields)
    rows, grads = as_rows(x), as_rows(grad)
    if rows.count == 0:
        zeros = (torch.zeros_like(w) if n else None for w, n in zip(t, need, strict=True))
        return torch.empty_like(x) if need_x else None, type(t)(*zeros), [None, None]
    post, pre_norm = is_post(o), o.placement == "pre" and o.norm is not None
    need_n = need_x or (pre_norm and (need.norm_weight or need.norm_bias))
    need_dz = need_n or need.w_in or need.b_in
    hidden_dropout, output_dropout = _dropouts(t, o)
    later = Later()

    # What the forward pass did not keep.
    lean = saved.hidden.numel() == 0 and t.w_in.shape[0] > 0
    no_total = post and saved.total.numel() == 0
    from_n = (lean and (need_dz or need.w_out)) or no_total
    late = need.w_in and need_n and pre_norm and not from_n  # the last row kernel writes n
    n = operand(rows, t.w_in.dtype, t, o) if from_n or (need.w_in and not late) else None
    z = None if lean else saved.hidden.view(rows.count, t.w_in.shape[0])
    h = None
    if from_n:
        z = x.new_empty((rows.count, t.w_in.shape[0]), dtype=t.w_in.dtype) if need_dz else None
        again = no_total or not need_dz
        h = hidden_forward(n, t.w_in, t.b_in, o.activation, hidden_dropout, z, again)
    before_norm = rows
    if post:
        total = residual_sum(rows, t, o, h, output_dropout, torch.float32) if no_total else saved.total
        before_norm = as_rows(total)

    residual, g, found["norm_weight"], found["norm_bias"], found["b_out"] = through_output(
        grads, before_norm, t, o, output_dropout, need_x, need, need_dz or need.w_out, need_x and pre_norm,
        behind, later,
    )  # fmt: skip
    if need_dz:
        dz, h, found["b_in"] = hidden_backward(
            g, t.w_out, z, o.step, o.activation, hidden_dropout,
            need_z=need_n or need.w_in, need_h=need.w_out, bias=sum_for(need.b_in, t.b_in), in_place=from_n,
            later=later,
        )  # fmt: skip
    elif need.w_out and h is None:
        h = hidden_again(z, o.activation, hidden_dropout)
    if need.w_out:
        found["w_out"] = weight_gradient(g, h, o.step, later)
    del h  # the largest of what is not needed any more
    grad_x, handed = None, [None, None]
    if need_n and pre_norm:
        dn = linear_residual(dz, t.w_in, None, None, t.w_in.dtype, transposed=False)
        if late:
            n = torch.empty(dn.shape, dtype=dn.dtype, device=dn.device)
        grad_x, by_norm, handed = through_norm(
            dn, rows, grads, t, o, need_x, need, need.b_out and found["b_out"] is None, n if late else None,
            behind, later,
        )  # fmt: skip
        found |= by_norm
    elif need_n:
        grad_x = linear_residual(dz, t.w_in, None, residual, x.dtype, transposed=False, a=o.residual_scale)
    if need.w_in:
        found["w_in"] = weight_gradient(dz, n, later=later)
    later.end()
    return None if grad_x is None else grad_x.view(x.shape), type(t)(**found), handed


def _without_gaps(t):
    """The tensors with vectors that kernels read as they lie in memory; products read matrices by their strides."""
    names = ("b_in", "b_out", "norm_weight", "norm_bias")
    return t._replace(**{n: v.contiguous() for n in names if (v := getattr(t, n)) is not None})


def _dropouts(t, o) -> tuple[Dropout, Dropout]:
    """Of the hidden activations and of the output."""
    return (
        Dropout.of(o.activation_dropout, t.seed, o.stream + HIDDEN_STREAM),
        Dropout.of(o.dropout, t.seed, o.stream + OUTPUT_STREAM),
    )
