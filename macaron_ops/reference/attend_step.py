"""The attention step: a scaled, normalised multi-head attention residual.

    pre    y = a x + c drop(W_o MHA(N(x)) + b_o)
    post   y = N(a x + c drop(W_o MHA(x) + b_o))

with ``a = residual_scale``, ``c = step``. Keys and values come from ``context`` (not normalised) where it is given.
Source: Vaswani et al. 2017, arXiv 1706.03762; pre-norm as in Xiong et al. 2020, arXiv 2002.04745.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import (
    attention,
    attention_backward,
    masks,
    position_heads,
    position_heads_backward,
)
from .dropout import HIDDEN_STREAM, OUTPUT_STREAM, dropout
from .dtypes import accumulation_dtype, upcast
from .norm import normalize, normalize_backward
from .projection import merge_heads, project, project_backward, side_by_side, split_heads, to_heads
from .rows import outer, sum_rows

__all__ = ["Options", "Saved", "Tensors", "attend_step", "backward", "forward", "saved_shapes"]


class Tensors(NamedTuple):
    """The tensor arguments after ``x``; without ``w_k`` and ``w_v``, ``w_q`` and ``b_q`` hold q, k and v packed.
    The same tuple holds their gradients, and whether each is needed."""

    w_q: Tensor
    w_k: Tensor | None
    w_v: Tensor | None
    b_q: Tensor | None
    b_k: Tensor | None
    b_v: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    context: Tensor | None
    attn_mask: Tensor | None  # broadcastable to (B, H, T, S)
    key_padding_mask: Tensor | None  # (B, S)
    cu_seqlens: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    qk_scale: Tensor | None
    seed: Tensor | None


class Options(NamedTuple):
    num_heads: int
    num_kv_heads: int
    norm: str | None
    eps: float
    step: float
    residual_scale: float
    placement: str
    causal: bool
    scale: float
    dropout: float
    attention_dropout: float
    stream: int  # of the output's dropout; the attention weights' is the next one


class Saved(NamedTuple):
    """What the backward pass may find, in the dtype of ``w_q`` unless said otherwise; empty tensors where ``save`` did
    not keep it."""

    projected: Tensor  # fast: q, k and v side by side (..., T, (H + 2 Hkv) head_dim); with a context q alone
    projected_context: Tensor  # fast, with a context: its k and v side by side (..., S, 2 Hkv head_dim)
    attended: Tensor  # lean and fast: the heads' outputs, before W_o (..., T, H head_dim)
    total: Tensor  # fast, post placement: the sum before its normalisation (..., T, D), in the dtype of x


def attend_step(
    x: Tensor,
    w_qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    b_qkv: Tensor | tuple[Tensor, Tensor, Tensor] | None,
    w_out: Tensor,
    b_out: Tensor | None,
    num_heads: int,
    *,
    norm: str | None = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    step: float = 1.0,
    residual_scale: float = 1.0,
    placement: str = "pre",
    context: Tensor | None = None,
    num_kv_heads: int | None = None,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    qk_scale: Tensor | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition of :func:`macaron_ops.attend_step`, in PyTorch that is differentiable twice.

    Args as there, but nothing is checked, ``attn_mask`` is broadcastable to ``(B, H, T, S)``, ``key_padding_mask`` is
    ``(B, S)`` and ``seed`` is an int64 0-d tensor (needed when a dropout is not 0).
    """
    weights = w_qkv if isinstance(w_qkv, tuple) else (w_qkv, None, None)
    biases = b_qkv if isinstance(b_qkv, tuple) else (b_qkv, None, None)
    cos, sin = (None, None) if rotary is None else rotary
    constants = (context, attn_mask, key_padding_mask, cu_seqlens, cos, sin, qk_scale, seed)
    tensors = Tensors(*weights, *biases, w_out, b_out, norm_weight, norm_bias, *constants)
    options = Options(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        norm=norm,
        eps=eps,
        step=step,
        residual_scale=residual_scale,
        placement=placement,
        causal=causal,
        scale=(w_out.shape[1] // num_heads) ** -0.5 if scale is None else scale,
        dropout=dropout,
        attention_dropout=attention_dropout,
        stream=0,
    )
    return forward(x, tensors, options)[0]


def forward(x: Tensor, tensors: Tensors, options: Options, save: str = "none") -> tuple[Tensor, Saved]:
    """``y`` and what ``save`` ("none", "lean", "fast") keeps for :func:`backward`."""
    dtype, o = x.dtype, options
    acc = accumulation_dtype(dtype)
    x, t = x.to(acc), upcast(tensors, acc)
    n = normalize(x, o.norm, t.norm_weight, t.norm_bias, o.eps) if o.placement == "pre" else x
    projections = project(n, t, o)
    q, k, v = split_heads(projections, t, o)
    q, k = (position_heads(heads, t.cos, t.sin, t.qk_scale) for heads in (q, k))
    attended = attention(q, k, v, o.scale, _masks(q, k, t, o), _attention_dropout(t, o))
    attended = merge_heads(attended, x)
    total = _total(x, t, o, attended)
    y = total if o.placement == "pre" else normalize(total, o.norm, t.norm_weight, t.norm_bias, o.eps)

    def keep(tensor: Tensor | None, when: bool, dtype: torch.dtype = tensors.w_q.dtype) -> Tensor:
        return tensor.to(dtype) if when and tensor is not None else x.new_empty(0, dtype=dtype)

    fast, lean = save == "fast", save != "none"
    projected, projected_context = side_by_side(projections, t) if fast else (None, None)
    saved = Saved(
        projected=keep(projected, fast),
        projected_context=keep(projected_context, fast),
        attended=keep(attended, lean),
        total=keep(total, fast and o.placement == "post", dtype),
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
    grads = dict.fromkeys(Tensors._fields)

    if not pre:
        total = saved.total if saved.total.numel() else _total(x, t, o, saved.attended)
        grad, grads["norm_weight"], grads["norm_bias"] = normalize_backward(
            grad, total, o.norm, t.norm_weight, o.eps, (True, need.norm_weight, need.norm_bias)
        )
    grad_u = dropout(o.step * grad, o.dropout, t.seed, o.stream + OUTPUT_STREAM)
    grads["w_out"] = outer(grad_u, saved.attended) if need.w_out else None
    grads["b_out"] = sum_rows(grad_u) if need.b_out else None

    grad_x = o.residual_scale * grad if need_x else None
    need_n = need_x or (pre and (need.norm_weight or need.norm_bias))
    projection = ("w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "context")
    others = ("attn_mask", "key_padding_mask", "qk_scale")
    if need_n or any(getattr(need, name) for name in projection + others):
        if saved.projected.numel() == 0:
            projections = project(n, t, o)
        else:
            projections = (saved.projected,) if t.context is None else (saved.projected, saved.projected_context)
        q, k, v = split_heads(projections, t, o)
        q_positioned, k_positioned = (position_heads(heads, t.cos, t.sin, t.qk_scale) for heads in (q, k))
        grad_q, grad_k, grad_v, grad_scores = attention_backward(
            to_heads(grad_u @ t.w_out, o.num_heads),
            q_positioned,
            k_positioned,
            v,
            o.scale,
            _masks(q, k, t, o),
            _attention_dropout(t, o),
        )
        if need.attn_mask:
            grads["attn_mask"] = grad_scores.sum_to_size(t.attn_mask.shape)
        if need.key_padding_mask:
            grads["key_padding_mask"] = grad_scores.sum((1, 2))
        grad_q, scale_q = position_heads_backward(grad_q, q, t.cos, t.sin, t.qk_scale)
        grad_k, scale_k = position_heads_backward(grad_k, k, t.cos, t.sin, t.qk_scale)
        grads["qk_scale"] = scale_q + scale_k if need.qk_scale else None
        source = x if t.context is None else t.context
        grad_qkv = merge_heads(grad_q, x), merge_heads(grad_k, source), merge_heads(grad_v, source)
        grad_n, projection_grads = project_backward(grad_qkv, n, t, o, need_n, need)
        grads.update(projection_grads)
    if need_n:
        if pre:
            grad_n, grads["norm_weight"], grads["norm_bias"] = normalize_backward(
                grad_n, x, o.norm, t.norm_weight, o.eps, (need_x, need.norm_weight, need.norm_bias)
            )
        grad_x = grad_x + grad_n if need_x else None
    return grad_x, Tensors(**grads)


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    o, fast, lean = options, save == "fast", save != "none"
    *batch, t, _ = x.shape
    width = tensors.w_out.shape[1]
    kv_width = 2 * (width // o.num_heads) * o.num_kv_heads
    own = tensors.context is None

    def shape(when: bool, *shape: int) -> tuple[int, ...]:
        return shape if when else (0,)

    dtype = tensors.w_q.dtype
    return Saved(
        projected=(shape(fast, *batch, t, width + kv_width if own else width), dtype),
        projected_context=(shape(fast and not own, *(() if own else tensors.context.shape[:-1]), kv_width), dtype),
        attended=(shape(lean, *batch, t, width), dtype),
        total=(shape(fast and o.placement == "post", *x.shape), x.dtype),
    )


def _attention_dropout(t: Tensors, o: Options) -> Callable[[Tensor], Tensor]:
    return lambda weights: dropout(weights, o.attention_dropout, t.seed, o.stream + HIDDEN_STREAM)


def _masks(q: Tensor, k: Tensor, t: Tensors, o: Options):
    return masks(q.shape[2], k.shape[2], t.attn_mask, t.key_padding_mask, t.cu_seqlens, o.causal, device=q.device)


def _total(x: Tensor, t: Tensors, o: Options, attended: Tensor) -> Tensor:
    """``a x + c drop(W_o attended + b_o)``."""
    u = dropout(F.linear(attended, t.w_out, t.b_out), o.dropout, t.seed, o.stream + OUTPUT_STREAM)
    return torch.add(x if o.residual_scale == 1.0 else o.residual_scale * x, u, alpha=o.step)
