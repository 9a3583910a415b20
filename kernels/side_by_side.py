"""Matrices written side by side into one, and the sums over their rows for a bias: one read, one write.

    out = (a | b | c),   sums = the column sums of out

What cuDNN returns as dq, dk and dv is what one product with packed weights wants as one matrix. They may come in
pieces, some rows at a time. A program walks over every so many tiles of some columns of one matrix. Memory is the
limit: 16 x 1024 tokens of 3 x 512 channels in 16 bits are 101 MB.
"""

from collections.abc import Iterable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch, power_of_2, processors
from .rows import aligned, alignment
from .sums import Later, Sum, partial_sums, sums_of

__all__ = ["side_by_side"]

TILE = 4096  # elements: 32 a thread, so that enough bytes are under way
PROGRAMS = 8  # a processor
COLUMNS = 256


@triton.jit
def _copy(
    x, out, sums, block, walker, walkers, M, x_row, out_row,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(walker, tl.cdiv(M, ROWS), walkers):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < WIDTH)[None, :]
        value = tl.load(x + (rows[:, None] * aligned(x_row, ALIGN) + columns[None, :]), inside, 0.0)
        tl.store(out + (rows[:, None] * aligned(out_row, ALIGN) + columns[None, :]), value, inside)
        if sums is not None:
            total += value.to(tl.float32)
    if sums is not None:
        tl.store(sums + columns, tl.sum(total, 0), columns < WIDTH)


@triton.jit(do_not_specialize=["M"])
def side_by_side_kernel(
    a, b, c, out, sums, M, a_row, b_row, c_row, out_row,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: every so many tiles of BLOCK columns of a, b or c, which have A, B and C; the sums are (programs of
    a block, A + B + C)."""
    blocks_a = tl.cdiv(A, BLOCK)
    blocks_b = tl.cdiv(B, BLOCK)
    blocks = blocks_a + blocks_b + tl.cdiv(C, BLOCK)
    block = tl.program_id(0) % blocks
    walker = tl.program_id(0) // blocks
    walkers = tl.num_programs(0) // blocks
    sums_b = sums
    sums_c = sums
    if sums is not None:
        sums += walker * (A + B + C)
        sums_b = sums + A
        sums_c = sums_b + B
    if block < blocks_a:
        _copy(a, out, sums, block, walker, walkers, M, a_row, out_row, A, ALIGN, ROWS, BLOCK)
    if b is not None:
        if (block >= blocks_a) & (block < blocks_a + blocks_b):
            _copy(b, out + A, sums_b, block - blocks_a, walker, walkers, M, b_row, out_row, B, ALIGN, ROWS, BLOCK)
    if c is not None:
        if block >= blocks_a + blocks_b:
            _copy(
                c, out + (A + B), sums_c, block - blocks_a - blocks_b, walker, walkers, M, c_row, out_row,
                C, ALIGN, ROWS, BLOCK,
            )  # fmt: skip


def side_by_side(
    pieces: Iterable[Sequence[Tensor]],
    out: Tensor,
    total: Sum | None = None,
    count: int = 1,
    later: Later | None = None,
) -> Tensor | None:
    """Writes ``count`` pieces of up to three parts ``(M / count, any)`` into ``out (M, all)``, one below the other,
    rows without gaps; the sum over the rows, if it is wanted, which ``later`` ends (``sums_of``)."""
    sums = None
    for i, parts in enumerate(pieces):
        a, b, c = (*parts, None, None)[:3]
        widths, strides, rows = [part.shape[1] for part in parts], [part.stride(0) for part in parts], a.shape[0]
        block = min(power_of_2(min(widths)), COLUMNS)
        tile, blocks = TILE // block, sum(ceil_div(width, block) for width in widths)
        walkers = min(ceil_div(rows, tile), ceil_div(PROGRAMS * processors(out.device), blocks))
        if sums is None:
            (sums,) = partial_sums([total], (count * walkers, sum(widths)), out.device)
        launch(
            side_by_side_kernel, walkers * blocks, out.device,
            a, b, c, out[i * rows :], None if sums is None else sums[i * walkers :],
            rows, *(*strides, 0, 0)[:3], out.stride(0),
            A=widths[0], B=sum(widths[1:2]), C=sum(widths[2:]), ALIGN=alignment(*strides, out.stride(0), *widths),
            ROWS=tile, BLOCK=block,
        )  # fmt: skip
        del parts, a, b, c  # before the next piece is made
    return sums_of([sums], [total], later)[0]
