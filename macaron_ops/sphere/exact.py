"""What theory gives in closed form or as one ordinary differential equation, for comparison.

From an orthonormal start (n <= d particles with all products 0) all products of two particles stay equal, and their
common value gamma obeys (Geshkovski et al. 2023, arXiv 2312.10794, Theorem 6.9 and its proof)

    softmax         dgamma/dt = 2 e^(beta gamma) (1 - gamma) ((n - 1) gamma + 1) / (e^beta + (n - 1) e^(beta gamma))
    unnormalised    dgamma/dt = (2 / n) e^(beta gamma) (1 - gamma) ((n - 1) gamma + 1)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from macaron_ops.ops.checks import choice, number, positive_int
from macaron_ops.reference.sphere_attend_step import WEIGHTINGS

from .normalization import Normalization

__all__ = ["orthonormal_product", "single_cluster_bound", "speed_at_orthonormal", "time_to_product"]


def _rate(gamma: float, n: int, beta: float, weighting: str) -> float:
    """dgamma/dt."""
    pull = 2.0 * (1.0 - gamma) * ((n - 1) * gamma + 1.0)
    if weighting == "softmax":
        return pull / (math.exp(beta * (1.0 - gamma)) + n - 1)
    return pull * math.exp(beta * gamma) / n


def _checked(n: int, beta: float, weighting: str) -> tuple[int, float]:
    choice("weighting", weighting, WEIGHTINGS)
    return positive_int("n", n), number("beta", beta)


def orthonormal_product(times: Sequence[float] | Tensor, n: int, beta: float, weighting: str = "softmax") -> Tensor:
    """gamma at ``times`` (rising, from 0 on), float64, to 1e-12 (scipy's DOP853).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    from scipy.integrate import solve_ivp

    n, beta = _checked(n, beta, weighting)
    times = torch.as_tensor(times, dtype=torch.float64)
    if times.dim() != 1 or len(times) == 0 or times[0] < 0 or (times.diff() < 0).any():
        raise ValueError(f"times: expected a list of rising times, from 0 on; got {times}")
    span = (0.0, float(times[-1]))
    found = solve_ivp(
        lambda t, gamma: [_rate(gamma[0], n, beta, weighting)],
        span,
        [0.0],
        method="DOP853",
        t_eval=times.tolist(),
        rtol=1e-13,
        atol=1e-14,
    )
    return torch.from_numpy(found.y[0].copy())


def time_to_product(product: float, n: int, beta: float, weighting: str = "softmax") -> float:
    """When gamma comes to ``product``, in [0, 1): the integral of ``dt/dgamma``.

    The curve of a phase diagram: in high dimensions random points are nearly orthonormal.
    """
    from scipy.integrate import quad

    n, beta = _checked(n, beta, weighting)
    if not 0.0 <= number("product", product) < 1.0:
        raise ValueError(f"product: expected a number in [0, 1); got {product}")
    # In s = -log(1 - gamma) the integrand has no pole where gamma is near 1.
    rate = lambda s: math.exp(-s) / _rate(1.0 - math.exp(-s), n, beta, weighting)  # noqa: E731
    return quad(rate, 0.0, -math.log1p(-product), epsabs=0.0, epsrel=1e-12, limit=200)[0]


def speed_at_orthonormal(normalization: str | Normalization, n: int, beta: float) -> float:
    """``dgamma/dt`` at the time 0 of softmax attention from an orthonormal start, under a law of speed."""
    law = normalization if isinstance(normalization, Normalization) else Normalization(normalization)
    n, beta = _checked(n, beta, "softmax")
    total, length = math.exp(beta) + n - 1, math.sqrt(math.exp(2.0 * beta) + n - 1)
    post = 2.0 / total
    return {
        "post": post,
        "ln_scaling": post,
        "mix": post if law.tau > 0 else post / law.radius,
        "pre": post / law.radius,
        "peri": 2.0 / (law.radius * length),
        "ngpt": 2.0 * law.alpha / length,
    }[law.name]


def single_cluster_bound() -> float:
    """0.5742: on the circle with large beta and a perceptron that is 1-Lipschitz with act(0) = 0, the most mass that a
    cluster of diameter 1 / (2 sqrt(beta)) can hold at a strict second-order point of descent, a minimum (arXiv
    2601.21366). Uphill there is none: all particles in one point are a strict maximum.

    It is ``p / (p + c)`` with ``p = 2 e^(-3/2)``, the largest value of ``(s^2 - 1) e^(-s^2 / 2)``, and ``c = (3/8)
    e^(-1/8)``, half of what ``(1 - s^2) e^(-s^2 / 2)`` is at ``s = 1/2``.
    """
    push, pull = 2.0 * math.exp(-1.5), 0.375 * math.exp(-0.125)
    return push / (push + pull)
