"""The operators as people call them: argument checks, choice of backend, autograd."""

from .attend_step import attend_step
from .dispatch import BackendError, BackendStatus, backends, use_backend
from .ffn_step import ffn_step
from .normalize_step import normalize_step
from .run import Explanation, explain
from .sphere_attend_step import sphere_attend_step
from .split_layer import Parallel, Substep, parallel, split_layer, substep

__all__ = [
    "BackendError",
    "BackendStatus",
    "Explanation",
    "Parallel",
    "Substep",
    "attend_step",
    "backends",
    "explain",
    "ffn_step",
    "normalize_step",
    "parallel",
    "sphere_attend_step",
    "split_layer",
    "substep",
    "use_backend",
]
