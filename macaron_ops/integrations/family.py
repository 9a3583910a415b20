"""What a family of models says about itself, and the checks that families share.

A fused layer reads the parameters of its submodules and does not call them. It may therefore stand in only for
submodules whose call is nothing but their class's forward: no hook, no patched ``forward``, no other class (LoRA,
quantisation, adapters).
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

from torch import nn

from macaron_ops.nn.activation import fused_activation

__all__ = ["Family", "activation_name", "class_name", "why_not_activation", "why_not_part", "why_not_weights"]

# transformers' hooks that record hidden states and attentions. They do nothing until a call asks for those.
_RECORDING = "transformers.utils.output_capturing"

_TRANSFORMERS = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}


class Family(NamedTuple):
    """Layers that are replaced alike.

    Attributes:
        name: what ``replace_layers(families=...)`` calls it.
        layers: the classes, as ``"module.Class"``: naming one imports nothing.
        fused: from a class of ``layers`` to the class that replaces it, a subclass with another ``forward`` and the
            memory policy ``save`` as its only attribute of its own.
        why_not: what the fused class cannot do for a layer, or None. Asked of replaced layers too.
    """

    name: str
    layers: tuple[str, ...]
    fused: Callable[[type[nn.Module]], type[nn.Module]]
    why_not: Callable[[nn.Module], str | None]


def class_name(cls: type) -> str:
    """``"module.Class"``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def why_not_part(name: str, part: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """Why the submodule ``part`` has to be called, not read; or None."""
    if type(part) is not expected:
        return f"{name} is a {class_name(type(part))}, not {expected.__name__} itself"
    if "forward" in part.__dict__:
        return f"{name} has a forward of its own, which would be skipped"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        for hook in chain.from_iterable(h.values() for h in hooks):
            if getattr(hook, "__module__", None) != _RECORDING:
                return f"{name} has a hook, {getattr(hook, '__qualname__', hook)}, which would be skipped"
    return None


def why_not_weights(layer: nn.Module) -> str | None:
    """A parameter that is a tensor subclass (quantised, sharded), or None."""
    for name, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {class_name(type(parameter))}, not a plain parameter"
    return None


def why_not_activation(name: str, activation: object) -> str | None:
    """Why the activation (a function, or a submodule of this name) has to be called; or None."""
    if activation_name(activation) is None:
        return f"{name} {getattr(activation, '__name__', type(activation).__name__)} has no fused form"
    return why_not_part(name, activation, type(activation)) if isinstance(activation, nn.Module) else None


def activation_name(activation: object) -> str | None:
    """The operators' name for an activation of torch or transformers, a function or a module; None: they have none."""
    name = _TRANSFORMERS.get(class_name(type(activation))) or fused_activation(activation)
    return name if isinstance(name, str) else None
