"""A splitting scheme's substeps in order: each a callable of ``x``, such as a definition with its arguments bound."""

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["parallel", "split_layer"]

SubstepFunction = Callable[[Tensor], Tensor]


def split_layer(x: Tensor, substeps: Sequence[SubstepFunction]) -> Tensor:
    """``y = s_k(... s_2(s_1(x)))``.

    Example::

        half = functools.partial(ffn_step, w_in=w1, b_in=b1, w_out=w2, b_out=b2, step=0.5)
        y = split_layer(x, [half, attention, other_half])      # Strang: B/2, A, B/2
    """
    for substep in substeps:
        x = substep(x)
    return x


def parallel(*substeps: SubstepFunction) -> SubstepFunction:
    """The substep ``y = x + sum_i (s_i(x) - x)``: all read the same ``x``, their increments are added."""

    def step(x: Tensor) -> Tensor:
        return x + sum(substep(x) - x for substep in substeps)

    return step
