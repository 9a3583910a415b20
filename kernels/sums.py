"""The end of every sum over rows: the partial sums that programs or parts left, added in their order and rounded once.

    out = c sum over p of partial[p]        partial (P, ...) float32, out (...) in the dtype of the gradient that it is

Up to three sums of one shape go in one launch, as those that a row kernel leaves: they are a few hundred kilobytes, so
that launches are what they cost. No atomics, the same bits every time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch, power_of_2
from .emulation import rounded

__all__ = ["Sum", "partial_sums", "sums_of"]

_ELEMENTS = 8192  # that a program has at once: 32 a thread, all on their way together
_COLUMNS = (16, 512)  # of a program: 64 bytes of a row at least


class Sum(NamedTuple):
    """A sum over rows, of ``c`` times what is summed, in a dtype."""

    dtype: torch.dtype
    c: float = 1.0


@triton.jit
def _sum(partial, out, c, P, N, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = columns.to(tl.int64)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < P)[:, None] & (columns < N)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * N + at[None, :], inside, 0.0)
    tl.store(out + at, rounded(c * tl.sum(total, 0), out.dtype.element_ty), columns < N)


@triton.jit(do_not_specialize=["P"])
def sums_kernel(
    partial_0, out_0, c_0, partial_1, out_1, c_1, partial_2, out_2, c_2, P, N,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK columns of one of the sums."""
    blocks = tl.cdiv(N, BLOCK)
    which = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if which == 0:
        _sum(partial_0, out_0, c_0, P, N, columns, ROWS, BLOCK)
    if partial_1 is not None:
        if which == 1:
            _sum(partial_1, out_1, c_1, P, N, columns, ROWS, BLOCK)
    if partial_2 is not None:
        if which == 2:
            _sum(partial_2, out_2, c_2, P, N, columns, ROWS, BLOCK)


def partial_sums(
    wanted: Sequence[Sum | None], shape: tuple[int, ...], device: torch.device, zero: bool = False
) -> list[Tensor | None]:
    """Where the programs of a kernel leave their parts of each sum, or add to them."""
    new = torch.zeros if zero else torch.empty
    return [None if w is None else new(shape, dtype=torch.float32, device=device) for w in wanted]


def sums_of(partial: Sequence[Tensor | None], wanted: Sequence[Sum | None]) -> list[Tensor | None]:
    """The sums over the first dimension of up to three tensors of one shape; None where there is none."""
    found: list[Tensor | None] = [None] * len(partial)
    given = [i for i, p in enumerate(partial) if p is not None]
    if not given:
        return found
    first = partial[given[0]]
    count, length = first.shape[0], first.shape[1:].numel()
    arguments = []
    for i in given:
        found[i] = torch.empty(first.shape[1:], dtype=wanted[i].dtype, device=first.device)
        arguments += [partial[i], found[i], wanted[i].c]
    arguments += [None, None, 0.0] * (3 - len(given))
    rows = min(power_of_2(count), _ELEMENTS // _COLUMNS[0])
    block = max(_COLUMNS[0], min(_ELEMENTS // rows, _COLUMNS[1], power_of_2(length)))
    launch(
        sums_kernel, len(given) * ceil_div(length, block), first.device,
        *arguments, count, length, ROWS=rows, BLOCK=block, num_warps=max(1, min(rows * block // 1024, 8)),
    )  # fmt: skip
    return found
