"""Splitting schemes as data: how one step of ``dx/dt = A(x) + B(x)`` is made of substeps of A and of B."""

from .catalogue import CATALOGUE, find
from .scheme import AffineSplitting, Splitting, Stage

__all__ = ["CATALOGUE", "AffineSplitting", "Splitting", "Stage", "find"]
