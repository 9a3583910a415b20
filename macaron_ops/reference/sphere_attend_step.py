"""The normalise-attend-step of particles on the unit sphere.

    u_i = sum_j w_ij v_j,    w_ij = exp(beta <q_i, k_j>) / sum_l exp(beta <q_i, k_l>)     weighting="softmax"
                             w_ij = exp(beta <q_i, k_j>) / n                              weighting="unnormalized"
    y_i = S(x_i + step P(u_i))      the step of normalize_step in the given direction

with q = k = v = x unless they are given. Source: Geshkovski et al. 2023, arXiv 2312.10794, eqs. (SA) and (USA);
Alvarez-Lopez, Geshkovski, Ruiz-Balet 2026, arXiv 2601.21366.

Forward and backward work on blocks of rows, so neither stores an n x n matrix (differentiating the definition with
autograd does). Nothing but the inputs is kept between them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import softmax_backward
from .dtypes import accumulation_dtype, upcast
from .normalize_step import move, move_backward

__all__ = [
    "WEIGHTINGS",
    "Options",
    "Saved",
    "Tensors",
    "backward",
    "forward",
    "saved_shapes",
    "sphere_attend_step",
]

WEIGHTINGS = ("softmax", "unnormalized")
BLOCK = 512  # rows whose weights exist at a time


class Tensors(NamedTuple):
    """The tensor arguments after ``x``. The same tuple holds their gradients, and whether each is needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    step_tensor: Tensor | None  # () or (D,); None where the step is a number
    beta_tensor: Tensor | None  # (); None where beta is a number


class Options(NamedTuple):
    step: float
    beta: float
    weighting: str
    direction: str
    causal: bool
    eps: float


class Saved(NamedTuple):
    """Nothing: the backward pass forms the weights again."""


def sphere_attend_step(
    x: Tensor,
    step: float | Tensor,
    beta: float | Tensor,
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    weighting: str = "softmax",
    direction: str = "tangent",
    causal: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """The definition of :func:`macaron_ops.sphere_attend_step`, in PyTorch that is differentiable twice."""
    numbers = [0.0 if isinstance(s, Tensor) else s for s in (step, beta)]
    learned = [s if isinstance(s, Tensor) else None for s in (step, beta)]
    options = Options(*numbers, weighting, direction, causal, eps)
    return forward(x, Tensors(query, key, value, *learned), options)[0]


def forward(x: Tensor, tensors: Tensors, options: Options, save: str = "none") -> tuple[Tensor, Saved]:
    """``y`` and nothing."""
    dtype, o = x.dtype, options
    acc = accumulation_dtype(dtype)
    x, t = x.to(acc), upcast(tensors, acc)
    q, k, v, step, beta = _inputs(x, t, o)
    u = torch.cat([_weights(q, k, beta, o, start) @ v for start in _blocks(q)], dim=-2)
    y = move(x, u, step, o.direction, o.eps)
    return y.to(dtype), Saved()


def backward(
    grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors: Tensors, saved: Saved, options: Options
) -> tuple[Tensor | None, Tensors]:
    """The gradients in ``x`` and in the tensors, None where not needed. With ``s_ij = beta <q_i, k_j>``:
    ``ds_ij = w_ij (dw_ij - sum_l w_il dw_il)`` with ``dw_ij = <du_i, v_j>``, unnormalised without the sum."""
    need_x, need = needs[0], Tensors(*needs[1:])
    o, acc = options, accumulation_dtype(x.dtype)
    grad, x, t = grad.to(acc), x.to(acc), upcast(tensors, acc)
    q, k, v, step, beta = _inputs(x, t, o)
    u = torch.cat([_weights(q, k, beta, o, start) @ v for start in _blocks(q)], dim=-2)
    grad_x, grad_u, grad_step = move_backward(grad, x, u, step, o.direction, o.eps)
    grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    grad_beta = torch.zeros((), dtype=acc, device=x.device)
    for start in _blocks(q):
        rows = slice(start, start + BLOCK)
        w = _weights(q, k, beta, o, start)
        grad_w = grad_u[..., rows, :] @ v.transpose(-1, -2)
        grad_s = softmax_backward(grad_w, w) if o.weighting == "softmax" else w * grad_w
        grad_v += w.transpose(-1, -2) @ grad_u[..., rows, :]
        grad_k += beta * (grad_s.transpose(-1, -2) @ q[..., rows, :])
        grad_q.append(beta * (grad_s @ k))
        if need.beta_tensor:
            grad_beta += (grad_s * (q[..., rows, :] @ k.transpose(-1, -2))).sum()
    grads = {"query": torch.cat(grad_q, dim=-2), "key": grad_k, "value": grad_v}
    for name, g in grads.items():
        if getattr(t, name) is None:
            grad_x = grad_x + g
    grads["step_tensor"] = None if t.step_tensor is None else grad_step.sum_to_size(t.step_tensor.shape)
    grads["beta_tensor"] = grad_beta
    return grad_x if need_x else None, Tensors(**{n: g if getattr(need, n) else None for n, g in grads.items()})


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """Nothing is saved."""
    return Saved()


def _inputs(x: Tensor, t: Tensors, o: Options):
    q, k, v = (x if given is None else given for given in (t.query, t.key, t.value))
    return (
        q,
        k,
        v,
        o.step if t.step_tensor is None else t.step_tensor,
        o.beta if t.beta_tensor is None else t.beta_tensor,
    )


def _blocks(q: Tensor) -> range:
    """Where the blocks of rows start; one empty block where there are no rows."""
    return range(0, max(q.shape[-2], 1), BLOCK)


def _scores(q: Tensor, k: Tensor, beta: float | Tensor, o: Options, start: int) -> Tensor:
    """``beta <q_i, k_j> (..., rows, n)`` of the block that starts at row ``start``."""
    q = q[..., start : start + BLOCK, :]
    scores = beta * (q @ k.transpose(-1, -2))
    if not o.causal:
        return scores
    row = torch.arange(start, start + q.shape[-2], device=q.device)
    return scores.masked_fill(torch.arange(k.shape[-2], device=q.device) > row[:, None], -torch.inf)


def _weights(q: Tensor, k: Tensor, beta: float | Tensor, o: Options, start: int) -> Tensor:
    scores = _scores(q, k, beta, o, start)
    return torch.softmax(scores, dim=-1) if o.weighting == "softmax" else torch.exp(scores) / k.shape[-2]
