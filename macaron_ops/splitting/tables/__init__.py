"""The tables: coefficients, orders, sources. A new scheme is one entry of one of these files."""

from .compositions import COMPOSITIONS
from .layouts import sandwich
from .sums import SUMS

__all__ = ["COMPOSITIONS", "SUMS", "sandwich"]
