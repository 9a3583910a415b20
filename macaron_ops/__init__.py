"""macaron_ops: Transformer layers as operator splittings, every substep one fused operator."""

from . import _rooms  # noqa: F401 - the first: the others import what it finds
from .integrations import record_trajectories, register_ffn, replace_layers, restore_layers, splitting_error, to_strang
from .ops import (
    BackendError,
    Explanation,
    attend_step,
    backends,
    explain,
    ffn_step,
    normalize_step,
    parallel,
    sphere_attend_step,
    split_layer,
    substep,
    use_backend,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Explanation",
    "attend_step",
    "backends",
    "explain",
    "ffn_step",
    "normalize_step",
    "parallel",
    "record_trajectories",
    "register_ffn",
    "replace_layers",
    "restore_layers",
    "sphere_attend_step",
    "split_layer",
    "splitting_error",
    "substep",
    "to_strang",
    "use_backend",
]
