"""The unit sphere: back onto it after a substep, and fields that are tangent to it."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

__all__ = ["RETRACTIONS", "tangent", "to_sphere"]


def to_sphere(x: Tensor) -> Tensor:
    """``x / |x|`` over the last dimension."""
    return F.normalize(x, dim=-1)


def tangent(field: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The field's part along the sphere through x, ``f(x) - <f(x), x> x / |x|^2``, over the last dimension."""

    def projected(x: Tensor) -> Tensor:
        u = field(x)
        return u - (u * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x

    return projected


RETRACTIONS = {"sphere": to_sphere}
