"""Fused layers put into models that people have: one file per family of models."""

from .family import Family
from .jacobian import Spectrum, jacobian_spectrum
from .layer_record import LayerRecord, joined
from .registered import register_ffn
from .replace import FAMILIES, replace_layers, restore_layers
from .report import Left, Replaced, Report
from .splitting_error import LayerError, splitting_error
from .strang import to_strang
from .trajectories import record_trajectories

__all__ = [
    "FAMILIES",
    "Family",
    "LayerError",
    "LayerRecord",
    "Left",
    "Replaced",
    "Report",
    "Spectrum",
    "jacobian_spectrum",
    "joined",
    "record_trajectories",
    "register_ffn",
    "replace_layers",
    "restore_layers",
    "splitting_error",
    "to_strang",
]
