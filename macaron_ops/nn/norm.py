"""Normalisations: modules that hold the parameters, and what an operator reads from them."""

import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.ops.checks import choice, number

from .parts import require_part

__all__ = ["SphereNorm", "build_norm", "norm_arguments"]


class SphereNorm(nn.Module):
    """``x / max(|x|, eps)``, without parameters."""

    def __init__(self, eps: float = 1e-12):
        super().__init__()
        self.eps = number("eps", eps, minimum=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def build_norm(norm: str | None, d_model: int, eps: float, bias: bool, **factory) -> nn.Module:
    """The module of a normalisation: ``"layer"``, ``"rms"``, ``"sphere"`` or None (``nn.Identity``)."""
    choice("norm", norm, ("layer", "rms", "sphere", None))
    eps = number("eps", eps, minimum=0.0)
    if norm == "layer":
        return nn.LayerNorm(d_model, eps=eps, bias=bias, **factory)
    if norm == "rms":
        return nn.RMSNorm(d_model, eps=eps, **factory)
    return nn.Identity() if norm is None else SphereNorm(eps)


def norm_arguments(module: nn.Module, name: str = "norm") -> dict:
    """``norm``, ``norm_weight``, ``norm_bias``, ``eps`` of the operators, read from a module.

    Raises:
        TypeError: the operators do not know the module's normalisation.
        RuntimeError: it has hooks, which would be skipped.
        ValueError: it is not over the last dimension alone, or has no eps of its own.
    """
    require_part(name, module, nn.LayerNorm, nn.RMSNorm, SphereNorm, nn.Identity)
    if isinstance(module, nn.Identity):
        return {"norm": None}
    if isinstance(module, SphereNorm):
        return {"norm": "sphere", "eps": module.eps}
    if len(module.normalized_shape) != 1:
        raise ValueError(f"{name}: expected a norm over the last dimension; got over {module.normalized_shape}")
    if isinstance(module, nn.LayerNorm):
        return {"norm": "layer", "norm_weight": module.weight, "norm_bias": module.bias, "eps": module.eps}
    if module.eps is None:
        raise ValueError(f"{name}: expected an RMSNorm with an eps; got eps=None, which depends on the input's dtype")
    return {"norm": "rms", "norm_weight": module.weight, "eps": module.eps}
