"""The schemes by name. Those that the package brings are in ``tables``; ``register`` adds one's own."""

from .names import pick
from .scheme import Scheme
from .tables import COMPOSITIONS, SUMS

__all__ = ["CATALOGUE", "find", "register"]

CATALOGUE: dict[str, Scheme] = {
    scheme.name: scheme for scheme in sorted((*COMPOSITIONS, *SUMS), key=lambda scheme: scheme.order)
}


def find(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        ValueError: there is none; the message lists the nearest names and the choices.
    """
    return pick("scheme", name, CATALOGUE)


def register(scheme: Scheme) -> Scheme:
    """Makes a scheme known by its name, once its order conditions hold.

    Example::

        register(Splitting("mine", 2, (("A", 0.5), ("B", 1.0), ("A", 0.5)), source="this example"))

    Returns:
        The scheme.

    Raises:
        ValueError: it has not the order that it states, or another scheme has its name.
    """
    if CATALOGUE.setdefault(scheme.name, scheme.verify()) != scheme:
        raise ValueError(f"scheme: expected a name that is not taken; got {scheme.name!r}")
    return scheme
