"""Fused layers put into models that people have: one file per family of models."""

from .family import Family
from .replace import FAMILIES, replace_layers, restore_layers
from .report import Left, Replaced, Report
from .splitting_error import LayerError, splitting_error

__all__ = [
    "FAMILIES",
    "Family",
    "LayerError",
    "Left",
    "Replaced",
    "Report",
    "replace_layers",
    "restore_layers",
    "splitting_error",
]
