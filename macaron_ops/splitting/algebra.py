"""Order conditions in the free associative algebra of A and B.

To the flow of an operator belongs the exponential of its Lie derivative, to "first one, then the other" the product of
the two from left to right. A scheme is thus a series over words, ``"AAB"``, and has order p where the coefficient of
every word of n <= p letters is that of ``exp(A + B)``, 1 / n!. A weighted sum of compositions is a weighted sum of
series. Coefficients are exact rationals (those of the floats that the tables hold), so what is left over is what the
table itself is off; complex tables are computed in complex floats.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

__all__ = ["LETTERS", "lyndon_words", "order_errors", "words"]

LETTERS = ("A", "B")
Series = dict[str, Fraction | complex]


def order_errors(terms: Sequence[tuple], length: int) -> Series:
    """What each word of at most ``length`` letters is off, for ``terms`` of weights and stages."""
    total: Series = {}
    for weight, stages in terms:
        for word, coefficient in _series(stages, length).items():
            total[word] = total.get(word, 0) + _exact(weight) * coefficient
    return {word: total.get(word, 0) - Fraction(1, math.factorial(len(word))) for word in words(range(length + 1))}


def words(lengths: Iterable[int]) -> list[str]:
    """All words of these lengths."""
    return ["".join(letters) for n in lengths for letters in itertools.product(LETTERS, repeat=n)]


def lyndon_words(length: int) -> list[str]:
    """The words that are smaller than all of their rotations: as many as there are independent order conditions."""
    return [w for w in words([length]) if all(w < w[i:] + w[:i] for i in range(1, length))]


def _series(stages: Iterable[tuple], length: int) -> Series:
    series: Series = {"": Fraction(1)}
    for stage in stages:
        series = _product(series, _exponential(_generator(*stage), length), length)
    return series


def _generator(operator: str, coefficient: float, commutator: float = 0) -> Series:
    """``c X``, or with a commutator ``c X + g [X, [Y, X]] = c X + g (2 X Y X - X X Y - Y X X)``."""
    x, g = operator, _exact(commutator)
    element = {x: _exact(coefficient)}
    if g:
        (y,) = (letter for letter in LETTERS if letter != x)
        element |= {x + y + x: 2 * g, x + x + y: -g, y + x + x: -g}
    return element


def _exponential(element: Series, length: int) -> Series:
    total: Series = {"": Fraction(1)}
    power = total
    for k in range(1, length + 1):
        power = {word: c / k for word, c in _product(power, element, length).items()}
        for word, c in power.items():
            total = total | {word: total.get(word, 0) + c}
    return total


def _product(a: Series, b: Series, length: int) -> Series:
    product: Series = {}
    for first, p in a.items():
        for second, q in b.items():
            if len(first) + len(second) <= length:
                product[first + second] = product.get(first + second, 0) + p * q
    return product


def _exact(value: float | complex) -> Fraction | complex:
    return value if isinstance(value, complex) else Fraction(value)
