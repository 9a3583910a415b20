"""Triton kernels and their launchers, one file per operator.

``kernels/ffn_step.py`` serves the operator ``ffn_step``: the backend table finds a file by its operator's name. A
file opens with the formula, the traffic and the limit; then come the jit functions and one launcher, forward and
backward. A kernel knows tensors and numbers only: nothing here imports another room of the package.
"""

import importlib.util
import os

__all__ = ["why_unusable"]


def why_unusable() -> str | None:
    """Why no Triton kernel can run in this process; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"
