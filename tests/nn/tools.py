"""Shared by the tests of modules: random parameters, gradients of everything, bytes kept for the backward pass."""

import torch
from torch import nn


def randomize(module: nn.Module) -> nn.Module:
    """Normal numbers in every parameter: initial zeros and ones would hide a bias or a norm that is not used."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def twin(module: nn.Module, source: nn.Module) -> nn.Module:
    """``module`` with the parameters of ``source``, which has the same keys."""
    module.load_state_dict(source.state_dict())
    return module


def output_and_grads(module, *args, **kwargs):
    """``[y, gradients in the inputs that need one, gradients in the parameters]``."""
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    y = module(*args, **kwargs)
    parameters = list(module.parameters())
    return [y, *torch.autograd.grad(y, [*inputs, *parameters], cotangent(y))]


def cotangent(y: torch.Tensor) -> torch.Tensor:
    """The same normal numbers for every tensor of one shape, whatever its dtype and device."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def kept_bytes(function) -> int:
    """Bytes of the distinct tensors that ``function()`` keeps for its backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())
