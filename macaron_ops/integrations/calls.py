"""Calls of models and of their layers as they are recorded: the arguments, which tokens are real, batches first."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["arguments", "batch_first", "real_tokens", "slow_path"]


def arguments(inputs: object, dtype: torch.dtype | None = None) -> tuple[Sequence[object], Mapping[str, object]]:
    """Positional and keyword arguments of a model; floating tensors in ``dtype`` unless it is None.

    Raises:
        TypeError: no tensor, sequence or mapping.
    """

    def cast(value: object) -> object:
        return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(inputs, Tensor):
        return (cast(inputs),), {}
    if isinstance(inputs, Mapping):
        return (), {name: cast(value) for name, value in inputs.items()}
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(map(cast, inputs)), {}
    raise TypeError(f"inputs: expected a tensor, a sequence or a mapping; got {type(inputs).__name__}")


def real_tokens(kwargs: Mapping[str, object]) -> Tensor | None:
    """``(B, T)``, True where an ``attention_mask`` of two dimensions is not 0; None without one."""
    mask = kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def batch_first(layer: nn.Module, x: Tensor) -> Tensor:
    """What came into a layer, ``(B, T, D)`` also where torch's layer has the time first.

    Raises:
        ValueError: a nested tensor.
    """
    if x.is_nested:
        raise ValueError("inputs: expected dense tensors with a padding mask; a layer was given a nested one")
    attention = getattr(layer, "self_attn", None)
    return x if x.dim() != 3 or getattr(attention, "batch_first", True) else x.transpose(0, 1)


@contextmanager
def slow_path() -> Iterator[None]:
    """torch's encoder turns padded inputs into nested ones on its fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
