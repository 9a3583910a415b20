"""Modules: parameters, and one call of an operator."""

from .attend_step import AttendStep
from .ffn_step import FFNStep
from .lie_trotter import LieTrotterDecoderLayer, LieTrotterEncoderLayer
from .macaron import MacaronDecoderLayer, MacaronEncoderLayer
from .norm import SphereNorm
from .split_layer import SplitLayer

__all__ = [
    "AttendStep",
    "FFNStep",
    "LieTrotterDecoderLayer",
    "LieTrotterEncoderLayer",
    "MacaronDecoderLayer",
    "MacaronEncoderLayer",
    "SphereNorm",
    "SplitLayer",
]
