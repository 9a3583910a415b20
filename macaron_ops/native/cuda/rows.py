"""How long the rows of a row kernel can be: ``csrc/cuda/rows.h`` holds them in registers."""

import torch

__all__ = ["why_not_width"]

LONGEST_BY_VECTORS, LONGEST_BY_ELEMENTS = 8192, 4096  # csrc/cuda/rows.h has them too
VECTOR = 16  # bytes


def why_not_width(width: int, dtype: torch.dtype) -> str | None:
    """Why rows of ``width`` channels are too long. A tensor that begins elsewhere than at a multiple of 16 bytes is
    copied."""
    whole = width * dtype.itemsize % VECTOR == 0
    longest = LONGEST_BY_VECTORS if whole else LONGEST_BY_ELEMENTS
    if width <= longest:
        return None
    kind = "" if whole else f", where they are no multiple of {VECTOR} bytes"
    return f"its rows have at most {longest} channels{kind}, not {width}"
