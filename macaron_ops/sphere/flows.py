"""One step of the particles, by a Runge-Kutta method or a splitting scheme."""

from collections.abc import Callable, Mapping

from torch import Tensor

from macaron_ops.ops.checks import choice
from macaron_ops.splitting import CATALOGUE, RUNGE_KUTTA, Operator, Scheme, find, integrate

from .fields import DIRECTIONS, Field, Sum
from .normalization import Normalization
from .parts import parts

__all__ = ["Stepper", "attention_and_perceptrons", "stepper"]

Step = Callable[[float, Tensor, float], Tensor]  # (t, y, h) -> y after h


class Stepper:
    """``advance(t, y, h)`` and the order that an adaptive step may count on."""

    def __init__(self, advance: Step, order: int):
        self.advance, self.order = advance, order

    def doubled(self, t: float, y: Tensor, h: float) -> tuple[Tensor, float]:
        """Two steps of h / 2, and the estimate of their error: the largest difference from the one step of h, over
        ``2^order - 1``."""
        once = self.advance(t, y, h)
        twice = self.advance(t + h / 2, self.advance(t, y, h / 2), h / 2)
        return twice, (twice - once).detach().abs().max().item() / (2**self.order - 1)


def stepper(
    field: Field,
    scheme: str | Scheme,
    substep: str | Mapping[str, str],
    normalization: Normalization,
    direction: str,
) -> Stepper:
    """The step that :func:`simulate` takes; its arguments."""
    choice("direction", direction, DIRECTIONS)
    plain = normalization.name == "post"
    if direction != "tangent" and not (scheme == "euler" and plain):
        raise ValueError(f"direction: expected 'tangent' but for scheme='euler' and post; got {direction!r}")
    if scheme == "euler" and plain:
        return Stepper(lambda t, y, h: field.step(y, h, direction), 1)
    if isinstance(scheme, str) and scheme in RUNGE_KUTTA:
        method = RUNGE_KUTTA[scheme]
        return Stepper(lambda t, y, h: _unsplit(field, method, normalization, t, y, h), method.order)
    return _split(field, _scheme(scheme), substep, normalization)


def _unsplit(field: Field, method, law: Normalization, t: float, y: Tensor, h: float) -> Tensor:
    return law.retract(t, method(_velocity(field, law, t), t, y, h))


def _velocity(field: Field, law: Normalization, start: float) -> Callable[[float, Tensor], Tensor]:
    """``velocity(t, y)`` within a step that begins at ``start``."""
    if law.name == "post":
        return lambda t, y: field(y)
    return lambda t, y: law.velocity(field, t, y, regime=start)


def _scheme(scheme: str | Scheme) -> Scheme:
    if not isinstance(scheme, str):
        return scheme
    if scheme not in CATALOGUE:
        raise ValueError(
            f"scheme: expected a Runge-Kutta method ({', '.join(RUNGE_KUTTA)}) or a splitting scheme of "
            f"macaron_ops.splitting.CATALOGUE ({', '.join(CATALOGUE)}); got {scheme!r}"
        )
    return find(scheme)


def _split(field: Field, scheme: Scheme, substep: str | Mapping[str, str], law: Normalization) -> Stepper:
    sides = dict(zip("AB", attention_and_perceptrons(field), strict=True))
    for name, part in sides.items():
        if part is None:
            what = {"A": "attention (A)", "B": "a perceptron (B)"}[name]
            raise ValueError(f"scheme: {scheme.name!r} splits attention from perceptrons; {what} is missing in {field}")
    chosen = dict.fromkeys("AB", substep) if isinstance(substep, str) else dict(substep)
    for name in chosen.values():
        choice("substep", name, tuple(RUNGE_KUTTA))
    # An Euler substep on the sphere is the field's own step: one call of an operator.
    fused = {name for name, method in chosen.items() if method == "euler" and law.name == "post"}
    methods = {name: "exact" if name in fused else method for name, method in chosen.items()}

    def operator(name: str, start: float) -> Operator:
        part = sides[name]
        if name in fused:
            return Operator(flow=part.step)
        velocity = _velocity(part, law, start)
        if law.timed:
            return Operator(lambda s, y: velocity(start + s, y), timed=True)
        return Operator(lambda y: velocity(start, y))

    def advance(t: float, y: Tensor, h: float) -> Tensor:
        operators = {name: operator(name, t) for name in sides}
        retraction = lambda y: law.retract(t, y)  # noqa: E731
        return integrate(operators, y, 0.0, h, 1, scheme, substep=methods, retraction=retraction)

    return Stepper(advance, min(scheme.order, *(RUNGE_KUTTA[method].order for method in chosen.values())))


def attention_and_perceptrons(field: Field) -> tuple[Field | None, Field | None]:
    """The part of a field in which particles meet, and the part that acts on each alone; None where there is none."""
    terms = [part if factor == 1.0 else factor * part for factor, part in parts(field)]
    sides = [[term for term in terms if term.interacts == meets] for meets in (True, False)]
    return tuple(None if not side else side[0] if len(side) == 1 else Sum(*side) for side in sides)
