"""Where a Transformer normalises, told as a law for the speed of its tokens on the sphere.

Token j is ``y_j = r_j theta_j`` with ``|theta_j| = 1``, and A_j is what the field gives at the thetas:

    dtheta_j/dt = P A_j / s_j,    dr_j/dt as below

    post         s = 1                    r constant
    pre          s = r                    dr/dt = <theta, A>
    peri         s = r |A|                dr/dt = <theta, A> / |A|
    mix          post until the time tau, then pre
    ngpt         s = |A| / alpha          r constant
    ln_scaling   s = sqrt(t + 1)          r constant

The state is y, which holds both: pre is ``dy/dt = A(y / |y|)``, a residual stream that is normalised where it is read.
Source: Karagodin, Ge, Polyanskiy, Rigollet 2025, "Normalization in attention dynamics", arXiv 2510.22026.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from macaron_ops.ops.checks import choice, number
from macaron_ops.splitting import to_sphere

from .checks import positive
from .fields import Field

__all__ = ["NORMALIZATIONS", "Normalization"]

NORMALIZATIONS = ("post", "pre", "peri", "mix", "ngpt", "ln_scaling")


@dataclass(frozen=True)
class Normalization:
    """A law of speed.

    Attributes:
        name: one of ``NORMALIZATIONS``.
        radius: r at the start; only pre, peri and mix depend on it.
        alpha: ngpt's factor. tau: when mix turns from post to pre.

    Raises:
        ValueError: an attribute does not fit.
    """

    name: str = "post"
    radius: float = 1.0
    alpha: float = 1.0
    tau: float = 1.0

    def __post_init__(self):
        choice("normalization", self.name, NORMALIZATIONS)
        positive("radius", self.radius), positive("alpha", self.alpha), number("tau", self.tau, minimum=0.0)

    @property
    def timed(self) -> bool:
        """The law changes with time."""
        return self.name in ("mix", "ln_scaling")

    @property
    def breaks(self) -> tuple[float, ...]:
        """Times that no step may straddle: the law jumps there."""
        return (self.tau,) if self.name == "mix" else ()

    def lengthens(self, t: float) -> bool:
        """Radii change at the time t."""
        return self.name in ("pre", "peri") or (self.name == "mix" and t >= self.tau)

    def start(self, theta: Tensor) -> Tensor:
        """y of unit points."""
        return theta * self.radius if self.name in ("pre", "peri", "mix") else theta

    def retract(self, t: float, y: Tensor) -> Tensor:
        """y after a step that began at the time t: back on its sphere where the radius is constant."""
        return y if self.lengthens(t) else self.start(to_sphere(y))

    def velocity(self, field: Field, t: float, y: Tensor, regime: float | None = None) -> Tensor:
        """``dy/dt``, shape of y.

        Args:
            regime: the time whose side of a jump counts: the last stage of a step that ends at tau is post.
        """
        r = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        theta = y / r
        u = field.vectors(theta)
        along = (theta * u).sum(-1, keepdim=True)
        turning = u - along * theta
        if self.name in ("peri", "ngpt"):
            length = torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
            return self.alpha * r * turning / length if self.name == "ngpt" else u / length
        if self.lengthens(t if regime is None else regime):
            return u
        return r * turning / (math.sqrt(t + 1.0) if self.name == "ln_scaling" else 1.0)
