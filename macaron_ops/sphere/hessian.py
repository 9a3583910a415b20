"""The Riemannian gradient and Hessian of a field's energy on the product of n spheres.

They are those of ``xi -> n E(S(x + B xi))`` at 0, with a basis B of the tangent spaces: S is a retraction of second
order, so that both are the Riemannian ones exactly (Absil, Mahony, Sepulchre 2008, Optimization Algorithms on Matrix
Manifolds, prop. 5.5.5). By ``n E`` the gradient of unnormalised attention and perceptrons is their velocity.
"""

import torch
from torch import Tensor

from macaron_ops.splitting import to_sphere

from .fields import Field
from .measures import on_sphere

__all__ = ["gradient", "gradient_scale", "hessian"]

_TANGENTS = 64  # columns of the Hessian that are formed together


def hessian(field: Field, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Riemannian gradient and Hessian of ``n E`` at a cloud.

    Args:
        field: with an energy. x: ``(n, d)``, rows of unit length.

    Returns:
        The gradient ``(n, d)``; the Hessian ``(n (d - 1), n (d - 1))`` in coordinates of the tangent spaces; their
        basis ``(n, d, d - 1)``.

    Raises:
        ValueError, TypeError: x does not fit, or the field has no energy.
    """
    x = on_sphere("x", x, dim=2).detach().double()
    basis = torch.linalg.qr(x.unsqueeze(-1), mode="complete").Q[..., 1:]
    zero = torch.zeros(x.shape[0] * (x.shape[1] - 1), dtype=x.dtype, device=x.device)

    def pulled_back(xi: Tensor) -> Tensor:
        moved = x + (basis @ xi.reshape(len(x), -1, 1)).squeeze(-1)
        return len(x) * field.energy(to_sphere(moved))

    slope = torch.func.grad(pulled_back)
    columns = torch.vmap(lambda v: torch.func.jvp(slope, (zero,), (v,))[1], chunk_size=_TANGENTS)
    matrix = columns(torch.eye(len(zero), dtype=x.dtype, device=x.device))
    found = (basis @ slope(zero).reshape(len(x), -1, 1)).squeeze(-1)
    return found.detach(), ((matrix + matrix.T) / 2).detach(), basis


def gradient(field: Field, x: Tensor) -> Tensor:
    """The Riemannian gradient of ``n E``, shape of x ``(..., n, d)``."""
    x = x.detach().requires_grad_()
    (u,) = torch.autograd.grad(x.shape[-2] * field.energy(x).sum(), x)
    return (u - (u * x).sum(-1, keepdim=True) * x).detach()


def gradient_scale(field: Field, x: Tensor) -> float:
    """The largest ``|n dE/dx|``, in which a gradient is small or not."""
    x = x.detach().requires_grad_()
    (u,) = torch.autograd.grad(len(x) * field.energy(x), x)
    return u.norm(dim=-1).max().item()
