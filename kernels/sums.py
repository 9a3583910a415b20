"""The end of every sum over rows: the partial sums that programs or parts left, added in their order and rounded once.

    out = c sum over p of partial[p]        partial (P, ...) float32, out (...) in the dtype of the gradient that it is

Most are a few hundred kilobytes, so that launches are what they cost: those of one operator wait for each other, and
one launch ends several. No atomics, the same bits every time, whatever else is in the launch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch
from .emulation import rounded
from .tiles import MOST_PARTS

__all__ = ["Later", "Sum", "partial_sums", "sums_of"]

TOGETHER = 5  # in one launch: those of an attention step's last row kernel, its bias and its weight
# A program has 8192 elements at once, 32 a thread, all on their way together: of many partial sums 64 bytes each, of
# few, as the parts of a product are, long pieces.
_FEW = tl.constexpr(MOST_PARTS)
_TALL_ROWS, _TALL_BLOCK = tl.constexpr(512), tl.constexpr(16)
_FLAT_ROWS, _FLAT_BLOCK = tl.constexpr(16), tl.constexpr(512)


class Sum(NamedTuple):
    """A sum over rows, of ``c`` times what is summed, in a dtype."""

    dtype: torch.dtype
    c: float = 1.0


@triton.jit
def _sum(partial, out, c, P, N, block, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = block * BLOCK + tl.arange(0, BLOCK)
    at = columns.to(tl.int64)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < P)[:, None] & (columns < N)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * N + at[None, :], inside, 0.0)
    tl.store(out + at, rounded(c * tl.sum(total, 0), out.dtype.element_ty), columns < N)


@triton.jit
def _turn(partial, out, c, P, N, block):
    """One of the sum's blocks of columns, if ``block`` is; its number among those of the sums after, negative once it
    was one."""
    blocks = tl.cdiv(N, tl.where(P > _FEW, _TALL_BLOCK, _FLAT_BLOCK))
    mine = (block >= 0) & (block < blocks)
    if mine & (P > _FEW):
        _sum(partial, out, c, P, N, block, _TALL_ROWS, _TALL_BLOCK)
    if mine & (P <= _FEW):
        _sum(partial, out, c, P, N, block, _FLAT_ROWS, _FLAT_BLOCK)
    return block - blocks


@triton.jit(do_not_specialize=["P_0", "P_1", "P_2", "P_3", "P_4"])
def sums_kernel(
    partial_0, out_0, c_0, P_0, N_0, partial_1, out_1, c_1, P_1, N_1, partial_2, out_2, c_2, P_2, N_2,
    partial_3, out_3, c_3, P_3, N_3, partial_4, out_4, c_4, P_4, N_4,
):  # fmt: skip
    """A program: a block of columns of one of the sums."""
    block = _turn(partial_0, out_0, c_0, P_0, N_0, tl.program_id(0))
    if partial_1 is not None:
        block = _turn(partial_1, out_1, c_1, P_1, N_1, block)
    if partial_2 is not None:
        block = _turn(partial_2, out_2, c_2, P_2, N_2, block)
    if partial_3 is not None:
        block = _turn(partial_3, out_3, c_3, P_3, N_3, block)
    if partial_4 is not None:
        block = _turn(partial_4, out_4, c_4, P_4, N_4, block)


class Later:
    """Sums that wait for each other. The tensors that are their results hold nothing before :meth:`end`."""

    def __init__(self):
        self._waiting: list[tuple[Tensor, Tensor, float]] = []

    def add(self, partial: Tensor, wanted: Sum) -> Tensor:
        """The sum over the first dimension."""
        out = torch.empty(partial.shape[1:], dtype=wanted.dtype, device=partial.device)
        self._waiting.append((partial, out, wanted.c))
        return out

    def end(self) -> None:
        """Starts what waits."""
        while self._waiting:
            now, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
            programs, arguments = 0, []
            for partial, out, c in now:
                count, length = partial.shape[0], out.numel()
                programs += ceil_div(length, (_TALL_BLOCK if count > MOST_PARTS else _FLAT_BLOCK).value)
                arguments += [partial, out, c, count, length]
            arguments += [None, None, 0.0, 0, 0] * (TOGETHER - len(now))
            launch(sums_kernel, programs, now[0][0].device, *arguments, num_warps=8)


def partial_sums(
    wanted: Sequence[Sum | None], shape: tuple[int, ...], device: torch.device, zero: bool = False
) -> list[Tensor | None]:
    """Where the programs of a kernel leave their parts of each sum, or add to them."""
    new = torch.zeros if zero else torch.empty
    return [None if w is None else new(shape, dtype=torch.float32, device=device) for w in wanted]


def sums_of(
    partial: Sequence[Tensor | None], wanted: Sequence[Sum | None], later: Later | None = None
) -> list[Tensor | None]:
    """The sums over the first dimension of each; None where there is none. They are there when ``later`` has ended,
    without it at once."""
    waiting = Later() if later is None else later
    found = [None if p is None else waiting.add(p, w) for p, w in zip(partial, wanted, strict=True)]
    if later is None:
        waiting.end()
    return found
