"""Nested tensors ``(B, *, D)``, strided or jagged, to dense ones and back in the same layout; all differentiable."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["pack", "pad"]


def pack(x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The sequences one after the other.

    Returns:
        packed ``(total, D)``; their borders ``cu_seqlens`` (int32, ``(B + 1,)``); and the way back, which takes a
        tensor of packed's shape.
    """
    if x.layout == torch.jagged:
        x = x.contiguous()
        offsets = x.offsets()
        return (
            x.values(),
            offsets.to(torch.int32),
            # x's own offsets: only then can results be added to x
            lambda y: torch.nested.nested_tensor_from_jagged(y, offsets),
        )
    sequences = x.unbind()
    lengths = [len(s) for s in sequences]
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return (
        torch.cat(sequences),
        borders.to(x.device),
        lambda y: torch.nested.as_nested_tensor(list(y.split(lengths))),
    )


def pad(x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The sequences side by side, filled with zeros.

    Returns:
        padded ``(B, T, D)``; ``key_padding_mask (B, T)``, True where there is nothing; and the way back, which takes
        a tensor of padded's shape.
    """
    packed, borders, repack = pack(x)
    lengths = borders.diff()
    padded = pad_sequence(packed.split(lengths.tolist()), batch_first=True)
    there = torch.arange(padded.shape[1], device=x.device) < lengths[:, None]
    return padded, ~there, lambda y: repack(y[there])
