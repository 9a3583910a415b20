"""The FFN step: a scaled, normalised feed-forward residual. At ``step=0.5`` the Macaron half-step.

    pre    y = a x + c drop(W_out drop_h(act(W_in N(x) + b_in)) + b_out)
    post   y = N(a x + c drop(W_out drop_h(act(W_in x + b_in)) + b_out))

with ``a = residual_scale``, ``c = step``. Source: Lu et al. 2019, arXiv 1906.02762, section 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activate, activate_backward
from .dropout import HIDDEN_STREAM, OUTPUT_STREAM, dropout
from .dtypes import accumulation_dtype, upcast
from .norm import normalize, normalize_backward
from .rows import outer, sum_rows

__all__ = ["Options", "Saved", "Tensors", "backward", "ffn_step", "forward", "saved_shapes"]


class Tensors(NamedTuple):
    """The tensor arguments after ``x``. The same tuple holds their gradients, and whether each is needed."""

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    seed: Tensor | None


class Options(NamedTuple):
    norm: str | None
    eps: float
    activation: str
    step: float
    residual_scale: float
    placement: str
    dropout: float
    activation_dropout: float
    stream: int  # of the output's dropout; the hidden activations' is the next one


class Saved(NamedTuple):
    """What the backward pass may find; empty tensors where ``save`` did not keep it."""

    hidden: Tensor  # fast: the pre-activations (..., F), gated (..., 2F), in the dtype of w_in
    total: Tensor  # fast, post placement: the sum before its normalisation (..., D), in the dtype of x


def ffn_step(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    norm: str | None = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | Callable[[Tensor], Tensor] = "relu",
    step: float = 0.5,
    residual_scale: float = 1.0,
    placement: str = "pre",
    dropout: float = 0.0,
    activation_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition of :func:`macaron_ops.ffn_step`, in PyTorch that is differentiable twice.

    Args as there, but nothing is checked and ``seed`` is an int64 0-d tensor (needed when a dropout is not 0).
    """
    tensors = Tensors(w_in, b_in, w_out, b_out, norm_weight, norm_bias, seed)
    options = Options(norm, eps, activation, step, residual_scale, placement, dropout, activation_dropout, 0)
    return forward(x, tensors, options)[0]


def forward(x: Tensor, tensors: Tensors, options: Options, save: str = "none") -> tuple[Tensor, Saved]:
    """``y`` and what ``save`` ("none", "lean", "fast") keeps for :func:`backward`."""
    dtype, o = x.dtype, options
    acc = accumulation_dtype(dtype)
    x, t = x.to(acc), upcast(tensors, acc)
    n = normalize(x, o.norm, t.norm_weight, t.norm_bias, o.eps) if o.placement == "pre" else x
    hidden = F.linear(n, t.w_in, t.b_in)
    total = _total(x, t, o, _drop_hidden(hidden, t, o))
    y = total if o.placement == "pre" else normalize(total, o.norm, t.norm_weight, t.norm_bias, o.eps)
    fast = save == "fast"
    saved = Saved(
        hidden.to(tensors.w_in.dtype) if fast else tensors.w_in.new_empty(0),
        total.to(dtype) if fast and o.placement == "post" else x.new_empty(0, dtype=dtype),
    )
    return y.to(dtype), saved


def backward(
    grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors: Tensors, saved: Saved, options: Options
) -> tuple[Tensor | None, Tensors]:
    """The gradients in ``x`` and in the tensors. What is not needed (``needs``: x first, then the tensors) is None and
    costs nothing; what ``save="lean"`` did not keep is computed again."""
    need_x, need = needs[0], Tensors(*needs[1:])
    o, acc = options, accumulation_dtype(x.dtype)
    grad, x, t, saved = grad.to(acc), x.to(acc), upcast(tensors, acc), upcast(saved, acc)
    pre = o.placement == "pre"
    n = normalize(x, o.norm, t.norm_weight, t.norm_bias, o.eps) if pre else x
    hidden = saved.hidden if saved.hidden.numel() else F.linear(n, t.w_in, t.b_in)
    h = _drop_hidden(hidden, t, o)
    grads = dict.fromkeys(Tensors._fields)

    if not pre:
        total = saved.total if saved.total.numel() else _total(x, t, o, h)
        grad, grads["norm_weight"], grads["norm_bias"] = normalize_backward(
            grad, total, o.norm, t.norm_weight, o.eps, (True, need.norm_weight, need.norm_bias)
        )
    grad_u = dropout(o.step * grad, o.dropout, t.seed, o.stream + OUTPUT_STREAM)
    grads["w_out"] = outer(grad_u, h) if need.w_out else None
    grads["b_out"] = sum_rows(grad_u) if need.b_out else None

    grad_x = o.residual_scale * grad if need_x else None
    need_n = need_x or (pre and (need.norm_weight or need.norm_bias))
    if need_n or need.w_in or need.b_in:
        grad_h = dropout(grad_u @ t.w_out, o.activation_dropout, t.seed, o.stream + HIDDEN_STREAM)
        grad_hidden = activate_backward(grad_h, hidden, o.activation)
        grads["w_in"] = outer(grad_hidden, n) if need.w_in else None
        grads["b_in"] = sum_rows(grad_hidden) if need.b_in else None
    if need_n:
        grad_n = grad_hidden @ t.w_in
        if pre:
            grad_n, grads["norm_weight"], grads["norm_bias"] = normalize_backward(
                grad_n, x, o.norm, t.norm_weight, o.eps, (need_x, need.norm_weight, need.norm_bias)
            )
        grad_x = grad_x + grad_n if need_x else None
    return grad_x, Tensors(**grads)


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    fast = save == "fast"
    hidden = (*x.shape[:-1], tensors.w_in.shape[0]) if fast else (0,)
    total = x.shape if fast and options.placement == "post" else (0,)
    return Saved((hidden, tensors.w_in.dtype), (total, x.dtype))


def _drop_hidden(hidden: Tensor, t: Tensors, o: Options) -> Tensor:
    return dropout(activate(hidden, o.activation), o.activation_dropout, t.seed, o.stream + HIDDEN_STREAM)


def _total(x: Tensor, t: Tensors, o: Options, h: Tensor) -> Tensor:
    """``a x + c drop(W_out h + b_out)``."""
    u = dropout(F.linear(h, t.w_out, t.b_out), o.dropout, t.seed, o.stream + OUTPUT_STREAM)
    return torch.add(x if o.residual_scale == 1.0 else o.residual_scale * x, u, alpha=o.step)
