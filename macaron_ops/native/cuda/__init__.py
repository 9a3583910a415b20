"""The backend ``cuda``: CUDA C++, ``csrc/cuda``. One file per operator; :mod:`library` loads the kernels."""

from .library import why_not_loaded as why_unusable

__all__ = ["why_unusable"]
