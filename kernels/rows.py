"""Tensors as rows, and how the rows of a tensor are laid over the programs of a row kernel.

A row kernel is bound by memory: it should read and write each tensor once, 16 bytes a thread, with enough bytes in
flight. Rows of up to ``WIDEST`` channels stay in registers, several to a program where they are short; longer ones are
walked in blocks of columns, once for every reduction and once to write (the later walks hit the caches).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl  # noqa: F401 - the interpreter wants to see it beside a jit function
from torch import Tensor

from .device import ceil_div, power_of_2, processors, target

__all__ = ["LONGEST", "RowTiles", "Rows", "aligned", "alignment", "as_rows", "offsets", "row_tiles", "stages"]

LONGEST = 65536  # channels of a row
WIDEST = 8192  # channels that a program keeps in registers: with 16 warps 16 numbers a thread and tensor
WIDE_BLOCK = 4096  # columns of a block where a row is longer
TILE = 2048  # elements that a program has at once where rows are short: 16 a thread
_STAGES = {"sm80": 2}  # of those kernels: the next tile is under way while one is computed; a third spills there
PROGRAMS_PER_PROCESSOR = 4  # of kernels that walk over the rows and keep sums


class Rows(NamedTuple):
    """``(..., D)`` as rows, copied only where the last dimension has gaps or the others have three strides.

    Row r begins at ``r // inner * outer_stride + r % inner * stride``; where one stride is enough, inner is 1 and
    outer_stride is that stride (Triton folds the division by 1).
    """

    tensor: Tensor
    count: int
    inner: int
    outer_stride: int
    stride: int

    @property
    def is_matrix(self) -> bool:
        """One stride leads from row to row."""
        return self.inner == 1


def as_rows(x: Tensor) -> Rows:
    """The rows of ``x (..., D)``."""
    width = x.shape[-1]
    count = x.numel() // width
    if x.is_contiguous():
        return Rows(x, count, 1, width, 0)
    if x.stride(-1) != 1 and width > 1:
        return Rows(x.contiguous(), count, 1, width, 0)
    levels: list[list[int]] = []  # [size, stride], outermost first, neighbours that step alike merged
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if len(levels) > 2:
        return Rows(x.contiguous(), count, 1, width, 0)
    if len(levels) < 2:
        return Rows(x, count, 1, levels[0][1] if levels else width, 0)
    return Rows(x, count, levels[1][0], levels[0][1], levels[1][1])


class RowTiles(NamedTuple):
    """How a program tiles rows of D channels: ROWS x BLOCK elements at once."""

    ROWS: int
    BLOCK: int
    num_warps: int
    wide: bool

    def programs(self, rows: int, device: torch.device) -> int:
        """Of a kernel whose programs walk over the rows: enough to fill the device, no more than there are tiles."""
        return max(1, min(ceil_div(rows, self.ROWS), PROGRAMS_PER_PROCESSOR * processors(device)))


def row_tiles(width: int) -> RowTiles:
    if width > WIDEST:
        return RowTiles(1, WIDE_BLOCK, 8, True)
    block = max(power_of_2(width), 2)
    rows = max(1, min(TILE // block, 256))
    return RowTiles(rows, block, {4096: 8, 8192: 16}.get(block, 4), False)


def stages(device: torch.device) -> int:
    """Of a kernel whose programs walk over the rows."""
    return _STAGES.get(target(device).architecture, 3)


def alignment(*numbers: int) -> int:
    """The power of 2, at most 8, that all the strides and lengths are multiples of.

    Triton knows of an argument whether it is a multiple of 16, and reads 16 bytes a thread only if it is: where a
    kernel divides by this constant and multiplies again (:func:`aligned`), it does so with a stride like 1000 too."""
    together = 8
    for number in numbers:
        together |= number
    return together & -together


@triton.jit
def aligned(number, ALIGN: tl.constexpr):
    """``number``, known to be a multiple of ALIGN."""
    return number // ALIGN * ALIGN


@triton.jit
def offsets(rows, inner, outer_stride, stride, ALIGN: tl.constexpr):
    """Where the ``rows`` (int64) of a :class:`Rows` begin."""
    return rows // inner * aligned(outer_stride, ALIGN) + rows % inner * aligned(stride, ALIGN)
