"""``normalize_step``: a step on the unit sphere as people call it."""

from torch import Tensor

from macaron_ops.reference.normalize_step import DIRECTIONS, Options, Tensors

from .checks import Operands, choice, number
from .run import Bound, operator

__all__ = ["normalize_step"]


@operator
def normalize_step(
    x: Tensor, u: Tensor, step: float | Tensor, *, direction: str = "tangent", eps: float = 1e-12
) -> Tensor:
    """A step on the unit sphere, ``y = S(x + step v)`` with ``S(z) = z / max(|z|, eps)``::

        v = u - <u, x> x    direction="tangent"       u projected on the tangent space at x
        v = S(u) - x        direction="difference"    nGPT's update (Loshchilov et al. 2024, arXiv 2410.01131)
        v = u               direction="ambient"

    Args:
        x: ``(..., D)``, any floating dtype; rows of unit length are meant, and not checked.
        u: shape, dtype and device of x.
        step: a number, or a tensor of shape ``()`` or ``(D,)`` (one step per channel), in the dtype of x or float32.
        direction: see above.
        eps: the least length that is divided by.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run the call.
    """
    t = Operands(x, min_dim=1)
    u = t.tensor("u", u, *t.x.shape)
    choice("direction", direction, DIRECTIONS)
    step, step_tensor = t.number_or_tensor("step", step, per_channel=True)
    options = Options(step, direction, number("eps", eps, minimum=0.0))
    return Bound("normalize_step", t.x, Tensors(u, step_tensor), options, "fast", derived=t.derived)
