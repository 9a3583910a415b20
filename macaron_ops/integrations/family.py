"""What a family of models says about itself, and the checks that families share; see ``macaron_ops.nn.parts``."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from macaron_ops.nn.activation import fused_activation
from macaron_ops.nn.parts import class_name, why_not_part
from macaron_ops.reference.activation import GATED

__all__ = ["Family", "activation_name", "why_not_activation", "why_not_weights"]

_TRANSFORMERS = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}
_GATED = {plain: gated for gated, plain in GATED.items()}


class Family(NamedTuple):
    """Layers that are replaced alike.

    Attributes:
        name: what ``replace_layers(families=...)`` calls it.
        layers: the classes, as ``"module.Class"``: naming one imports nothing.
        fused: from a class of ``layers`` to the class that replaces it, a subclass with another ``forward`` and the
            memory policy ``save`` as its only attribute of its own; None where ``why_not`` has a reason for every
            layer of the class.
        why_not: what the fused class cannot do for a layer, or None. Asked of replaced layers too.
    """

    name: str
    layers: tuple[str, ...]
    fused: Callable[[type[nn.Module]], type[nn.Module] | None]
    why_not: Callable[[nn.Module], str | None]


def why_not_weights(layer: nn.Module) -> str | None:
    """A parameter that is a tensor subclass (quantised, sharded), or None."""
    for name, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {class_name(type(parameter))}, not a plain parameter"
    return None


def why_not_activation(name: str, activation: object, *, gated: bool = False) -> str | None:
    """Why the activation (a function, or a submodule of this name) has to be called; or None."""
    reason = why_not_part(name, activation, type(activation)) if isinstance(activation, nn.Module) else None
    if reason is None and activation_name(activation, gated=gated) is None:
        return f"{name} {getattr(activation, '__name__', type(activation).__name__)} has no fused form"
    return reason


def activation_name(activation: object, *, gated: bool = False) -> str | None:
    """The operators' name for an activation of torch or transformers, a function or a module; None: they have none.
    ``gated``: it is that of a gate, which multiplies another half of the pre-activations."""
    if not callable(activation) or isinstance(activation, type):
        return None
    name = _TRANSFORMERS.get(class_name(type(activation))) or fused_activation(activation)
    if not isinstance(name, str):
        return None
    return _GATED.get(name) if gated else name
