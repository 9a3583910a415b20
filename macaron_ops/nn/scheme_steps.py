"""A scheme's step through fused operators."""

from collections.abc import Callable

from torch import Tensor

from macaron_ops.ops import Substep, parallel, split_layer
from macaron_ops.splitting import Scheme, Splitting, find

__all__ = ["between", "fused_scheme", "of_step", "run_scheme"]


def fused_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme, by name or itself.

    Raises:
        ValueError: it is unknown, or its stages are not steps of the operators: complex, or of a commutator.
    """
    found = scheme if isinstance(scheme, Scheme) else find(scheme)
    if not found.is_real or found.has_commutator:
        what = "a commutator of the fields" if found.has_commutator else "complex coefficients"
        raise ValueError(f"scheme: expected one of real steps of A and of B; got {found.name!r}, which has {what}")
    return found


def of_step(substep: Substep, step: float, **changes: object) -> Substep:
    """The same substep with another step size."""
    return substep._replace(kwargs={**substep.kwargs, "step": step, **changes})


def between(first: Substep, second: Substep, weight: float) -> Substep:
    """The substep whose parameters lie between two's, ``first + weight (second - first)``."""

    def mix(a: object, b: object) -> object:
        if isinstance(a, tuple):
            return tuple(map(mix, a, b))
        return a.lerp(b, weight) if isinstance(a, Tensor) and a is not b else a

    kwargs = {name: mix(value, second.kwargs[name]) for name, value in first.kwargs.items()}
    return Substep(first.operator, mix(first.args, second.args), kwargs)


def run_scheme(x: Tensor, scheme: Scheme, substep: Callable[[int, str, float], Substep], save: str) -> Tensor:
    """One step of a scheme from ``x``: a composition or sum of single stages as ONE autograd node, of another sum each
    term as one.

    Args:
        substep: ``substep(i, operator, coefficient)`` is stage i, counted over all terms.
    """
    terms: list[tuple[float, list[Substep]]] = []
    done = 0
    for weight, stages in scheme.weighted:
        terms.append((weight, [substep(done + i, o, c) for i, (o, c) in enumerate(stages)]))
        done += len(stages)
    if isinstance(scheme, Splitting):
        return split_layer(x, terms[0][1], save=save)
    if scheme.increments is not None:
        return split_layer(x, [parallel(*(s for _, substeps in terms for s in substeps))], save=save)
    return sum(weight * (split_layer(x, substeps, save=save) if substeps else x) for weight, substeps in terms)
