"""Order and precision as they are measured: errors of one problem at several numbers of steps."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .catalogue import find
from .integrate import UNSPLIT, integrate
from .problems import Problem
from .scheme import OPERATORS, Cost, Scheme
from .substeps import EXACT, RUNGE_KUTTA

__all__ = ["Convergence", "fitted_order", "observed_order", "solution", "work_precision"]

STEPS = (12, 16, 24)
_FLOOR = 500  # in units of rounding: below it an error says nothing about a scheme
_SOLUTION_STEPS = 1024  # of RK4: an error of 1e-14 where the fields are of size 1

Substep = str | Mapping[str, str]


@dataclass(frozen=True)
class Convergence:
    """What one scheme with one kind of substeps reached on a problem.

    Attributes:
        scheme, substep: their names.
        steps: numbers of steps to the end time.
        errors: the largest component of the error at the end, for each number of steps.
        costs: evaluations of A and of B on the way; an exact flow counts as one.
        seconds: wall time, the shortest of the repeats.
        floor: the error that rounding alone may cause.
    """

    scheme: str
    substep: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    costs: tuple[Cost, ...]
    seconds: tuple[float, ...]
    floor: float

    @property
    def order(self) -> float:
        """The observed order, :func:`fitted_order`."""
        return fitted_order([1 / n for n in self.steps], self.errors, self.floor)


def fitted_order(hs: Sequence[float], errors: Sequence[float], floor: float = 0.0) -> float:
    """The slope of log error against log h by least squares, over the errors above ``floor``; NaN with less than 2."""
    points = [(math.log(h), math.log(error)) for h, error in zip(hs, errors, strict=True) if error > floor]
    if len(points) < 2:
        return math.nan
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def observed_order(
    problem: Problem,
    scheme: str | Scheme,
    *,
    substep: Substep = EXACT,
    end: float = 0.5,
    steps: Sequence[int] = STEPS,
    reference: Tensor | None = None,
) -> float:
    """The order that a scheme shows on a problem: the slope of its errors at the time ``end``.

    Args:
        problem: fields (that do not commute, or every scheme looks exact), start and retraction.
        scheme, substep: as :func:`integrate`.
        steps: numbers of steps.
        reference: the solution at ``end``; None: :func:`solution`.
    """
    return work_precision(problem, [(scheme, substep)], end=end, steps=steps, reference=reference, repeats=1)[0].order


def work_precision(
    problem: Problem,
    schemes: Iterable[tuple[str | Scheme, Substep]],
    *,
    end: float = 0.5,
    steps: Sequence[int] = STEPS,
    reference: Tensor | None = None,
    merge: bool = False,
    repeats: int = 3,
) -> list[Convergence]:
    """Error against work for each pair of scheme and substep, ``"unsplit"`` among the schemes if wanted.

    Args:
        merge: as :func:`integrate`; costs are counted so.
        repeats: runs that are timed, of which the shortest is told.
        The others as :func:`observed_order`.
    """
    if reference is None:
        reference = solution(problem, end)
    scale = max(1.0, reference.abs().max().item())
    floor = _FLOOR * torch.finfo(reference.dtype).eps * scale
    found = []
    for scheme, substep in schemes:
        errors, seconds = [], []
        for n in steps:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                x = integrate(
                    problem.operators,
                    problem.x0,
                    0.0,
                    end,
                    n,
                    scheme,
                    substep=substep,
                    retraction=problem.retraction,
                    merge=merge,
                )
                times.append(time.perf_counter() - start)
            errors.append((x - reference).abs().max().item())
            seconds.append(min(times))
        costs = tuple(evaluations(scheme, substep, n, merge=merge) for n in steps)
        named = substep if isinstance(substep, str) else ", ".join(f"{o} {substep[o]}" for o in OPERATORS)
        found.append(Convergence(_name(scheme), named, tuple(steps), tuple(errors), costs, tuple(seconds), floor))
    return found


def evaluations(scheme: str | Scheme, substep: Substep, steps: int, *, merge: bool = False) -> Cost:
    """How often each field is evaluated; an exact flow counts as one."""
    methods = dict.fromkeys(OPERATORS, substep) if isinstance(substep, str) else substep
    each = {o: 1 if method == EXACT else RUNGE_KUTTA[method].evaluations for o, method in methods.items()}
    if scheme == UNSPLIT:
        return Cost(*(steps * each[o] for o in OPERATORS))
    found = scheme if isinstance(scheme, Scheme) else find(scheme)
    return Cost(*(each[o] * n for o, n in zip(OPERATORS, found.cost(steps, merge=merge), strict=True)))


def solution(problem: Problem, end: float = 0.5, steps: int = _SOLUTION_STEPS) -> Tensor:
    """The state at ``end`` by many steps of the unsplit RK4, which knows nothing of splittings."""
    return integrate(
        problem.operators, problem.x0, 0.0, end, steps, UNSPLIT, substep="rk4", retraction=problem.retraction
    )


def _name(scheme: str | Scheme) -> str:
    return scheme if isinstance(scheme, str) else scheme.name
