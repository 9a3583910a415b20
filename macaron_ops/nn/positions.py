"""Where a token stands: sinusoidal and learned embeddings that are added, rotary angles for queries and keys."""

import torch
from torch import Tensor

__all__ = ["POSITIONS", "fairseq_sinusoidal", "nvidia_factors", "rotary_angles", "sinusoidal"]

POSITIONS = ("sinusoidal", "learned", "rotary", "fairseq")
_BASE = 10000.0  # Vaswani et al. 2017, section 3.5; kept by Su et al. 2021


def sinusoidal(length: int, d_model: int, *, device=None, dtype=None) -> Tensor:
    """``(T, D)``: channel 2i is ``sin(t w_i)``, channel 2i + 1 is ``cos(t w_i)`` (Vaswani et al. 2017, section 3.5)."""
    angles = _angles(length, d_model, device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[:, :d_model].to(dtype)


def fairseq_sinusoidal(padding: Tensor, padding_idx: int, d_model: int, *, dtype=None) -> Tensor:
    """``(B, T, D)``: channel i is ``sin(t w_i)``, channel D/2 + i is ``cos(t w_i)``, ``w_i = 10000^(-i / (D/2 - 1))``.

    ``t`` counts the tokens that are not padding, from ``padding_idx + 1``; padding, ``(B, T)``, gets zeros. So fairseq
    0.6 has it, with the padding of a source on the left and that of a target on the right.
    """
    half = d_model // 2
    frequency = _BASE ** (-torch.arange(half, device=padding.device, dtype=torch.float32) / max(half - 1, 1))
    t = (~padding).cumsum(-1) + padding_idx
    angles = t[..., None].to(torch.float32) * frequency
    table = torch.cat([angles.sin(), angles.cos(), angles.new_zeros(*t.shape, d_model % 2)], dim=-1)
    return table.masked_fill(padding[..., None], 0.0).to(dtype)


def rotary_angles(length: int, head_dim: int, *, device=None, dtype=None) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, each ``(T, head_dim // 2)``, as ``attend_step`` takes them (Su et al. 2021, arXiv 2104.09864)."""
    angles = _angles(length, head_dim // 2 * 2, device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def nvidia_factors(length: int, head_dim: int, *, device=None, dtype=None) -> tuple[Tensor, None]:
    """``((T, head_dim), None)``: what NVIDIA's public nGPT multiplies the channels of q and k by, where the paper
    rotates them. Channels 2i and 2i + 1 have the columns i and head_dim/2 + i of :func:`sinusoidal`."""
    first, second = sinusoidal(length, head_dim, device=device).chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2).to(dtype), None


def _angles(length: int, channels: int, device) -> Tensor:
    """``t w_i`` with ``w_i = 10000^(-2i / channels)``, ``(T, ceil(channels / 2))`` in float32."""
    frequency = _BASE ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / max(channels, 1))
    return torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
