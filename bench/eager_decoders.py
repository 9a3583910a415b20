"""Two causal layers with equal matrices in plain PyTorch: pre-norm, and nGPT's on the unit sphere.

    pre-norm:  x <- x + A(N(x));                        x <- x + B(N(x)),    N(x) = g x / rms(x)
    nGPT:      h <- S(h + alpha_A (S(A(h)) - h));       h <- S(h + alpha_B (S(B(h)) - h)),    S(z) = z / |z|

A is attention with rotary positions, B = W_2 (silu(v) * u) with [v; u] = W_1 x; no biases. nGPT's queries and keys are
unit vectors per head, times s_qk, its W_1 has scaled rows. One product for q, k and v, rotation and norm of q and k
together, `scaled_dot_product_attention`, and scales where they cost least over many tokens: on W_1, not on what it
gives.

Parameters carry the names of `macaron_ops.nn.NGPTLayer`, and scales are stored as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import random_parameter

Rotary = tuple[Tensor, Tensor]  # cos and sin, (T, head_dim / 2) each
_EPS = 1e-5  # of the norm
_ALPHA = 0.05  # the first step size of nGPT's substeps


def attend(x: Tensor, w_qkv: Tensor, w_out: Tensor, heads: int, rotary: Rotary, qk_scale: Tensor | None) -> Tensor:
    """W_out MHA(x), causal; with `qk_scale`, (heads, head_dim), of unit q and k and scores times sqrt(head_dim)."""
    qk, v = F.linear(x, w_qkv).unflatten(-1, (3 * heads, -1)).split((2 * heads, heads), dim=-2)
    cos, sin = (angle[:, None] for angle in rotary)
    first, second = qk.chunk(2, dim=-1)
    qk = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    if qk_scale is not None:
        qk = F.normalize(qk, dim=-1) * qk_scale.repeat(2, 1)
    q, k, v = (each.transpose(1, 2) for each in (*qk.chunk(2, dim=-2), v))
    scale = None if qk_scale is None else q.shape[-1] ** 0.5
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.linear(mixed.transpose(1, 2).flatten(-2), w_out)


def feed(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """W_out (silu(gate) * up); w_in (2F, D), gate rows first."""
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_out)


class EagerPreNormLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.linear1 = nn.Linear(width, 2 * hidden, bias=False)
        self.linear2 = nn.Linear(hidden, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width, _EPS), nn.RMSNorm(width, _EPS)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + attend(self.norm1(x), self.in_proj.weight, self.out_proj.weight, self.heads, rotary, None)
        return x + feed(self.norm2(x), self.linear1.weight, self.linear2.weight)


class EagerNGPTLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.base = heads, width**-0.5
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.linear1 = nn.Linear(width, 2 * hidden, bias=False)
        self.linear2 = nn.Linear(hidden, width, bias=False)
        self.attention_alpha, self.ffn_alpha = (nn.Parameter(torch.full((width,), self.base)) for _ in range(2))
        self.qk_scale = nn.Parameter(torch.full((heads, width // heads), self.base))
        self.hidden_scale = nn.Parameter(torch.ones(2 * hidden))

    def forward(self, h: Tensor, rotary: Rotary) -> Tensor:
        qk_scale = self.qk_scale / self.base
        u = attend(h, self.in_proj.weight, self.out_proj.weight, self.heads, rotary, qk_scale)
        h = self.toward(h, u, self.attention_alpha)
        w_in = (self.hidden_scale / self.base)[:, None] * self.linear1.weight
        return self.toward(h, feed(h, w_in, self.linear2.weight), self.ffn_alpha)

    def toward(self, h: Tensor, u: Tensor, alpha: Tensor) -> Tensor:
        step = alpha.abs() * (_ALPHA / self.base)
        return F.normalize(torch.lerp(h, F.normalize(u, dim=-1), step), dim=-1)


EAGER_DECODERS: dict[str, type[nn.Module]] = {"pre-norm": EagerPreNormLayer, "nGPT": EagerNGPTLayer}


@torch.no_grad()
def randomize_(layer: nn.Module, seed: int) -> nn.Module:
    """Random matrices; what multiplies channels is a tenth off its start, so that none is like another."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if name.endswith(("proj.weight", "linear1.weight", "linear2.weight")):
            parameter.copy_(random_parameter(name, tuple(parameter.shape), generator))
        else:
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return layer
