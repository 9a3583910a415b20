"""A variant is checked before it is timed: one that computes another function has no speed.

The rule, for the output and every gradient:

    max |variant - truth| <= 2 max |eager - truth| + ulp

truth is the eager layer of the same scheme in float64 on the same (rounded) parameters and inputs, eager is that layer
in the run's dtype, ulp one unit in the last place of the largest truth. No tolerance is chosen by hand.

torch.compile is not ours to hold to that (it adds up a bias gradient in another order, several times as far from
float64 as eager): a foreign variant must have half of the dtype's digits, relative to the largest truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RULE = "max |variant - float64| <= 2 max |eager - float64| + 1 ulp"
FOREIGN_RULE = "max |variant - float64| <= sqrt(eps) max |float64|"


class WrongResult(ArithmeticError):
    """The variant's result breaks the rule; the message names the tensor, its error and what was allowed."""


@dataclass(frozen=True)
class Yardstick:
    """The truth for each of the tensors a call returns, and how far eager is from it."""

    names: tuple[str, ...]
    truths: tuple[Tensor, ...]
    allowed: tuple[float, ...]
    foreign: tuple[float, ...]

    @classmethod
    def of(cls, names: Sequence[str], truths: Sequence[Tensor], eager: Sequence[Tensor]) -> Yardstick:
        allowed = tuple(2 * error(e, t) + ulp(t, e.dtype) for e, t in zip(eager, truths, strict=True))
        foreign = tuple(torch.finfo(e.dtype).eps ** 0.5 * largest(t) for e, t in zip(eager, truths, strict=True))
        return cls(tuple(names), tuple(truths), allowed, foreign)

    def check(self, found: Sequence[Tensor], *, foreign: bool = False) -> dict[str, object]:
        """The tensor that comes nearest to its tolerance, for the row's `check`. Raises WrongResult past it."""
        rule, bounds = (FOREIGN_RULE, self.foreign) if foreign else (RULE, self.allowed)
        if len(found) != len(self.truths):
            raise WrongResult(f"returned {len(found)} tensors, expected {len(self.truths)}: {', '.join(self.names)}")
        nearest = {"rule": rule, "tensor": self.names[0], "error": 0.0, "allowed": bounds[0]}
        for name, tensor, truth, allowed in zip(self.names, found, self.truths, bounds, strict=True):
            if tensor.shape != truth.shape:
                raise WrongResult(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(truth.shape)}")
            distance = error(tensor, truth)
            if not distance <= allowed:
                raise WrongResult(f"{name} is off by {distance:.2e}, allowed {allowed:.2e} ({rule})")
            if distance * nearest["allowed"] > nearest["error"] * allowed:
                nearest |= {"tensor": name, "error": distance, "allowed": allowed}
        return nearest


def error(found: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, in float64; NaN anywhere gives NaN."""
    return (found.detach().double() - truth.to(found.device)).abs().max().item() if truth.numel() else 0.0


def ulp(truth: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at the largest magnitude of `truth`."""
    scale = largest(truth)
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) if scale > 0 else torch.finfo(dtype).tiny


def largest(truth: Tensor) -> float:
    return truth.abs().max().item() if truth.numel() else 0.0
