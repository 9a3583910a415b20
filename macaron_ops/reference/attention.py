"""Multi-head attention on projected queries, keys and values, and its gradient.

    S = scale q k^T + bias,   S_ij = -inf where blocked,   P = softmax(S),   o = drop(P) v

A row whose every score is -inf attends to nothing: its P and o are 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .norm import unit, unit_backward

__all__ = [
    "Masks",
    "attention",
    "attention_backward",
    "masks",
    "position_heads",
    "position_heads_backward",
    "softmax_backward",
]

UNIT_EPS = 1e-12  # of the unit queries and keys, as torch.nn.functional.normalize

Masks = tuple[list[Tensor], list[Tensor]]
Drop = Callable[[Tensor], Tensor]  # of the attention weights; linear


def masks(
    t: int,
    s: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    device: torch.device,
) -> Masks:
    """The boolean masks (True: blocked) and the terms that are added to the scores, broadcastable to ``(B, H, T, S)``.

    Args:
        t, s: number of queries and of keys.
        attn_mask: bool or floating, broadcastable to ``(B, H, T, S)``.
        key_padding_mask: bool or floating, ``(B, S)``.
        cu_seqlens: ``(sequences + 1,)``, the borders of sequences packed one after the other (``t = s``).
        causal: query i sees the keys j <= i.
    """
    given = [attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None, :]]
    blocked = [m for m in given if m is not None and m.dtype == torch.bool]
    added = [m for m in given if m is not None and m.dtype != torch.bool]
    if causal:
        blocked.append(torch.ones(t, s, dtype=torch.bool, device=device).triu(1))
    if cu_seqlens is not None:
        token = torch.arange(t, dtype=cu_seqlens.dtype, device=device)
        sequence = torch.searchsorted(cu_seqlens.contiguous(), token, right=True)
        blocked.append(sequence[:, None] != sequence[None, :])
    return blocked, added


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks, drop: Drop) -> Tensor:
    """Attention of ``q (B, H, T, head_dim)`` to ``k``, ``v (B, Hkv, S, head_dim)``: o ``(B, H, T, head_dim)``."""
    return torch.matmul(drop(_weights(_scores(q, k, scale, masks), masks)), _repeat(v, q))


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks, drop: Drop
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in ``(q, k, v, S)``: ``dS = P (dP - sum_j P dP)``.

    P is formed again as a softmax. A kernel that saved the log-sum-exp has ``exp(S - lse)`` at hand, whose relative
    error is the absolute error of ``lse``.
    """
    p = _weights(_scores(q, k, scale, masks), masks)
    grad_v = torch.matmul(drop(p).transpose(-1, -2), grad)
    grad_p = drop(torch.matmul(grad, _repeat(v, q).transpose(-1, -2)))
    grad_scores = softmax_backward(grad_p, p)
    grad_q = torch.matmul(grad_scores, _repeat(k, q)) * scale
    grad_k = torch.matmul(grad_scores.transpose(-1, -2), q) * scale
    return grad_q, _group(grad_k, k.shape[1]), _group(grad_v, k.shape[1]), grad_scores


def position_heads(q: Tensor, cos: Tensor | None, sin: Tensor | None, qk_scale: Tensor | None) -> Tensor:
    """What happens to queries and keys ``(B, H, T, head_dim)`` between projection and scores.

    Rotary embedding of the first ``R`` channels in the half-split convention (Su et al. 2021, arXiv 2104.09864):
    ``(u, w) -> (u cos - w sin, w cos + u sin)`` with ``cos``, ``sin (T, R / 2)``; then, where ``qk_scale`` is given,
    the unit vector of each head times ``qk_scale (head_dim,)`` or ``(H, head_dim)`` (nGPT, arXiv 2410.01131).
    """
    if cos is not None:
        q = _rotate(q, cos, sin)
    return q if qk_scale is None else unit(q, UNIT_EPS) * _per_head(qk_scale)


def position_heads_backward(
    grad: Tensor, q: Tensor, cos: Tensor | None, sin: Tensor | None, qk_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`position_heads` in ``(q, qk_scale)``."""
    grad_scale = None
    if qk_scale is not None:
        rotated = q if cos is None else _rotate(q, cos, sin)
        per_head = _per_head(qk_scale)
        grad_scale = (grad * unit(rotated, UNIT_EPS)).sum_to_size(per_head.shape).reshape(qk_scale.shape)
        grad = unit_backward(grad * per_head, rotated, UNIT_EPS)
    return grad if cos is None else _rotate(grad, cos, -sin), grad_scale


def _scores(q: Tensor, k: Tensor, scale: float, masks: Masks) -> Tensor:
    scores = torch.matmul(q * scale, _repeat(k, q).transpose(-1, -2))
    blocked, added = masks
    for bias in added:
        scores = scores + bias
    for mask in blocked:
        scores = scores.masked_fill(mask, -torch.inf)
    return scores


def _weights(scores: Tensor, masks: Masks) -> Tensor:
    if not any(masks) or scores.numel() == 0:
        return torch.softmax(scores, dim=-1)
    # The softmax of a row of -inf is NaN, in its gradient too: give such rows equal scores first, zeros after.
    nothing = scores.detach().amax(-1, keepdim=True) == -torch.inf
    return torch.where(nothing, 0.0, torch.softmax(torch.where(nothing, 0.0, scores), dim=-1))


def softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    """``p (grad - sum_j p grad)``: rows of the result sum to zero as closely as rounding allows."""
    return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype)


def _repeat(k: Tensor, q: Tensor) -> Tensor:
    """Grouped-query attention: each of the ``Hkv`` heads serves ``H / Hkv`` consecutive query heads."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _group(grad: Tensor, heads: int) -> Tensor:
    """The adjoint of :func:`_repeat`."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def _rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    u, w, rest = q.split([half, half, q.shape[-1] - 2 * half], dim=-1)
    return torch.cat([u * cos - w * sin, w * cos + u * sin, rest], dim=-1)


def _per_head(qk_scale: Tensor) -> Tensor:
    """Broadcastable to ``(B, H, T, head_dim)``."""
    return qk_scale if qk_scale.dim() == 1 else qk_scale[:, None, :]
