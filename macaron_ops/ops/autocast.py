"""What autocast asks for, and a region without it."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast_dtype", "autocast_of", "without_autocast"]

# Asked once: torch 2.11 compiles no function that asks. The meta device, among others, has no autocast.
_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(d))


def autocast_of(device: str) -> torch.dtype | None:
    """The dtype in which autocast wants the operands of matrix products; None where it is off."""
    return torch.get_autocast_dtype(device) if device in _DEVICES and torch.is_autocast_enabled(device) else None


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The same for an input x: nothing is wanted of float64."""
    return None if x.dtype == torch.float64 or not x.is_floating_point() else autocast_of(x.device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A region where autocast is off."""
    return torch.autocast(device.type, enabled=False) if device.type in _DEVICES else nullcontext()
