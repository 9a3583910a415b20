"""A step on the unit sphere: move, then return by the retraction S(z) = z / max(|z|, eps).

y = S(x + step v),    v = u - <u, x> x   direction="tangent"      projected on the tangent space at x
                      v = S(u) - x       direction="difference"   nGPT's update, Loshchilov et al. 2024,
                                                                  arXiv 2410.01131, eqs. 10-11
                      v = u              direction="ambient"
"""

from typing import NamedTuple

from torch import Tensor

from .dtypes import accumulation_dtype, upcast
from .norm import unit, unit_backward

__all__ = [
    "DIRECTIONS",
    "Options",
    "Saved",
    "Tensors",
    "backward",
    "forward",
    "move",
    "move_backward",
    "normalize_step",
    "saved_shapes",
]

DIRECTIONS = ("tangent", "difference", "ambient")


class Tensors(NamedTuple):
    """The tensor arguments after ``x``. The same tuple holds their gradients, and whether each is needed."""

    u: Tensor
    step_tensor: Tensor | None  # () or (D,); None where the step is a number


class Options(NamedTuple):
    step: float
    direction: str
    eps: float


class Saved(NamedTuple):
    """Nothing: the backward pass reads ``x`` and ``u`` again."""


def normalize_step(
    x: Tensor, u: Tensor, step: float | Tensor, *, direction: str = "tangent", eps: float = 1e-12
) -> Tensor:
    """The definition of :func:`macaron_ops.normalize_step`, in PyTorch that is differentiable twice."""
    is_tensor = isinstance(step, Tensor)
    return forward(x, Tensors(u, step if is_tensor else None), Options(0.0 if is_tensor else step, direction, eps))[0]


def forward(x: Tensor, tensors: Tensors, options: Options, save: str = "none") -> tuple[Tensor, Saved]:
    """``y`` and nothing."""
    dtype, o = x.dtype, options
    acc = accumulation_dtype(dtype)
    t = upcast(tensors, acc)
    step = o.step if t.step_tensor is None else t.step_tensor
    return move(x.to(acc), t.u, step, o.direction, o.eps).to(dtype), Saved()


def backward(
    grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors: Tensors, saved: Saved, options: Options
) -> tuple[Tensor | None, Tensors]:
    """The gradients in ``x`` and in the tensors, None where not needed."""
    need_x, need = needs[0], Tensors(*needs[1:])
    o, acc = options, accumulation_dtype(x.dtype)
    t = upcast(tensors, acc)
    step = o.step if t.step_tensor is None else t.step_tensor
    grad_x, grad_u, grad_step = move_backward(grad.to(acc), x.to(acc), t.u, step, o.direction, o.eps)
    return grad_x if need_x else None, Tensors(
        grad_u if need.u else None, grad_step.sum_to_size(t.step_tensor.shape) if need.step_tensor else None
    )


def saved_shapes(x: Tensor, tensors: Tensors, options: Options, save: str) -> Saved:
    """Nothing is saved."""
    return Saved()


def move(x: Tensor, u: Tensor, step: float | Tensor, direction: str, eps: float) -> Tensor:
    """``S(x + step v)``."""
    return unit(x + step * _velocity(x, u, direction, eps), eps)


def move_backward(
    grad: Tensor, x: Tensor, u: Tensor, step: float | Tensor, direction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`move` in ``x``, ``u`` and, not yet summed over the rows, ``step``."""
    v = _velocity(x, u, direction, eps)
    grad_z = unit_backward(grad, x + step * v, eps)
    grad_v = step * grad_z
    if direction == "tangent":
        along_x = (grad_v * x).sum(-1, keepdim=True)
        grad_x = grad_z - along_x * u - (u * x).sum(-1, keepdim=True) * grad_v
        grad_u = grad_v - along_x * x
    elif direction == "difference":
        grad_x, grad_u = grad_z - grad_v, unit_backward(grad_v, u, eps)
    else:
        grad_x, grad_u = grad_z, grad_v
    return grad_x, grad_u, grad_z * v


def _velocity(x: Tensor, u: Tensor, direction: str, eps: float) -> Tensor:
    if direction == "tangent":
        return u - (u * x).sum(-1, keepdim=True) * x
    return unit(u, eps) - x if direction == "difference" else u
