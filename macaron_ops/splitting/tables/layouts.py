"""Layouts of whole networks, as splittings of one long step."""

from ..scheme import Splitting

__all__ = ["sandwich"]


def sandwich(n: int, k: int) -> Splitting:
    """``A^k (A B)^(n-k) B^k``: the sandwich Transformer of n layers with k attentions moved to the front and k FFNs to
    the back (Press, Smith, Levy 2020, arXiv 1911.03864). One step of it has the length n.

    Example::

        nn.SplitStack(512, 8, 2048, steps=1, time=6.0, knots=None, scheme=sandwich(6, 2))

    Raises:
        ValueError: k is not between 0 and n.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"k: expected an integer between 0 and n = {n}; got {k}")
    letters = "A" * k + "AB" * (n - k) + "B" * k
    return Splitting(
        f"sandwich_{n}_{k}",
        order=1,
        stages=tuple((letter, 1 / n) for letter in letters),
        source="Press, Smith, Levy 2020, arXiv 1911.03864",
    )
