"""Counter-based dropout, bit for bit that of ``macaron_ops/reference/dropout.py``.

    u = tl.rand(seed, position + (stream << 52)),  keep = u >= p,  drop(x) = keep ? x / (1 - p) : 0

``position`` is the element's index in the contiguous tensor that is dropped. The mask is never stored: a backward pass
draws it again. Ten rounds are about 60 integer instructions an element: in the epilogue of a product whose sum is
shorter than about 1500 that is more time than the tensor cores take, which is why nothing is drawn where p is 0.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["HIDDEN_STREAM", "OUTPUT_STREAM", "Dropout", "drop", "keeps"]

OUTPUT_STREAM = 0  # dropout of the operator's output
HIDDEN_STREAM = 1  # dropout of the hidden activations


class Dropout(NamedTuple):
    """The kernels' arguments for a dropout, in their order."""

    seed: Tensor | None
    stream: int  # shifted to its place in the counter
    p: float
    scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None, stream: int) -> "Dropout":
        if p == 0.0:  # whatever the seed and stream: the same compiled kernel
            return cls(None, 0, 0.0, 1.0)
        return cls(seed, stream << 52, p, 1.0 / (1.0 - p) if p < 1.0 else 0.0)

    @property
    def drops(self) -> bool:
        """Whether there is anything to do: the constant ``DROP`` of the kernels."""
        return self.p > 0.0


@triton.jit
def keeps(rows, columns, width, seed, stream, p, DROP: tl.constexpr):
    """Whether each element of the tile at ``rows``, ``columns`` of a tensor (any, width) is kept. A loop over memory
    reads the seed before, and gives the number: in it Triton would copy it in every turn, as if it were a tile."""
    if DROP:
        position = rows.to(tl.int64)[:, None] * width + columns[None, :]
        return tl.rand(tl.load(seed) if seed.dtype.is_ptr() else seed, position + stream) >= p
    else:
        return rows >= 0  # nobody looks: Triton 3.6 returns no None


@triton.jit
def drop(x, kept, scale, DROP: tl.constexpr):
    """``x`` after the dropout that :func:`keeps` drew."""
    if DROP:
        return tl.where(kept, x * scale, 0.0)
    else:
        return x
