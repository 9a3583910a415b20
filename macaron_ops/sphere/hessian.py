"""The Riemannian gradient and Hessian of a field's energy on the product of n spheres.

With the gradient u and the Hessian H of ``n E`` in space they are ``P u`` and ``B^T (H - diag <x_i, u_i>) B``, B a
basis of the tangent spaces (Absil, Mahony, Sepulchre 2008, Optimization Algorithms on Matrix Manifolds, ch. 5). By
``n E`` the gradient of unnormalised attention and perceptrons is their velocity. Of these H is written down below,
which is a hundred times faster than derivatives by ``torch.func``, that serve any other field.
"""

import torch
from torch import Tensor

from .fields import Field, Perceptron, SelfAttention
from .measures import on_sphere
from .parts import parts

__all__ = ["gradient", "gradient_scale", "hessian"]

_TANGENTS = 64  # columns of the Hessian that are formed together


def hessian(field: Field, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Riemannian gradient and Hessian of ``n E`` at a cloud, in float64.

    Args:
        field: with an energy. x: ``(n, d)``, rows of unit length.

    Returns:
        The gradient ``(n, d)``; the Hessian ``(n (d - 1), n (d - 1))`` in coordinates of the tangent spaces; their
        basis ``(n, d, d - 1)``.

    Raises:
        ValueError, TypeError: x does not fit, or the field has no energy.
    """
    x = on_sphere("x", x, dim=2).detach().double()
    field.energy(x)  # says why there is none
    known = all(isinstance(part, (SelfAttention, Perceptron)) for _, part in parts(field))
    u, matrix = (_written_down if known else _derived)(field, x)
    basis = torch.linalg.qr(x.unsqueeze(-1), mode="complete").Q[..., 1:]
    outward = (u * x).sum(-1)
    matrix = torch.einsum("ida,idke,keb->iakb", basis, matrix, basis).reshape(2 * [basis[:, 0].numel()])
    matrix = matrix - outward.repeat_interleave(x.shape[1] - 1).diag()
    return u - outward.unsqueeze(-1) * x, (matrix + matrix.T) / 2, basis


@torch.no_grad()
def _written_down(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """``u (n, d)`` and ``H (n, d, n, d)`` in space, of attention and perceptrons."""
    n, d = x.shape
    u, matrix, own = torch.zeros_like(x), x.new_zeros(n, d, n, d), x.new_zeros(n, d, d)
    for factor, part in parts(field):
        if isinstance(part, Perceptron):
            a, weight, inner = part.a.to(x), factor * part.weight.to(x), part._inner(x)
            value, slope = torch.func.jvp(part.activation.function, (inner,), (torch.ones_like(inner),))
            u += (weight * value) @ a
            own += torch.einsum("ik,kd,ke->ide", weight * slope, a, a)
            continue
        one = torch.eye(d, dtype=x.dtype, device=x.device)
        m = one.expand(part.heads, d, d) if part.V is None else part.V.to(x).reshape(part.heads, d, d)
        query, key, value = (y.reshape(part.heads, n, -1) for y in part._projected(x))
        beta = float(part.beta)
        weights = factor / n * torch.exp(beta * query @ key.mT)
        u += (weights @ value).sum(0)
        matrix += torch.einsum("hik,hde->idke", weights, m)
        matrix += beta * torch.einsum("hik,hkd,hie->idke", weights, value, value)
        own += beta * torch.einsum("hij,hjd,hje->ide", weights, value, value)
    at = torch.arange(n, device=x.device)
    matrix[at, :, at] += own
    return u, matrix


def _derived(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any energy."""

    def energy(flat: Tensor) -> Tensor:
        return len(x) * field.energy(flat.view_as(x))

    slope, flat = torch.func.grad(energy), x.flatten()
    columns = torch.vmap(lambda v: torch.func.jvp(slope, (flat,), (v,))[1], chunk_size=_TANGENTS)
    matrix = columns(torch.eye(len(flat), dtype=x.dtype, device=x.device))
    return slope(flat).detach().view_as(x), matrix.detach().reshape(*x.shape, *x.shape)


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
