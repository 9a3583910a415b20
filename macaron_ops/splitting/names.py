"""Choosing by name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["pick"]

T = TypeVar("T")


def pick(argument: str, name: object, choices: Mapping[str, T]) -> T:
    """``choices[name]``.

    Raises:
        ValueError: there is none; the message lists the choices and the nearest names.
    """
    if isinstance(name, str) and name in choices:
        return choices[name]
    near = difflib.get_close_matches(str(name), choices, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}; got {name!r}.{hint}")
