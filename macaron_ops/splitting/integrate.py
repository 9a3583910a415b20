"""``integrate``: the particles' path under ``dx/dt = A(x) + B(x)`` by a splitting scheme."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from .catalogue import find
from .names import pick
from .retraction import RETRACTIONS
from .scheme import OPERATORS, Scheme, Splitting, Stage, merged
from .substeps import EXACT, RUNGE_KUTTA, Field, Operator, RungeKutta, bracket

__all__ = ["SUBSTEPS", "UNSPLIT", "integrate"]

UNSPLIT = "unsplit"
Retraction = Callable[[Tensor], Tensor]
Time = float | Tensor


def _by(method: RungeKutta) -> Callable[[Operator, Time, Tensor, Time], Tensor]:
    return lambda operator, t, x, s: method(operator.velocity, t, x, s)


SUBSTEPS = {name: _by(method) for name, method in RUNGE_KUTTA.items()} | {EXACT: Operator.exact}


def integrate(
    operators: Mapping[str, Field | Operator],
    x0: Tensor,
    t0: Time,
    t1: Time,
    steps: int,
    scheme: str | Scheme = "strang_BAB",
    *,
    substep: str | Mapping[str, str] = "rk4",
    retraction: str | Retraction | None = None,
    merge: bool = False,
    trajectory: bool = False,
) -> Tensor:
    """``x(t1)`` from ``x(t0) = x0`` under ``dx/dt = A(x) + B(x)``, by ``steps`` equal steps of a splitting scheme.

    Example::

        fields = {"A": lambda x: torch.softmax(x @ x.mT, -1) @ x, "B": Operator(flow=lambda x, s: math.exp(-s) * x)}
        x = integrate(fields, torch.randn(8, 3), 0.0, 1.0, 20, "strang_BAB", substep={"A": "midpoint", "B": "exact"})

    What order to expect: the scheme's, if every substep has at least that order; else the substeps'. With
    ``"euler"`` it is 1 for every scheme but ``lie_richardson2``, which reaches 2. On the sphere the retraction does
    not decide it; the fields do. Fields that are tangent (:func:`tangent` makes them so) keep the order, others give
    order 1 whatever the scheme, even with exact flows. Schemes above order 2 that are not ``is_forward`` run
    operators backwards: where one contracts, as attention does, it is then expanding.

    Args:
        operators: ``"A"`` and ``"B"``, each a function ``field(x)``, or an :class:`Operator`.
        x0: any shape, real or complex; leading dimensions are a batch if the fields take them so.
        t0, t1: start and end; backwards works. As tensors they are differentiable, as all else is.
        steps: how many.
        scheme: a name of the catalogue, or a scheme. ``"unsplit"`` advances A + B as one operator: the baseline, the
            plain Runge-Kutta method named by ``substep``.
        substep: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"exact"`` (the operator's own ``flow``), one
            for both or one for each, ``{"A": "midpoint", "B": "exact"}``.
        retraction: what is done after every substep and every sum: ``"sphere"`` (x / |x| over the last dimension), a
            function of x, or None.
        merge: neighbouring substeps of one operator are taken as one, also across steps. Exact where substeps are
            exact, else another method.
        trajectory: return all states.

    Returns:
        The last state, shape of x0; with ``trajectory`` ``(steps + 1, *x0.shape)``, x0 first.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1; got {steps!r}")
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0: expected a tensor; got {type(x0).__name__}")
    given = _operators(operators)
    retract = _retraction(retraction)
    h = (t1 - t0) / steps
    if scheme == UNSPLIT:
        step = _unsplit(given, substep, h, retract)
    else:
        scheme = scheme if isinstance(scheme, Scheme) else find(scheme)
        if not scheme.is_real and not x0.is_complex():
            raise ValueError(f"x0: expected a complex tensor for the complex scheme {scheme.name!r}; got {x0.dtype}")
        move = partial(_move, given, _advances(given, scheme, substep), h, retract)
        if merge and isinstance(scheme, Splitting):
            if trajectory:
                raise ValueError("merge: expected False with trajectory=True: merged steps have no states between them")
            return move(merged(scheme.stages * steps), t0, x0)
        step = partial(_step, move, scheme, merge, retract)
    states = [x0]
    for i in range(steps):
        states.append(step(t0 + i * h, states[-1]))
        if not trajectory:
            del states[0]
    return torch.stack(states) if trajectory else states[0]


def _step(move: Callable, scheme: Scheme, merge: bool, retract: Retraction, t: Time, x: Tensor) -> Tensor:
    if isinstance(scheme, Splitting):
        return move(scheme.stages, t, x)
    terms = [(weight, merged(stages) if merge else stages) for weight, stages in scheme.terms]
    return retract(sum(weight * move(stages, t, x) for weight, stages in terms))


def _move(
    operators: dict[str, Operator],
    advance: dict[str, Callable],
    h: Time,
    retract: Retraction,
    stages: tuple[Stage, ...],
    t: Time,
    x: Tensor,
) -> Tensor:
    """The stages one after another, each operator by its own clock."""
    clocks = dict.fromkeys(OPERATORS, t)
    for operator, coefficient, *commutator in stages:
        if commutator:
            field = _with_commutator(operators, operator, coefficient, commutator[0] * h**2)
            x = advance[operator](Operator(field), t, x, h)
        else:
            x = advance[operator](operators[operator], clocks[operator], x, coefficient * h)
        clocks[operator] = clocks[operator] + coefficient * h
        x = retract(x)
    return x


def _with_commutator(operators: dict[str, Operator], operator: str, c: float, g: Time) -> Field:
    """``c X + g [X, [Y, X]]``."""
    x_field = operators[operator].field
    (y_field,) = (other.field for name, other in operators.items() if name != operator)
    nested = bracket(x_field, bracket(y_field, x_field))
    return lambda x: c * x_field(x) + g * nested(x)


def _unsplit(operators: dict[str, Operator], substep: object, h: Time, retract: Retraction) -> Callable:
    method = pick("substep", substep, RUNGE_KUTTA)
    for name, operator in operators.items():
        _require(name, operator, "field", substep)

    def velocity(t: Time, x: Tensor) -> Tensor:
        return sum(operator.velocity(t, x) for operator in operators.values())

    return lambda t, x: retract(method(velocity, t, x, h))


def _advances(operators: dict[str, Operator], scheme: Scheme, substep: object) -> dict[str, Callable]:
    """For each operator ``(operator, t, x, s)`` to the x after s."""
    if not isinstance(substep, Mapping):
        substep = dict.fromkeys(OPERATORS, substep)
    if set(substep) != set(OPERATORS):
        raise ValueError(f"substep: expected one for 'A' and one for 'B'; got {sorted(map(str, substep))}")
    advances = {}
    for name, operator in operators.items():
        advances[name] = pick(f"substep of {name}", substep[name], SUBSTEPS)
        _require(name, operator, "flow" if substep[name] == EXACT else "field", substep[name])
    timed = any(operator.timed for operator in operators.values())
    if scheme.has_commutator and (timed or EXACT in substep.values()):
        raise ValueError(
            f"substep: expected Runge-Kutta methods and fields without time for {scheme.name!r}, one stage of "
            "which flows a commutator of the fields"
        )
    return advances


def _operators(operators: Mapping[str, Field | Operator]) -> dict[str, Operator]:
    if not isinstance(operators, Mapping) or set(operators) != set(OPERATORS):
        got = sorted(map(str, operators)) if isinstance(operators, Mapping) else type(operators).__name__
        raise ValueError(f"operators: expected a mapping of 'A' and 'B'; got {got}")
    given = {name: operators[name] for name in OPERATORS}
    for name, operator in given.items():
        if not isinstance(operator, Operator) and not callable(operator):
            raise TypeError(f"operators[{name!r}]: expected a function of x or an Operator; got {operator!r}")
    return {name: o if isinstance(o, Operator) else Operator(o) for name, o in given.items()}


def _require(name: str, operator: Operator, part: str, substep: object) -> None:
    if getattr(operator, part) is None:
        raise ValueError(f"operators[{name!r}]: expected an Operator with a {part} for the substep {substep!r}")


def _retraction(retraction: object) -> Retraction:
    if retraction is None:
        return lambda x: x
    if callable(retraction):
        return retraction
    return pick("retraction", retraction, RETRACTIONS)
