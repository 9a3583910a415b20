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
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    return [y, *torch.autograd.grad((y * weight).sum(), [*inputs, *parameters], allow_unused=True)]


def kept_bytes(function) -> int:
    """Bytes of the distinct tensors that ``function()`` keeps for its backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())
