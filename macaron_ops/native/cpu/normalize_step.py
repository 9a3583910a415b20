"""``normalize_step`` on the CPU: ``csrc/cpu/normalize_step.cpp``."""

from macaron_ops.reference.normalize_step import Saved, saved_shapes

from .plan import alone, why_not_dtypes

__all__ = ["Saved", "backward", "forward", "saved_shapes", "why_not"]


def why_not(request) -> str | None:
    return why_not_dtypes(request.x.dtype, request.tensors.u.dtype)


forward, backward = alone("normalize_step", Saved, saved_shapes)
