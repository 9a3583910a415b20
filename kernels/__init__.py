"""Triton kernels and their launchers, one file per operator.

``kernels/ffn_step.py`` serves the operator ``ffn_step``: the backend table finds a file by its operator's name. A
file opens with the formula, the traffic and the limit; then come the jit functions and one launcher, forward and
backward. A kernel knows tensors and numbers only: nothing here imports another room of the package.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

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

    # What its GPUs are is asked where a call's tensors lie (``device.why_not_on``): to ask here, when the package is
    # imported, would initialise CUDA, after which a process must not be forked.
    return _why_not_started() if torch.cuda.is_available() else "torch sees no CUDA device"


def _why_not_started() -> str | None:
    """Triton builds the C module that starts kernels when a process first needs it: see triton/runtime/build.py."""
    from triton import knobs

    if knobs.build.impl is not None:
        return None
    asked = os.environ.get("CC")
    if asked is not None and shutil.which(asked) is None:
        return f"Triton starts kernels by a module in C, and CC={asked} is no compiler here"
    if asked is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton starts kernels by a module in C, and finds no compiler: install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    paths = (os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    folders = [sysconfig.get_path("include", scheme), *os.pathsep.join(paths).split(os.pathsep)]
    if not any(folder and Path(folder, "Python.h").exists() for folder in folders):
        return f"Triton starts kernels by a module in C, and {folders[0]} has no Python.h: install Python's headers"
    return None


def _why_not_interpreted() -> str | None:
    """Triton 3.6's interpreter takes the length of a loop from an array by a conversion that numpy 2.4 refuses."""
    import numpy
    import triton

    old, new = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy))
    if old < (3, 9) and new >= (2, 4):
        return "the interpreter of Triton before 3.9 needs numpy before 2.4"
    return None
