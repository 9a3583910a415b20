"""Every operator in plain PyTorch. This room is the definition: the other backends are measured against it.

Each operator's file holds, beside the definition under the operator's name (any floating dtype up to float64, any
device, differentiable twice), what every backend has to provide: ``forward`` that keeps what a memory policy says,
``backward`` with explicit formulas, and the named tuples of their arguments.
"""

from .attend_step import attend_step
from .ffn_step import ffn_step
from .normalize_step import normalize_step
from .sphere_attend_step import sphere_attend_step
from .split_layer import parallel, split_layer

__all__ = ["attend_step", "ffn_step", "normalize_step", "parallel", "sphere_attend_step", "split_layer"]
