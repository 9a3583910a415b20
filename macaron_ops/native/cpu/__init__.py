"""The backend ``native``: C++ kernels for the CPU. One file per operator; :mod:`plan` calls the kernels."""

from macaron_ops.native import why_not_loaded as why_unusable

from .plan import backward, forward

__all__ = ["backward", "forward", "why_unusable"]
