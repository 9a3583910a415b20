"""From tokens to heads and back: the q, k, v products of the attention step with packed or separate parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import outer, sum_rows

__all__ = ["merge_heads", "project", "project_backward", "side_by_side", "split_heads", "to_heads"]


def project(n: Tensor, t, o) -> tuple[Tensor, ...]:
    """The products as they are formed: ``(qkv,)`` from packed parameters without a context, else ``(q, k, v)``."""
    if t.context is None and t.w_k is None:
        return (F.linear(n, t.w_q, t.b_q),)
    source = n if t.context is None else t.context
    weights, biases = _weights(t, o), _biases(t, o)
    return tuple(F.linear(a, w, b) for a, w, b in zip((n, source, source), weights, biases, strict=True))


def project_backward(
    grads: tuple[Tensor, Tensor, Tensor], n: Tensor, t, o, need_n: bool, need
) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """The gradient in ``n``, and those of the parameters and the context by name, from the gradients of q, k and v."""
    if t.context is None and t.w_k is None:
        grad = torch.cat(grads, dim=-1)
        named = {"w_q": outer(grad, n) if need.w_q else None, "b_q": sum_rows(grad) if need.b_q else None}
        return grad @ t.w_q if need_n else None, named
    w_q, w_k, w_v = _weights(t, o)
    source = n if t.context is None else t.context
    grad_n = grads[0] @ w_q if need_n else None
    grad_source = grads[1] @ w_k + grads[2] @ w_v if need.context or (need_n and t.context is None) else None
    if need_n and t.context is None:
        grad_n = grad_n + grad_source
    named = {"context": grad_source if need.context else None}
    inputs = dict(zip("qkv", zip(grads, (n, source, source), strict=True), strict=True))
    if t.w_k is not None:
        for head, (g, a) in inputs.items():
            named[f"w_{head}"] = outer(g, a) if getattr(need, f"w_{head}") else None
            named[f"b_{head}"] = sum_rows(g) if getattr(need, f"b_{head}") else None
    else:
        named["w_q"] = torch.cat([outer(g, a) for g, a in inputs.values()]) if need.w_q else None
        named["b_q"] = torch.cat([sum_rows(g) for g in grads]) if need.b_q else None
    return grad_n, named


def side_by_side(projections: tuple[Tensor, ...], t) -> tuple[Tensor, Tensor | None]:
    """What is saved of the projections: q, k and v in one tensor and None; with a context q, and its k and v in one."""
    if len(projections) == 1:
        return projections[0], None
    if t.context is None:
        return torch.cat(projections, dim=-1), None
    return projections[0], torch.cat(projections[1:], dim=-1)


def split_heads(projections: tuple[Tensor, ...], t, o) -> tuple[Tensor, Tensor, Tensor]:
    """q ``(B, H, T, head_dim)`` and k, v ``(B, Hkv, S, head_dim)`` of the projections, as they are formed or saved."""
    widths = _widths(t, o)
    if len(projections) == 1:
        projections = projections[0].split(widths, dim=-1)
    elif len(projections) == 2:
        projections = projections[0], *projections[1].split(widths[1:], dim=-1)
    q, k, v = projections
    return to_heads(q, o.num_heads), to_heads(k, o.num_kv_heads), to_heads(v, o.num_kv_heads)


def to_heads(a: Tensor, heads: int) -> Tensor:
    """``(..., T, heads * head_dim)`` to ``(B, heads, T, head_dim)``."""
    return a.reshape(a.shape[:-2].numel(), a.shape[-2], heads, a.shape[-1] // heads).transpose(1, 2)


def merge_heads(heads: Tensor, like: Tensor) -> Tensor:
    """``(B, heads, T, head_dim)`` to ``(..., T, heads * head_dim)`` with the leading dimensions of ``like``."""
    return heads.transpose(1, 2).reshape(*like.shape[:-1], heads.shape[1] * heads.shape[3])


def _widths(t, o) -> list[int]:
    """The channels of q, k and v."""
    width = t.w_out.shape[1]
    kv_width = width // o.num_heads * o.num_kv_heads
    return [width, kv_width, kv_width]


def _weights(t, o) -> tuple[Tensor, Tensor, Tensor]:
    return t.w_q.split(_widths(t, o)) if t.w_k is None else (t.w_q, t.w_k, t.w_v)


def _biases(t, o) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    packed = t.w_k is None and t.b_q is not None
    return t.b_q.split(_widths(t, o)) if packed else (t.b_q, t.b_k, t.b_v)
