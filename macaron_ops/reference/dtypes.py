"""The one rule of numbers: accumulate in float32 (float64 for float64 inputs), round once at the output."""

from typing import NamedTuple, TypeVar

from torch import dtype, float32, float64

__all__ = ["accumulation_dtype", "upcast"]

T = TypeVar("T", bound=NamedTuple)


def accumulation_dtype(dtype: dtype) -> dtype:
    """float64 for float64, float32 for every narrower floating type."""
    return float64 if dtype == float64 else float32


def upcast(tensors: T, dtype: dtype) -> T:
    """A named tuple of tensors with the floating ones in ``dtype``; ``None``, integer and boolean ones stay."""
    return type(tensors)(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors))
