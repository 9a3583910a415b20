"""Activations as people give them, and the names under which the operators have them fused."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.ops.checks import choice
from macaron_ops.reference.activation import ACTIVATIONS, GATED

from .parts import has_call_of_its_own

__all__ = ["Activation", "fused_activation", "hidden_rows", "torch_activation"]

Activation = str | Callable[[Tensor], Tensor]

_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
_MODULES = ((nn.ReLU, "relu"), (nn.SiLU, "silu"))
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
_PLAIN = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def fused_activation(activation: Activation) -> Activation:
    """The operator's name of an activation: ``F.gelu``, ``nn.GELU()`` and ``"gelu"`` are all ``"gelu"``.

    Any other callable is returned as it is, and the operators run it through their definition; so is a module that has
    hooks.

    Raises:
        ValueError: a name that no operator knows.
        TypeError: neither a name nor a callable, or a class instead of its instance.
    """
    if isinstance(activation, str):
        choice("activation", activation, ACTIVATIONS)
        return activation
    if not callable(activation):
        raise TypeError(f"activation: expected a name or a callable; got {activation!r}")
    if isinstance(activation, type):
        raise TypeError(f"activation: expected a function or an instance; got the class {activation.__name__} itself")
    if isinstance(activation, nn.Module) and has_call_of_its_own(activation):
        return activation
    for function, name in _FUNCTIONS:
        if activation is function:
            return name
    for module, name in _MODULES:
        if type(activation) is module:
            return name
    if type(activation) is nn.GELU:
        return _GELU[activation.approximate]
    if type(activation) is functools.partial and activation.func is F.gelu and not activation.args:
        if activation.keywords.keys() == {"approximate"}:
            return _GELU[activation.keywords["approximate"]]
    return activation


def torch_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The function that a layer of torch keeps for an activation: its constructor knows fewer names.

    Raises:
        ValueError: a name that no operator knows, or that of a gated activation.
        TypeError: as :func:`fused_activation`.
    """
    fused_activation(activation)
    if not isinstance(activation, str):
        return activation
    if activation in GATED:
        raise ValueError(
            f"activation: expected one of {', '.join(map(repr, _PLAIN))}; got {activation!r}, which has a gate, and "
            "linear1 has no rows for one"
        )
    return _PLAIN[activation]


def hidden_rows(activation: Activation, dim_feedforward: int) -> int:
    """Rows of the FFN's first matrix: a gated activation has the gate's rows too."""
    return 2 * dim_feedforward if isinstance(activation, str) and activation in GATED else dim_feedforward
