"""Problems whose order a scheme has to show: two nonlinear fields that do not commute.

A table can pass with commuting or linear fields and still be wrong. ``flat`` and ``sphere`` have exact flows, ``flat``
for complex schemes too; ``layer`` and ``spherical_layer`` are a small Transformer layer's fields, without.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .retraction import tangent, to_sphere
from .substeps import Operator

__all__ = ["PROBLEMS", "Problem"]


class Problem(NamedTuple):
    """Fields, where the particles start, and what brings them back to their manifold."""

    operators: dict[str, Operator]
    x0: Tensor
    retraction: str | None = None


def flat(complex_: bool = False, seed: int = 0) -> Problem:
    """Particles in space: A turns them into one another at a rate that their sizes set, B pushes each along tanh.

    ``A(X) = w(X) J X`` with J a quarter turn in a plane between particles, ``w = 1 + <X, X> / 4`` which it leaves as
    it is; ``B(x) = Q^T tanh(Q x)`` with Q orthogonal, its flow ``Q^T asinh(e^s sinh(Q x))``.
    """
    draw = _draws(seed, torch.complex128 if complex_ else torch.float64)
    plane, q, x0 = torch.linalg.qr(draw(4, 2))[0], torch.linalg.qr(draw(3, 3))[0], 0.4 * draw(4, 3)

    def quarter(x: Tensor) -> Tensor:
        return plane[:, :1] @ (plane[:, 1:].mT @ x) - plane[:, 1:] @ (plane[:, :1].mT @ x)

    def rate(x: Tensor) -> Tensor:
        return 1 + 0.25 * (x * x).sum((-2, -1), keepdim=True)

    return Problem(
        {
            "A": Operator(lambda x: rate(x) * quarter(x), lambda x, s: _turn(x, quarter, s * rate(x))),
            "B": Operator(
                lambda x: torch.tanh(x @ q.mT) @ q,
                lambda x, s: torch.asinh(torch.as_tensor(s, dtype=x.dtype).exp() * torch.sinh(x @ q.mT)) @ q,
            ),
        },
        x0,
    )


def sphere(seed: int = 0) -> Problem:
    """Particles on the unit sphere: A turns all about one axis at a rate that their products set, B draws each to a
    point of its own.

    ``A(x_i) = w(G) k x x_i`` with a unit axis k, ``w = 1 + (mean of the products G)^2``, which it leaves as it is;
    ``B(x_i) = P_{x_i} v_i``, whose flow moves along the great circle through ``v_i``.
    """
    draw = _draws(seed, torch.float64)
    axis, v, x0 = to_sphere(draw(3)), draw(4, 3), to_sphere(draw(4, 3))
    speed, target = v.norm(dim=-1, keepdim=True), to_sphere(v)

    def quarter(x: Tensor) -> Tensor:
        return torch.linalg.cross(axis.expand_as(x), x)

    def rate(x: Tensor) -> Tensor:
        return 1 + (x @ x.mT).mean((-2, -1), keepdim=True).square()

    def draw_near(x: Tensor, s: float) -> Tensor:
        along, gained = (x * target).sum(-1, keepdim=True), torch.tanh(s * speed)  # tanh of rapidities, which add
        aside = (x - along * target) / torch.cosh(s * speed)
        return ((along + gained) * target + aside) / (1 + along * gained)

    return Problem(
        {
            "A": Operator(lambda x: rate(x) * quarter(x), lambda x, s: _turn(x, quarter, s * rate(x))),
            "B": Operator(tangent(lambda x: v), draw_near),
        },
        x0,
        "sphere",
    )


def _turn(x: Tensor, quarter: Callable[[Tensor], Tensor], angle: Tensor) -> Tensor:
    """``exp(angle J) x`` for a J with J^3 = -J."""
    turned = quarter(x)
    return x + torch.sin(angle) * turned + (1 - torch.cos(angle)) * quarter(turned)


def layer(seed: int = 0) -> Problem:
    """A small Transformer layer's own fields, attention and a two-layer perceptron with tanh, in space."""
    attention, perceptron, x0 = _layer(seed)
    return Problem({"A": Operator(attention), "B": Operator(perceptron)}, x0)


def spherical_layer(seed: int = 0) -> Problem:
    """The same fields, projected on the tangent spaces of the unit sphere."""
    attention, perceptron, x0 = _layer(seed)
    return Problem({"A": Operator(tangent(attention)), "B": Operator(tangent(perceptron))}, to_sphere(x0), "sphere")


def _layer(seed: int) -> tuple[Callable, Callable, Tensor]:
    draw = _draws(seed, torch.float64)
    query, key, value, w_in, w_out = draw(4, 4), draw(4, 4), draw(4, 4), draw(8, 4), draw(4, 8)

    def attention(x: Tensor) -> Tensor:
        weights = torch.softmax((x @ query.mT) @ (x @ key.mT).mT / 2, dim=-1)
        return weights @ (x @ value.mT) / 2

    return attention, lambda x: torch.tanh(x @ w_in.mT) @ w_out.mT / 3, draw(8, 4)


def _draws(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal numbers, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


PROBLEMS = {"flat": flat, "sphere": sphere, "layer": layer, "layer on the sphere": spherical_layer}
