"""Fused layers put into models that people have: one file per family of models."""

from .family import Family
from .registered import register_ffn
from .replace import FAMILIES, replace_layers, restore_layers
from .report import Left, Replaced, Report
from .strang import to_strang

__all__ = [
    "FAMILIES",
    "Family",
    "Left",
    "Replaced",
    "Report",
    "register_ffn",
    "replace_layers",
    "restore_layers",
    "to_strang",
]
