"""The largest singular values of a Jacobian from its products with vectors: nothing of its size is ever stored.

Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation (Golub, Kahan 1965, SIAM J. Numer. Anal. 2:205):
after p products with J and p with its transpose, ``J V = U B`` with B bidiagonal, whose largest singular values are
those of J up to a residual that is known. Memory: 2 p vectors like x.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from macaron_ops.ops.checks import positive_int

__all__ = ["Spectrum", "jacobian_spectrum"]


class Spectrum(NamedTuple):
    """``values (B, count)``, falling; ``residuals (B, count)``: a singular value of J is no farther from each."""

    values: Tensor
    residuals: Tensor


@torch.no_grad()  # of the products themselves: the vectors would keep every layer's activations
def jacobian_spectrum(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    count: int = 8,
    *,
    steps: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """The largest singular values of ``d function(x)[b] / d x[b]``, for each element b of a batch.

    Args:
        function: from ``(B, ...)`` to ``(B, ...)``, its elements independent of one another, and differentiable by
            ``torch.func`` in both modes.
        x: where. count: how many.
        steps: products with J, and as many with its transpose; None: ``3 count + 10``, at most the elements of x[b].
        mask: True where an element of x counts and of the output: the rows and columns of J that are kept.
        generator: draws the first vector.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected a floating tensor (B, ...) with elements; got {getattr(x, 'shape', x)}")
    size = x[0].numel()
    if positive_int("count", count) > size:
        raise ValueError(f"count: expected at most the {size} elements of x[b]; got {count}")
    steps = min(3 * count + 10 if steps is None else positive_int("steps", steps), size)
    if steps < count:
        raise ValueError(f"steps: expected at least count = {count}; got {steps}")
    keep = torch.ones_like(x) if mask is None else mask.to(x).expand_as(x)
    y, pull = torch.func.vjp(function, x)
    if y.shape != x.shape:
        raise ValueError(f"function: expected an output of shape {tuple(x.shape)}, as x; got {tuple(y.shape)}")

    def along(v: Tensor) -> Tensor:
        return torch.func.jvp(function, (x,), (v * keep,))[1] * keep

    def back(u: Tensor) -> Tensor:
        return pull(u * keep)[0] * keep

    draw = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x)
    v, _ = _unit(draw * keep)
    u, diagonal = _unit(along(v))
    vs, us, diagonals, offs = [v], [u], [diagonal], []
    for step in range(steps):
        v, off = _unit(_across(back(us[-1]), vs))
        offs.append(off)
        if step + 1 < steps:
            vs.append(v)
            u, diagonal = _unit(_across(along(v), us))
            us.append(u)
            diagonals.append(diagonal)
    b = torch.diag_embed(torch.stack(diagonals, -1))
    if len(offs) > 1:
        b = b + torch.diag_embed(torch.stack(offs[:-1], -1), offset=1)
    left, values, _ = torch.linalg.svd(b)
    residuals = offs[-1].unsqueeze(-1) * left[:, -1].abs()
    return Spectrum(values[:, :count], residuals[:, :count])


def _across(v: Tensor, basis: list[Tensor]) -> Tensor:
    """``v`` without its components along the basis, taken away twice, for rounding leaves some the first time."""
    spanned = torch.stack(basis, 1).flatten(2)
    for _ in range(2):
        v = v - ((spanned @ v.flatten(1).unsqueeze(-1)).mT @ spanned).view_as(v)
    return v


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """``v[b]`` over its length, and the length ``(B,)`` in float64; 0 stays 0: the space is exhausted."""
    length = v.flatten(1).double().norm(dim=-1)
    scale = torch.where(length > 0, 1 / length, 0.0).to(v)
    return v * scale.view(-1, *[1] * (v.dim() - 1)), length
