"""``split_layer``: the substeps of a splitting scheme as one autograd node."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .run import Bound, recall, run
from .signature import sign

__all__ = ["Parallel", "Substep", "parallel", "split_layer", "substep"]


class Substep(NamedTuple):
    """An operator with its arguments, waiting for x."""

    operator: Callable[..., Tensor]
    args: tuple
    kwargs: dict


class Parallel(NamedTuple):
    """Substeps that read the same x and whose increments are added."""

    substeps: tuple[Substep, ...]


def substep(operator: Callable[..., Tensor], *args, **kwargs) -> Substep:
    """An operator's call without x: ``substep(ffn_step, w_in, b_in, w_out, b_out, activation="gelu")``.

    Raises:
        TypeError: ``operator`` is not an operator of this package, or ``save`` is given (``split_layer`` takes it).
    """
    if not hasattr(operator, "bind"):
        raise TypeError(f"operator: expected an operator such as macaron_ops.ffn_step; got {operator!r}")
    if "save" in kwargs:
        raise TypeError("save: expected as argument of split_layer, which has one policy for all substeps")
    return Substep(operator, args, kwargs)


def parallel(*substeps: Substep) -> Parallel:
    """The substep ``y = x + sum_i (s_i(x) - x)``: parallel attention and FFN (GPT-J, PaLM).

    Raises:
        ValueError: fewer than two substeps, or one whose residual is not x itself (post placement, or a
            ``residual_scale`` that is not 1).
        TypeError: something else than a substep.
    """
    if len(substeps) < 2:
        raise ValueError(f"substeps: expected at least two; got {len(substeps)}")
    for i, s in enumerate(substeps):
        if not isinstance(s, Substep):
            raise TypeError(f"substeps[{i}]: expected a Substep; got {type(s).__name__}")
        if s.operator.__name__ not in ("ffn_step", "attend_step"):
            raise ValueError(f"substeps[{i}]: expected ffn_step or attend_step; got {s.operator.__name__}")
        if s.kwargs.get("residual_scale", 1.0) != 1.0:
            raise ValueError(f"substeps[{i}]: expected residual_scale 1; got {s.kwargs['residual_scale']}")
        if s.kwargs.get("placement", "pre") != "pre" and s.kwargs.get("norm", "layer") is not None:
            raise ValueError(f"substeps[{i}]: expected placement 'pre': a sum of increments has no post-norm")
    return Parallel(substeps)


def split_layer(x: Tensor, substeps: Sequence[Substep | Parallel], *, save: str = "fast") -> Tensor:
    """``y = s_k(... s_2(s_1(x)))`` as ONE autograd node.

    Example::

        y = split_layer(x, [
            substep(ffn_step, w1, b1, w2, b2, step=0.5),                # Strang: B/2
            substep(attend_step, w_qkv, b_qkv, w_out, b_out, 8),        #         A
            substep(ffn_step, w3, b3, w4, b4, step=0.5),                #         B/2
        ])

    Args:
        x: ``(..., T, D)``.
        substeps: in applied order, made by :func:`substep` and :func:`parallel`.
        save: memory policy between forward and backward. ``"lean"`` keeps each substep's input, and of attention the
            heads' output (a kernel its log-sum-exp, too); ``"fast"`` also the hidden pre-activations and the
            projections.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError, TypeError: as the operators, or ``substeps`` is empty or holds something else.
    """
    if not isinstance(substeps, (list, tuple)):
        raise TypeError(f"substeps: expected a list of substeps; got {type(substeps).__name__}")
    if len(substeps) == 0:
        raise ValueError("substeps: expected at least one; got none")
    signed = sign(split_layer, x, substeps, save)
    remembered = recall(signed)
    if remembered is not None:
        return remembered(signed.tensors)
    bound: list[Bound] = []
    for i, element in enumerate(substeps):
        if not isinstance(element, (Substep, Parallel)):
            raise TypeError(f"substeps[{i}]: expected a Substep or Parallel; got {type(element).__name__}")
        group = element.substeps if isinstance(element, Parallel) else (element,)
        for j, s in enumerate(group):
            kwargs = s.kwargs if j == 0 else {**s.kwargs, "residual_scale": 0.0}
            call = s.operator.bind(x, *s.args, **kwargs)
            bound.append(call._replace(joins=j > 0))
    return run(x, bound, save, signed)
