"""What the fields and the flows ask of their arguments; errors name the argument, what was expected and what came."""

import torch
from torch import Tensor

from macaron_ops.ops.checks import number

__all__ = ["finite", "matrix", "particles", "points_on_sphere", "positive"]


def finite(name: str, value: float | Tensor) -> float | Tensor:
    """A finite number, or a tensor of shape () that holds one."""
    if not isinstance(value, Tensor):
        return number(name, value)
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a number or a floating tensor of shape (); got {_kind(value)}")
    number(name, value.item())
    return value


def positive(name: str, value: float) -> float:
    """A finite number above 0."""
    value = number(name, value)
    if value <= 0.0:
        raise ValueError(f"{name}: expected a number above 0; got {value}")
    return value


def matrix(name: str, value: object, *shape: int | str) -> Tensor:
    """A floating tensor of this shape; a name stands for any size of at least 1, the same name for the same."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor; got {_kind(value)}")
    sizes: dict[str, int] = {}
    fits = value.dim() == len(shape) and all(
        have == (sizes.setdefault(want, have) if isinstance(want, str) else want) and have > 0
        for have, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, shape))}); got {tuple(value.shape)}")
    return value


def particles(x: object, width: int | None = None, name: str = "x") -> Tensor:
    """``(..., n, d)`` with at least one particle; the lengths of the rows are not looked at."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor (..., n, d); got {_kind(x)}")
    if x.dim() < 2 or x.shape[-2] < 1 or x.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape (..., n, d) with n and d of at least 1; got {tuple(x.shape)}")
    if width is not None and x.shape[-1] != width:
        raise ValueError(f"{name}: expected d = {width} coordinates, as the field has; got {tuple(x.shape)}")
    return x


def points_on_sphere(name: str, x: object) -> Tensor:
    """``particles`` of unit length, to ``64 eps`` of the dtype: what rounding leaves of a normalised row."""
    x = particles(x, name=name)
    far = (torch.linalg.vector_norm(x.detach().double(), dim=-1) - 1.0).abs().max().item()
    if not far <= 64 * torch.finfo(x.dtype).eps:  # not <=: a NaN is refused too
        raise ValueError(
            f"{name}: expected points on the unit sphere; the length of one is off by {far:.3g} "
            "(macaron_ops.splitting.to_sphere puts them there)"
        )
    return x


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return f"{value!r} ({type(value).__name__})"
