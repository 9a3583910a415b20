"""Triton kernels and their launchers, one file per operator.

``kernels/ffn_step.py`` serves the operator ``ffn_step``: the backend table finds a file by its operator's name. A
file opens with the formula, the traffic and the limit; then come the jit functions and one launcher, forward and
backward. A kernel knows tensors and numbers only: nothing here imports another room of the package.
"""

import importlib.util
import os
from collections.abc import Callable

__all__ = ["recorded", "why_unusable"]


def recorded(function: Callable) -> Callable:
    """The same function for calls with the same signature: it plans its launches at the first."""
    from .replay import Recorded

    return Recorded(function)


def why_unusable() -> str | None:
    """Why no Triton kernel can run in this process; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _why_not_interpreted()
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _why_not_interpreted() -> str | None:
    """Triton 3.6's interpreter takes the length of a loop from an array by a conversion that numpy 2.4 refuses."""
    import numpy
    import triton

    old, new = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy))
    if old < (3, 9) and new >= (2, 4):
        return "the interpreter of Triton before 3.9 needs numpy before 2.4"
    return None
