"""What consecutive substeps of a node hand to each other beside y and its gradient, so that no row is read twice.

A border is open where both substeps run on the same backend, both their modules hand something over (``Ahead`` and
``Behind``, see :mod:`macaron_ops.ops.dispatch`), and neither has another beside it that reads the same input. What is
asked for at an open border is the neighbour's to say, and what is given need not be all of it.
"""

from collections.abc import Sequence

from torch import Tensor

from .dispatch import MODULES
from .registry import HANDS, definition

__all__ = ["ahead", "behind", "given", "open_borders"]


def open_borders(steps: Sequence) -> tuple[bool, ...]:
    """Of the steps of :mod:`macaron_ops.ops.run`: whether there is an open border before each, and after the last."""
    hands = [HANDS[step.backend, step.operator] != (0, 0) for step in steps]
    alone = [
        not (step.joins or after) for step, after in zip(steps, [s.joins for s in steps[1:]] + [False], strict=True)
    ]
    opened = [
        hands[i - 1] and hands[i] and alone[i - 1] and alone[i] and steps[i - 1].backend == steps[i].backend
        for i in range(1, len(steps))
    ]
    return (False, *opened, False)


def ahead(steps: Sequence, i: int, hands: bool, x: Tensor, inputs: Sequence, normalized: Tensor | None) -> tuple:
    """The last arguments of step ``i``'s forward operator: what it was given, and what the next one, if it ``hands`` to
    it, asks for."""
    asked = ()
    if hands:
        module, tensors = _of(steps[i + 1], inputs)
        asked = module.begins(x, tensors, steps[i + 1].options)
    return MODULES[steps[i].backend, steps[i].operator].Ahead(normalized, *asked)


def behind(
    steps: Sequence, i: int, needs: Sequence[bool] | None, x: Tensor, inputs: Sequence, dropped: Tensor | None
) -> tuple:
    """The last arguments of step ``i``'s backward operator: what it was given, and what the step before, if it hands to
    one, whose gradients ``needs`` says, asks for."""
    asked = ()
    if needs is not None:
        module, tensors = _of(steps[i - 1], inputs)
        asked = module.ends(x, needs, tensors, steps[i - 1].options)
    return MODULES[steps[i].backend, steps[i].operator].Behind(dropped, *asked)


def given(tensor: Tensor) -> Tensor | None:
    """What an operator handed over, which is empty where it did not."""
    return tensor if tensor.numel() > 0 else None


def _of(step, inputs: Sequence):
    """A step's module and tensors."""
    return MODULES[step.backend, step.operator], definition(step.operator).Tensors._make(step.gather(inputs))
