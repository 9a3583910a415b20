"""The fields that move particles on the unit sphere, and their energies on one scale.

    dx_i/dt = P_{x_i} u_i(x),    P_x y = y - <x, y> x

    SelfAttention   u_i = sum_h sum_j w^h_ij V_h x_j,    w^h_ij ~ exp(beta <Q_h x_i, K_h x_j>)
                    E = sum_h (1 / (2 beta n^2)) sum_ij exp(beta <Q_h x_i, K_h x_j>)    where Q^T K = V is symmetric
    Perceptron      u_i = sum_j w_j act(a_j . x_i + b_j) a_j = (1/2) grad v(x_i)
                    E = (1 / (2 n)) sum_i v(x_i),    v(x) = sum_j w_j phi(a_j . x + b_j),  phi' = 2 act

Along a field with an energy (unnormalised attention, perceptrons, sums and multiples of them) ``dE/dt`` is the mean of
``|dx_i/dt|^2``. Softmax attention of one head ascends the same E in another metric: ``dE/dt = n^-2 sum_i Z_i
|dx_i/dt|^2`` with its row sums Z_i. Sources: Geshkovski, Letrouit, Polyanskiy, Rigollet 2023, arXiv 2312.10794;
Alvarez-Lopez, Geshkovski, Ruiz-Balet 2026, arXiv 2601.21366.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from macaron_ops.ops import normalize_step, sphere_attend_step
from macaron_ops.ops.checks import choice, number, positive_int
from macaron_ops.reference.sphere_attend_step import WEIGHTINGS
from macaron_ops.splitting import tangent

from .checks import finite, matrix, particles
from .primitives import ACTIVATIONS, Activation

__all__ = ["DIRECTIONS", "Field", "Perceptron", "Scaled", "SelfAttention", "Sum"]

DIRECTIONS = ("tangent", "ambient")


class Field(ABC):
    """A field on particles ``(..., n, d)``; leading dimensions are a batch. Any floating dtype, any device,
    differentiable; parameters follow the dtype and the device of x.

    ``a + b`` is both at once, ``2.0 * a`` and ``-a`` are multiples. Rows of unit length are meant, and not checked.

    Attributes:
        interacts: a particle's vector depends on the others. What does not is B to a splitting scheme, the rest A.
    """

    interacts = True

    @abstractmethod
    def vectors(self, x: Tensor) -> Tensor:
        """``u``, shape of x, before it is projected on the tangent spaces."""

    def energy(self, x: Tensor) -> Tensor:
        """``E (...)``, that of each batch element.

        Raises:
            ValueError: the field has none; the message says why.
        """
        raise ValueError(f"energy: {type(self).__name__} has none")

    def step(self, x: Tensor, h: float | Tensor, direction: str = "tangent") -> Tensor:
        """The normalised Euler step ``S(x + h v)``, with ``v = P_x u`` (``"tangent"``) or ``v = u`` (``"ambient"``)."""
        choice("direction", direction, DIRECTIONS)
        return normalize_step(x, self.vectors(x), h, direction=direction)

    def __call__(self, x: Tensor) -> Tensor:
        """The velocity ``P_x u``, shape of x. Away from the unit sphere P projects on the tangent space of the sphere
        through x, so that Runge-Kutta methods keep their order."""
        return tangent(self.vectors)(x)

    def __add__(self, other: "Field") -> "Sum":
        if not isinstance(other, Field):
            return NotImplemented
        return Sum(self, other)

    def __mul__(self, factor: float) -> "Scaled":
        if isinstance(factor, Field):
            return NotImplemented
        return Scaled(factor, self)

    __rmul__ = __mul__

    def __neg__(self) -> "Scaled":
        return Scaled(-1.0, self)

    def __sub__(self, other: "Field") -> "Sum":
        return self + -other


class Sum(Field):
    """``sum_i fields[i]``; sums among them are opened."""

    def __init__(self, *fields: Field):
        self.fields: tuple[Field, ...] = tuple(
            part for field in fields for part in (field.fields if isinstance(field, Sum) else (field,))
        )
        if not self.fields or not all(isinstance(field, Field) for field in self.fields):
            raise TypeError(f"fields: expected fields to add; got {fields!r}")

    @property
    def interacts(self) -> bool:
        return any(field.interacts for field in self.fields)

    def vectors(self, x: Tensor) -> Tensor:
        return sum(field.vectors(x) for field in self.fields)

    def energy(self, x: Tensor) -> Tensor:
        return sum(field.energy(x) for field in self.fields)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.fields))


class Scaled(Field):
    """``factor * field``; its energy is that many times the field's. Descent is the factor -1."""

    def __init__(self, factor: float, field: Field):
        if not isinstance(field, Field):
            raise TypeError(f"field: expected a field to multiply; got {field!r}")
        if isinstance(field, Scaled):
            factor, field = factor * field.factor, field.field
        self.factor, self.field = number("factor", factor), field

    @property
    def interacts(self) -> bool:
        return self.field.interacts

    def vectors(self, x: Tensor) -> Tensor:
        return self.factor * self.field.vectors(x)

    def energy(self, x: Tensor) -> Tensor:
        return self.factor * self.field.energy(x)

    def step(self, x: Tensor, h: float | Tensor, direction: str = "tangent") -> Tensor:
        return self.field.step(x, self.factor * h, direction)

    def __repr__(self) -> str:
        return f"{self.factor:g} * ({self.field!r})"


class SelfAttention(Field):
    """Attention among the particles, on the operator ``sphere_attend_step``: no n x n matrix in memory.

    Args:
        beta: inverse temperature, a finite number or a tensor of shape ``()``.
        Q, K: ``(e, d)``, with several heads ``(heads, e, d)``; V: ``(d, d)`` or ``(heads, d, d)``. None is the
            identity.
        heads: how many; their vectors are added.
        weighting: ``"softmax"`` (rows of weights sum to 1) or ``"unnormalized"`` (``exp(beta <., .>) / n``, which
            overflows float32 past beta = 88).
        causal: particle i sees the particles j <= i. There is no energy then.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        beta: float | Tensor,
        Q: Tensor | None = None,
        K: Tensor | None = None,
        V: Tensor | None = None,
        heads: int = 1,
        weighting: str = "softmax",
        causal: bool = False,
    ):
        choice("weighting", weighting, WEIGHTINGS)
        if not isinstance(causal, bool):
            raise TypeError(f"causal: expected a bool; got {causal!r}")
        self.beta, self.heads = finite("beta", beta), positive_int("heads", heads)
        self.weighting, self.causal = weighting, causal
        lead = () if heads == 1 else (heads,)
        given = {"Q": Q, "K": K, "V": V}
        shapes = {"Q": (*lead, "e", "d"), "K": (*lead, "e", "d"), "V": (*lead, "d", "d")}
        for name, value in given.items():
            if value is not None:
                matrix(name, value, *shapes[name])
        widths = {name: value.shape[-1] for name, value in given.items() if value is not None}
        if len(set(widths.values())) > 1:
            raise ValueError(f"Q, K, V: expected one number of coordinates d; got {widths}")
        self.width: int | None = next(iter(widths.values()), None)
        rows = [self.width if value is None else value.shape[-2] for value in (Q, K)]
        if rows[0] != rows[1]:
            raise ValueError(f"Q, K: expected one number of rows e, which is d where one is None; got {rows}")
        self.Q, self.K, self.V = Q, K, V

    def vectors(self, x: Tensor) -> Tensor:
        """``u``. Scores of all heads are met by ONE call of the operator.

        The operator moves and normalises. Given the homogeneous point ``(0, 1)`` and values ``(V x_j, 0)``, it returns
        ``(h u, 1) / |(h u, 1)|``, and the quotient is u, to rounding and whatever its length.
        """
        query, key, value = self._projected(x)
        sums = self._weighted_mean(query, key, value, self.weighting)
        return sums if self.heads == 1 else sums.sum(-3)

    def step(self, x: Tensor, h: float | Tensor, direction: str = "tangent") -> Tensor:
        choice("direction", direction, DIRECTIONS)
        if self.heads > 1:
            return super().step(x, h, direction)
        q, k, v = (None if m is None else _apply(m, particles(x, self.width)) for m in (self.Q, self.K, self.V))
        options = {"weighting": self.weighting, "causal": self.causal, "direction": direction}
        return sphere_attend_step(particles(x), h, self._beta(x), query=q, key=k, value=v, **options)

    def partition(self, x: Tensor) -> Tensor:
        """The row sums ``Z_i = sum_j exp(beta <Q x_i, K x_j>)``: ``(..., n)``, or ``(..., heads, n)`` of several."""
        query, key, _ = self._projected(x)
        ones = query.new_ones(*query.shape[:-1], 1)
        return query.shape[-2] * self._weighted_mean(query, key, ones, "unnormalized").squeeze(-1)

    def energy(self, x: Tensor) -> Tensor:
        """``sum_h (1 / (2 beta n^2)) sum_ij exp(beta <Q_h x_i, K_h x_j>)``, for both weightings, in linear memory."""
        self._require_energy()
        of_heads = self.partition(x).mean(-1) / x.shape[-2]
        return (of_heads if self.heads == 1 else of_heads.sum(-1)) / (2.0 * self._beta(x))

    def __repr__(self) -> str:
        given = [name for name in ("Q", "K", "V") if getattr(self, name) is not None]
        more = "".join(f", {name}" for name in given) + (f", heads={self.heads}" if self.heads > 1 else "")
        causal = ", causal=True" if self.causal else ""
        beta = self.beta.item() if isinstance(self.beta, Tensor) else self.beta
        return f"SelfAttention(beta={beta:g}{more}, weighting={self.weighting!r}{causal})"

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``Q x``, ``K x``, ``V x``, each ``(..., n, .)`` or ``(..., heads, n, .)``."""
        x = particles(x, self.width)
        if self.heads > 1:
            x = x.unsqueeze(-3).expand(*x.shape[:-2], self.heads, *x.shape[-2:])
        query, key, value = (x if m is None else _apply(m, x) for m in (self.Q, self.K, self.V))
        return query, key, value

    def _weighted_mean(self, query: Tensor, key: Tensor, value: Tensor, weighting: str) -> Tensor:
        """``sum_j w_ij value_j`` through the operator; see :meth:`vectors`."""
        beta = self._beta(query)
        # exp(beta ...) is kept near 1 by the step: its square, in the length, would else leave the dtype's range.
        h = 1.0 if weighting == "softmax" else self._least_weight(beta, query, key)
        origin = F.pad(torch.zeros_like(value), (0, 1), value=1.0)
        moved = sphere_attend_step(
            origin,
            h,
            beta,
            query=query,
            key=key,
            value=F.pad(value, (0, 1)),
            weighting=weighting,
            direction="ambient",
            causal=self.causal,
        )
        return moved[..., :-1] / (h * moved[..., -1:])

    def _least_weight(self, beta: float | Tensor, query: Tensor, key: Tensor) -> float | Tensor:
        """``exp(-|beta| max |<q, k>|)`` or less, a constant to differentiation."""
        if self.Q is None and self.K is None and not isinstance(beta, Tensor):
            return math.exp(-abs(beta))  # unit points
        reach = torch.linalg.vector_norm(query.detach(), dim=-1).amax() if query.numel() else query.new_ones(())
        reach = reach * torch.linalg.vector_norm(key.detach(), dim=-1).amax()
        return torch.exp(-reach * (beta.detach().abs() if isinstance(beta, Tensor) else abs(beta)))

    def _beta(self, x: Tensor) -> float | Tensor:
        return self.beta.to(x) if isinstance(self.beta, Tensor) else self.beta

    def _require_energy(self) -> None:
        """Q^T K = V symmetric, to the rounding of that product; not causal; beta not 0."""
        if self.causal:
            raise ValueError(
                "energy: SelfAttention with causal=True has none: particles do not see those that see them"
            )
        if self.beta == 0.0:
            raise ValueError("energy: SelfAttention with beta=0 has none: 1 / (2 beta) is not finite")
        if self.width is None:
            return
        like = next(m for m in (self.Q, self.K, self.V) if m is not None).detach()
        one = torch.eye(self.width, dtype=like.dtype, device=like.device)
        q, k, v = (one if m is None else m.detach() for m in (self.Q, self.K, self.V))
        product = q.mT @ k
        bound = 16 * q.shape[-2] * torch.finfo(like.dtype).eps * (q.norm() * k.norm() + v.norm())
        if (product - product.mT).abs().max() > bound or (product - v).abs().max() > bound:
            raise ValueError(
                "energy: SelfAttention has none unless Q^T K = V is symmetric, for each head; got matrices with "
                f"|Q^T K - V| up to {(product - v).abs().max():.3g} and |Q^T K - K^T Q| up to "
                f"{(product - product.mT).abs().max():.3g}"
            )


class Perceptron(Field):
    """A layer of k neurons that acts on each particle alone, ``u = sum_j w_j act(a_j . x + b_j) a_j``.

    The weight of neuron j is a number along its own direction a_j: with any other output the field is no gradient.

    Args:
        a: ``(k, d)``; b, weight: ``(k,)``.
        activation: ``"relu"``, ``"gelu"``, ``"tanh"``, ``"identity"``, ``"gelu_tanh"`` (no energy), or an
            :class:`Activation`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    interacts = False

    def __init__(self, a: Tensor, b: Tensor, weight: Tensor, activation: str | Activation = "relu"):
        self.a = matrix("a", a, "k", "d")
        self.b, self.weight = matrix("b", b, a.shape[0]), matrix("weight", weight, a.shape[0])
        if not isinstance(activation, Activation):
            choice("activation", activation, tuple(ACTIVATIONS))
            activation = ACTIVATIONS[activation]
        self.activation = activation

    def vectors(self, x: Tensor) -> Tensor:
        a = self.a.to(x)
        return (self.weight.to(x) * self.activation.function(self._inner(x))) @ a

    def potential(self, x: Tensor) -> Tensor:
        """``v(x) (..., n)``, the sum over neurons of ``w_j phi(a_j . x + b_j)``. The vectors are half its gradient.

        Raises:
            ValueError: the activation has no primitive in closed form.
        """
        if self.activation.primitive is None:
            raise ValueError(
                f"energy: Perceptron with activation {self.activation.name!r} has none: expected one with a primitive "
                f"in closed form, {', '.join(name for name, a in ACTIVATIONS.items() if a.primitive)}"
            )
        return (self.weight.to(x) * self.activation.primitive(self._inner(x))).sum(-1)

    def energy(self, x: Tensor) -> Tensor:
        """``(1 / (2 n)) sum_i v(x_i)``."""
        return 0.5 * self.potential(x).mean(-1)

    def __repr__(self) -> str:
        return f"Perceptron({self.a.shape[0]} neurons, {self.activation.name})"

    def _inner(self, x: Tensor) -> Tensor:
        return particles(x, self.a.shape[-1]) @ self.a.to(x).mT + self.b.to(x)


def _apply(m: Tensor, x: Tensor) -> Tensor:
    """``m x_i`` for each row of x."""
    return x @ m.to(x).mT
