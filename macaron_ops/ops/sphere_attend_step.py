"""``sphere_attend_step``: the normalise-attend-step of particles as people call it."""

from torch import Tensor

from macaron_ops.reference.normalize_step import DIRECTIONS
from macaron_ops.reference.sphere_attend_step import WEIGHTINGS, Options, Tensors

from .checks import Operands, choice, number
from .run import Bound, operator

__all__ = ["sphere_attend_step"]


@operator
def sphere_attend_step(
    x: Tensor,
    step: float | Tensor,
    beta: float | Tensor,
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    weighting: str = "softmax",
    direction: str = "tangent",
    causal: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """One step of n interacting particles on the unit sphere, without an n x n matrix in memory::

        u_i = sum_j w_ij v_j,    w_ij = exp(beta <q_i, k_j>) / sum_l exp(beta <q_i, k_l>)    weighting="softmax"
                                 w_ij = exp(beta <q_i, k_j>) / m                             weighting="unnormalized"
        y_i = S(x_i + step v(x_i, u_i))    as normalize_step

    Sources: Geshkovski et al. 2023, arXiv 2312.10794; Alvarez-Lopez et al. 2026, arXiv 2601.21366.

    Args:
        x: ``(..., n, D)``, any floating dtype; rows of unit length are meant, and not checked.
        step: a number, or a tensor of shape ``()`` or ``(D,)``, in the dtype of x or float32.
        beta: inverse temperature, a number or a tensor of shape ``()``, in the dtype of x or float32.
        query: ``(..., n, E)``; key: ``(..., m, E)``; value: ``(..., m, D)``; each is x unless given (then E = D or
            m = n follow from the others).
        weighting: see above. The unnormalised sum is over the m keys; ``exp`` overflows float32 past 88.
        direction, eps: as :func:`macaron_ops.normalize_step`.
        causal: particle i sees the particles j <= i.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run the call.
    """
    t = Operands(x, min_dim=2)
    *batch, n, width = t.x.shape
    query = t.tensor("query", query, *batch, n, "E", optional=True)
    channels = width if query is None else query.shape[-1]
    key = t.tensor("key", key, *batch, "m", channels, optional=True)
    if key is None and channels != width:
        raise ValueError(f"query: expected {width} channels, as x, where key is None; got {channels}")
    keys = n if key is None else key.shape[-2]
    value = t.tensor("value", value, *batch, keys, width, optional=True)
    if value is None and keys != n:
        raise ValueError(f"key: expected {n} rows, as x, where value is None; got {keys}")
    if keys == 0 and n > 0:
        raise ValueError("key: expected at least one row; got 0")
    choice("weighting", weighting, WEIGHTINGS)
    choice("direction", direction, DIRECTIONS)
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool; got {causal!r}")
    step, step_tensor = t.number_or_tensor("step", step, per_channel=True)
    beta, beta_tensor = t.number_or_tensor("beta", beta, per_channel=False)
    options = Options(step, beta, weighting, direction, causal, number("eps", eps, minimum=0.0))
    tensors = Tensors(query, key, value, step_tensor, beta_tensor)
    return Bound("sphere_attend_step", t.x, tensors, options, "fast", derived=t.derived)
