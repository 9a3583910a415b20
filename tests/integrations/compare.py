"""What the tests of all families ask of a replaced model."""

import torch
from torch import Tensor, nn

__all__ = ["assert_same_function", "loss_and_grads", "same_state"]


def loss_and_grads(model: nn.Module, call) -> tuple[Tensor, dict[str, Tensor]]:
    """``call(model)`` and the gradients of a weighted sum of it in all parameters."""
    model.zero_grad()
    y = call(model)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)).sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_function(model: nn.Module, other: nn.Module, call) -> None:
    """Outputs and parameter gradients agree (float64 models: to ``assert_close``'s tolerance for float64)."""
    y, grads = loss_and_grads(model, call)
    other_y, other_grads = loss_and_grads(other, call)
    torch.testing.assert_close(other_y, y)
    assert other_grads.keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(other_grads[name], grads[name], msg=lambda text, name=name: f"{name}: {text}")


def same_state(model: nn.Module) -> dict[str, int]:
    """The identity of every tensor of the ``state_dict``, by name and in order."""
    return {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
