"""What a splitting scheme is: a table of substeps.

``phi_A(t)`` and ``phi_B(t)`` advance one operator alone by the time t. One step of size h is, in applied order,

    Splitting          phi_{o_k}(c_k h) ... phi_{o_2}(c_2 h) phi_{o_1}(c_1 h)       stages (o_1, c_1), ..., (o_k, c_k)
    AffineSplitting    sum_i w_i (the i-th Splitting)                               terms (w_i, stages of the i-th)
"""

import math
from dataclasses import dataclass

__all__ = ["AffineSplitting", "Splitting", "Stage"]

OPERATORS = ("A", "B")
Stage = tuple[str, float]  # (operator, coefficient)

_ROUNDING = 1e-14  # of a sum of coefficients that are given to double precision


@dataclass(frozen=True)
class Splitting:
    """A composition of substeps.

    Attributes:
        name: how ``find`` and ``nn.SplitLayer`` know it.
        order: p; the local error is O(h^(p+1)) where every substep is at least as accurate.
        stages: ``(operator, coefficient)`` in applied order.
        source: where the scheme is from.
        note: other names, and what it is among Transformer layers.

    Raises:
        ValueError: an operator that is not A or B, or coefficients of one that do not sum to 1.
    """

    name: str
    order: int
    stages: tuple[Stage, ...]
    source: str
    note: str = ""

    def __post_init__(self):
        _check(self.name, ((1.0, self.stages),))

    def count(self, operator: str) -> int:
        """The number of substeps of an operator."""
        return sum(o == operator for o, _ in self.stages)


@dataclass(frozen=True)
class AffineSplitting:
    """A sum of compositions, each from the same x. A term without stages is x itself.

    Attributes:
        terms: ``(weight, stages)``. The others as :class:`Splitting`.

    Raises:
        ValueError: an operator that is not A or B, weights that do not sum to 1, or coefficients of an operator,
            weighted, that do not.
    """

    name: str
    order: int
    terms: tuple[tuple[float, tuple[Stage, ...]], ...]
    source: str
    note: str = ""

    def __post_init__(self):
        weight = math.fsum(w for w, _ in self.terms)
        if abs(weight - 1.0) > _ROUNDING:
            raise ValueError(f"terms of {self.name!r}: expected weights that sum to 1; got {weight}")
        _check(self.name, self.terms)

    def count(self, operator: str) -> int:
        """The number of substeps of an operator, over all terms."""
        return sum(o == operator for _, stages in self.terms for o, _ in stages)

    @property
    def increments(self) -> tuple[Stage, ...] | None:
        """The stages of a scheme of the form ``x + sum_i (phi_i(x) - x)``, one stage a term; None for any other."""
        moving = [(weight, stages) for weight, stages in self.terms if stages]
        additive = all(weight == 1.0 and len(stages) == 1 for weight, stages in moving)
        return tuple(stages[0] for _, stages in moving) if additive else None


def _check(name: str, terms: tuple[tuple[float, tuple[Stage, ...]], ...]) -> None:
    """Consistency (order 1 at least): the operators, and the sum of each one's coefficients."""
    sums = dict.fromkeys(OPERATORS, 0.0)
    for weight, stages in terms:
        for operator, coefficient in stages:
            if operator not in OPERATORS:
                raise ValueError(f"stages of {name!r}: expected operators 'A' and 'B'; got {operator!r}")
            sums[operator] += weight * coefficient
    if any(abs(total - 1.0) > _ROUNDING for total in sums.values()):
        got = ", ".join(f"{operator}: {total:.17g}" for operator, total in sums.items())
        raise ValueError(f"stages of {name!r}: expected coefficients of A and of B that sum to 1; got {got}")
