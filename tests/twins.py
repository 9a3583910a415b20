"""Each operator as a model's author would write it in eager PyTorch: twins that share no code with the package.

The one exception: the numbers of the dropout masks, which ``tests/reference/test_dropout.py`` compares with Triton's.
"""

import torch
import torch.nn.functional as F

from macaron_ops.reference.dropout import uniform

__all__ = ["attend_step", "ffn_step", "normalize_step", "sphere_attend_step"]


def _norm(x, norm, weight, bias, eps):
    if norm is None:
        return x
    if norm == "layer":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    y = F.rms_norm(x, (x.shape[-1],), eps=eps) if norm == "rms" else F.normalize(x, dim=-1, eps=eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _act(z, activation):
    if activation in ("swiglu", "geglu"):
        gate, up = z.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up
    return {
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }[activation](z)


def _drop(u, p, seed, stream):
    """Inverted dropout with the numbers of (seed, stream)."""
    if p == 0.0:
        return u
    seed = seed if isinstance(seed, torch.Tensor) else torch.tensor(seed, device=u.device)
    return u * (uniform(seed, u.shape, stream) >= p) / (1 - p)


def ffn_step(
    x,
    w_in,
    b_in,
    w_out,
    b_out,
    *,
    norm="layer",
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="relu",
    step=0.5,
    residual_scale=1.0,
    placement="pre",
    dropout=0.0,
    activation_dropout=0.0,
    seed=None,
):
    n = _norm(x, norm, norm_weight, norm_bias, eps) if placement == "pre" else x
    h = _drop(_act(F.linear(n, w_in, b_in), activation), activation_dropout, seed, 1)
    y = residual_scale * x + step * _drop(F.linear(h, w_out, b_out), dropout, seed, 0)
    return _norm(y, norm, norm_weight, norm_bias, eps) if placement == "post" else y


def attend_step(
    x,
    w_qkv,
    b_qkv,
    w_out,
    b_out,
    num_heads,
    *,
    norm="layer",
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    step=1.0,
    residual_scale=1.0,
    placement="pre",
    context=None,
    num_kv_heads=None,
    causal=False,
    attn_mask=None,
    key_padding_mask=None,
    cu_seqlens=None,
    scale=None,
    rotary=None,
    qk_scale=None,
    dropout=0.0,
    attention_dropout=0.0,
    seed=None,
):
    """A row that is masked entirely attends to nothing."""
    kv_heads = num_kv_heads or num_heads
    n = _norm(x, norm, norm_weight, norm_bias, eps) if placement == "pre" else x
    source = n if context is None else context
    if not isinstance(w_qkv, tuple):
        head_dim = w_out.shape[1] // num_heads
        sizes = [num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        w_qkv = w_qkv.split(sizes)
        b_qkv = None if b_qkv is None else b_qkv.split(sizes)
    b_qkv = (None, None, None) if b_qkv is None else b_qkv

    def heads(t, i, count):
        projected = F.linear(t, w_qkv[i], b_qkv[i])
        return projected.unflatten(-1, (count, projected.shape[-1] // count)).transpose(-2, -3)

    q, k, v = heads(n, 0, num_heads), heads(source, 1, kv_heads), heads(source, 2, kv_heads)
    if rotary is not None:
        cos, sin = rotary
        r = 2 * cos.shape[-1]

        def rotate(t):
            turned = torch.cat([-t[..., r // 2 : r], t[..., : r // 2]], dim=-1)
            head = t[..., :r] * torch.cat([cos, cos], dim=-1) + turned * torch.cat([sin, sin], dim=-1)
            return torch.cat([head, t[..., r:]], dim=-1)

        q, k = rotate(q), rotate(k)
    if qk_scale is not None:
        s = qk_scale if qk_scale.dim() == 1 else qk_scale[:, None, :]
        q, k = F.normalize(q, dim=-1) * s, F.normalize(k, dim=-1) * s
    k, v = (t.repeat_interleave(num_heads // kv_heads, dim=-3) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[..., None, None, :]
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if cu_seqlens is not None:
        apart = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device)
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            apart[start:stop, start:stop] = False
        scores = scores.masked_fill(apart, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    o = _drop(weights, attention_dropout, seed, 1) @ v
    u = _drop(F.linear(o.transpose(-2, -3).flatten(-2), w_out, b_out), dropout, seed, 0)
    y = residual_scale * x + step * u
    return _norm(y, norm, norm_weight, norm_bias, eps) if placement == "post" else y


def normalize_step(x, u, step, *, direction="tangent"):
    if direction == "tangent":
        v = u - (u * x).sum(-1, keepdim=True) * x
    elif direction == "difference":
        v = F.normalize(u, dim=-1) - x
    else:
        v = u
    return F.normalize(x + step * v, dim=-1)


def sphere_attend_step(
    x, step, beta, *, query=None, key=None, value=None, weighting="softmax", direction="tangent", causal=False
):
    q, k, v = (x if t is None else t for t in (query, key, value))
    scores = beta * (q @ k.mT)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    w = torch.softmax(scores, -1) if weighting == "softmax" else torch.exp(scores) / k.shape[-2]
    return normalize_step(x, w @ v, step, direction=direction)
