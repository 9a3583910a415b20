"""What a splitting scheme is: a table of substeps.

``phi_A(t)`` and ``phi_B(t)`` advance one operator alone by the time t. One step of size h is, in applied order,

    Splitting          phi_{o_k}(c_k h) ... phi_{o_2}(c_2 h) phi_{o_1}(c_1 h)       stages (o_1, c_1), ..., (o_k, c_k)
    AffineSplitting    sum_i w_i (the i-th Splitting)                               terms (w_i, stages of the i-th)

A third number g in a stage (Chin's schemes) is that of a commutator: the stage flows ``c X + g h^2 [X, [Y, X]]``, Y
being the other operator, by the time h.
"""

import cmath
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Complex
from typing import NamedTuple

from .algebra import LETTERS, lyndon_words, order_errors, words

__all__ = ["AffineSplitting", "Cost", "Scheme", "Splitting", "Stage", "alternating", "merged", "palindrome"]

OPERATORS = LETTERS
Stage = tuple[str, float] | tuple[str, complex] | tuple[str, float, float]  # operator, coefficient, commutator's

_ROUNDING = 1e-14  # of a sum of coefficients that are given to double precision
_HIGHEST = 8  # order that ``compose`` looks for


class Cost(NamedTuple):
    """How many substeps of each operator."""

    A: int
    B: int


class _Terms(ABC):
    """What both kinds of schemes say of themselves, from the weighted stages that they consist of."""

    name: str
    order: int

    @property
    @abstractmethod
    def weighted(self) -> tuple[tuple[float, tuple[Stage, ...]], ...]:
        """The scheme as a sum, whatever its kind."""

    def count(self, operator: str) -> int:
        """The number of substeps of an operator, over all terms."""
        return sum(stage[0] == operator for _, stages in self.weighted for stage in stages)

    def cost(self, steps: int = 1, *, merge: bool = False) -> Cost:
        """The substeps that ``steps`` steps take.

        Args:
            merge: neighbouring substeps of one operator are one, within a step and from a step to the next (FSAL,
                first same as last). Exact for exact flows alone. The terms of a sum begin at the same x, so that
                nothing of one step merges with the next.
        """
        runs = [merged(run) if merge else run for run in self._runs(steps)]
        return Cost(*(sum(stage[0] == o for run in runs for stage in run) for o in OPERATORS))

    @property
    def is_real(self) -> bool:
        return not any(isinstance(stage[1], complex) for _, stages in self.weighted for stage in stages)

    @property
    def is_forward(self) -> bool:
        """No substep goes backwards: all coefficients have a real part above 0."""
        return all(complex(stage[1]).real > 0 for _, stages in self.weighted for stage in stages)

    @property
    def has_commutator(self) -> bool:
        """A stage flows a field with a commutator in it, which is neither A's nor B's."""
        return any(len(stage) == 3 for _, stages in self.weighted for stage in stages)

    def residual(self, order: int | None = None) -> float:
        """The largest error of an order condition up to ``order``, by default the scheme's own; see ``algebra``."""
        errors = order_errors(self.weighted, self.order if order is None else order)
        return max(abs(complex(error)) for error in errors.values())

    def verify(self, tolerance: float = 1e-14):
        """The scheme itself, if it has the order that it states.

        Raises:
            ValueError: an order condition is off by more than ``tolerance``; the message says which.
        """
        errors = {w: abs(complex(e)) for w, e in order_errors(self.weighted, self.order).items()}
        broken = [word for word, error in errors.items() if error > tolerance]
        if broken:
            word = min(broken, key=len)
            raise ValueError(
                f"scheme {self.name!r}: expected order {self.order}; the condition of the word {word} is off by "
                f"{errors[word]:.2g}, so that its order is {len(word) - 1}"
            )
        return self

    def leading_error(self) -> float:
        """How large the error of order p + 1 is: ``(p + 1)!`` times the Euclidean norm of its coefficients.

        Of a composition they are those of the Lyndon words, one for each independent commutator (the measure LEM of
        Auzinger, Hofstaetter, Ketcheson, Koch 2017, BIT 57:55-74). The error of a sum is no
        combination of commutators: there they are those of all words, a larger number for an equal error.
        """
        n = self.order + 1
        errors = order_errors(self.weighted, n)
        return math.factorial(n) * math.sqrt(sum(abs(complex(errors[word])) ** 2 for word in self._independent(n)))

    @abstractmethod
    def _runs(self, steps: int) -> list[tuple[Stage, ...]]:
        """The stages of several steps, as far as they follow one another."""

    @abstractmethod
    def _independent(self, length: int) -> list[str]:
        """Words of this length whose errors determine those of all others."""


@dataclass(frozen=True)
class Splitting(_Terms):
    """A composition of substeps.

    Attributes:
        name: how ``find`` and ``nn.SplitLayer`` know it.
        order: p; the local error is O(h^(p+1)) where every substep is at least as accurate. Believed until
            :meth:`verify` is called.
        stages: ``(operator, coefficient)`` in applied order. A coefficient of 0 is no substep and is left out.
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
        object.__setattr__(self, "stages", _moving(self.name, self.stages))
        _check(self.name, self.weighted)

    @property
    def weighted(self) -> tuple[tuple[float, tuple[Stage, ...]], ...]:
        return ((1.0, self.stages),)

    def _runs(self, steps: int) -> list[tuple[Stage, ...]]:
        return [self.stages * steps]

    def _independent(self, length: int) -> list[str]:
        return lyndon_words(length)

    @property
    def is_symmetric(self) -> bool:
        """It is its own adjoint: the step by -h undoes the step by h. Its order is even."""
        return _equal(merged(self.stages), merged(self.stages[::-1]))

    def adjoint(self) -> "Splitting":
        """The inverse of the step by -h: the stages in reverse."""
        return replace(
            self, name=f"{self.name}_adjoint", stages=self.stages[::-1], source=f"adjoint of {self.name}", note=""
        )

    def swap(self) -> "Splitting":
        """A and B in each other's place."""
        return replace(self, name=_swapped_name(self.name), stages=_swapped(self.stages), note="")

    def compose(self, gammas: Sequence[float], name: str = "", source: str = "", note: str = "") -> "Splitting":
        """The steps by ``gammas[0] h``, ``gammas[1] h``, ... one after another as one scheme, of the order (up to 8)
        that its order conditions show. Neighbours are not merged; :meth:`merge` does that.

        Raises:
            ValueError: the gammas do not sum to 1.
        """
        if self.has_commutator:
            raise ValueError(f"scheme {self.name!r}: expected one without commutators to compose")
        stages = tuple((stage[0], gamma * stage[1]) for gamma in gammas for stage in self.stages)
        found = Splitting(name or f"{self.name}_{len(gammas)}", 1, stages, source or f"composed of {self.name}", note)
        errors = order_errors(found.weighted, _HIGHEST)
        order = min((len(word) for word, e in errors.items() if abs(complex(e)) > _ROUNDING), default=_HIGHEST + 1) - 1
        return replace(found, order=order)

    def merge(self) -> "Splitting":
        """Neighbouring stages of one operator as one: the same scheme where substeps are exact flows."""
        return replace(self, stages=merged(self.stages))


@dataclass(frozen=True)
class AffineSplitting(_Terms):
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

    # The adjoint of a sum is no sum of adjoints, and none of these is its own.
    is_symmetric = False

    def __post_init__(self):
        object.__setattr__(self, "terms", tuple((w, _moving(self.name, stages)) for w, stages in self.terms))
        weight = math.fsum(w for w, _ in self.terms)
        if abs(weight - 1.0) > _ROUNDING:
            raise ValueError(f"terms of {self.name!r}: expected weights that sum to 1; got {weight}")
        _check(self.name, self.terms)

    @property
    def weighted(self) -> tuple[tuple[float, tuple[Stage, ...]], ...]:
        return self.terms

    def _runs(self, steps: int) -> list[tuple[Stage, ...]]:
        return [stages for _, stages in self.terms] * steps

    def _independent(self, length: int) -> list[str]:
        return words([length])

    def swap(self) -> "AffineSplitting":
        """A and B in each other's place."""
        terms = tuple((weight, _swapped(stages)) for weight, stages in self.terms)
        return replace(self, name=_swapped_name(self.name), terms=terms, note="")

    @property
    def increments(self) -> tuple[Stage, ...] | None:
        """The stages of a scheme of the form ``x + sum_i (phi_i(x) - x)``, one stage a term; None for any other."""
        moving = [(weight, stages) for weight, stages in self.terms if stages]
        additive = all(weight == 1.0 and len(stages) == 1 for weight, stages in moving)
        return tuple(stages[0] for _, stages in moving) if additive else None


Scheme = Splitting | AffineSplitting


def alternating(first: str, *coefficients: float | complex) -> tuple[Stage, ...]:
    """Stages of one operator and the other in turn."""
    return tuple((OPERATORS[(OPERATORS.index(first) + i) % 2], c) for i, c in enumerate(coefficients))


def palindrome(first: str, *coefficients: float) -> tuple[Stage, ...]:
    """Alternating stages that read the same backwards, from their first half and the middle one."""
    return alternating(first, *coefficients, *coefficients[-2::-1])


def merged(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Neighbours of one operator as one stage; those that cancel are left out."""
    result: list[Stage] = []
    for stage in stages:
        if result and result[-1][0] == stage[0] and len(result[-1]) == len(stage) == 2:
            total = result.pop()[1] + stage[1]
            if total != 0:
                result.append((stage[0], total))
        else:
            result.append(stage)
    return tuple(result)


def _moving(name: str, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages, checked one by one, without those that do nothing."""
    for stage in stages:
        if len(stage) not in (2, 3) or stage[0] not in OPERATORS:
            raise ValueError(f"stages of {name!r}: expected operators 'A' and 'B'; got {stage[0]!r}")
        if not all(isinstance(c, Complex) and cmath.isfinite(c) for c in stage[1:]):
            raise ValueError(f"stages of {name!r}: expected finite coefficients; got {stage!r}")
    return tuple(tuple(stage) for stage in stages if any(c != 0 for c in stage[1:]))


def _check(name: str, terms: tuple[tuple[float, tuple[Stage, ...]], ...]) -> None:
    """Consistency (order 1 at least): the sum of each operator's coefficients."""
    sums = dict.fromkeys(OPERATORS, 0.0)
    for weight, stages in terms:
        for stage in stages:
            sums[stage[0]] += weight * stage[1]
    if any(abs(total - 1.0) > _ROUNDING for total in sums.values()):
        got = ", ".join(f"{operator}: {total:.17g}" for operator, total in sums.items())
        raise ValueError(f"stages of {name!r}: expected coefficients of A and of B that sum to 1; got {got}")


def _swapped(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    other = dict(zip(OPERATORS, OPERATORS[::-1], strict=True))
    return tuple((other[stage[0]], *stage[1:]) for stage in stages)


def _swapped_name(name: str) -> str:
    """``strang_ABA`` is ``strang_BAB``'s."""
    stem, _, ending = name.rpartition("_")
    if stem and ending and set(ending) <= set(OPERATORS):
        return f"{stem}_{ending.translate(str.maketrans('AB', 'BA'))}"
    return f"{name}_swapped"


def _equal(a: Sequence[Stage], b: Sequence[Stage]) -> bool:
    return len(a) == len(b) and all(
        s[0] == t[0] and len(s) == len(t) and all(abs(c - d) <= _ROUNDING for c, d in zip(s[1:], t[1:], strict=True))
        for s, t in zip(a, b, strict=True)
    )
