"""The backend ``native``: C++ kernels for the CPU (``csrc/cpu``). One file per operator; :mod:`plan` calls the library."""

from macaron_ops.native import why_not_loaded as why_unusable

from .plan import backward, forward

__all__ = ["backward", "forward", "why_unusable"]
