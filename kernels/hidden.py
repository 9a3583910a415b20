"""The hidden activations of the FFN, forward and backward: products with the activation in their epilogue.

    forward     z = n W_in^T + b_in,   h = drop(act(z))            n (M, D), W_in (F, D) or (2F, D): gate, then up
    again       h from a z that was kept
    backward    dh = drop(c g W_out),  dz = dh act'(z)             g (M, D), W_out (D, F)
                and in the same pass h again, and db_in = sum over the rows of dz

relu's derivative shows in h: its backward pass reads h where others read z, and writes none. dropout's mask shows there
too.

2 M D F FLOP each (4 where gated, forward). z and h are M F numbers each way: at D >= 512 the products are the limit,
below it those bytes, which is why z is only written for a backward pass that wants it. db_in is a partial sum a row of
tiles, then a reduction: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATION_OF_GATE, activate, activate_backward
from .device import ceil_div, launch, power_of_2
from .dropout import Dropout, drop, keeps
from .emulation import rounded
from .product import as_matrix, as_operands, as_results, precision, product, product_pair, put, tile_at, turns
from .product_parts import product_parts, sum_of_parts
from .rows import aligned
from .slices import slices
from .sums import Later, Sum, sums_of
from .tiles import Tile, cut, tile

__all__ = ["hidden_again", "hidden_backward", "hidden_forward", "reads_h"]


@triton.jit
def _bias(b, columns, N):
    return tl.load(b + columns, columns < N, 0.0).to(tl.float32)[None, :]


@triton.jit
def _write_hidden(
    value, up, b, z, h, row, column, rows, at, M, F, seed, stream, p, scale,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile at ``row``, ``column``, which are ``rows`` (int64), ``at``: z and h, each if it is given;
    ``up`` only where gated."""
    inside = (rows < M)[:, None] & (at < F)[None, :]
    z_width = 2 * F if GATED else F
    if b is not None:
        value += _bias(b, at, F)
    if z is not None:
        put(z, value, row, column, rows, at, z_width, inside, STORES)
    if h is not None:
        value = activate(value, ACTIVATION, h.dtype if STORES else h.dtype.element_ty)
    if GATED:
        if b is not None:
            up += _bias(b + F, at, F)
        if z is not None:
            put(z, up, row, F + column, rows, F + at, z_width, inside, STORES)
        value *= up
    if h is not None:
        value = drop(value, keeps(rows, at, F, seed, stream, p, DROP), scale, DROP)
        put(h, value, row, column, rows, at, F, inside, STORES)


@triton.jit(do_not_specialize=["M"])
def hidden_forward_kernel(
    n, w, b, z, h, M, F, K, n_stride, w_stride, seed, stream, p, scale, DROP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ALIGN: tl.constexpr, STORES: tl.constexpr, PERSISTENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A program: its share of the tiles of h; z and h are contiguous, and each is written if it is given."""
    F = aligned(F, ALIGN)
    if DROP:
        seed = tl.load(seed)
    first, last, step = turns(M, F, BM, BN, PERSISTENT)
    for index in tl.range(first, last, step, flatten=PERSISTENT):
        tile_row, tile_column = tile_at(index, M, F, BM, BN, GROUP)
        row, column = tile_row * BM, tile_column * BN
        if GATED:
            pair = product_pair(
                n, w, row, column, M, F, K, n_stride, w_stride, DESCRIPTORS, ALIGN, BM, BN, BK, PRECISION
            )
            gate, up = slices(pair, BM, 2 * BN, 2)
        else:
            gate = product(
                n, w, row, column, M, F, 0, K, n_stride, w_stride, True, True, DESCRIPTORS, ALIGN, BM, BN, BK, PRECISION
            )
            up = gate
        gates, ups = slices(gate, BM, BN, SLICES), slices(up, BM, BN, SLICES)
        rows = row + tl.arange(0, BM).to(tl.int64)
        for i in tl.static_range(SLICES):
            begin = column + i * (BN // SLICES)
            at = begin + tl.arange(0, BN // SLICES)
            _write_hidden(
                gates[i], ups[i], b, z, h, row, begin, rows, at, M, F, seed, stream, p, scale,
                DROP, ACTIVATION, GATED, STORES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "parts"])
def hidden_of_parts_kernel(
    partial, b, z, h, M, F, parts, seed, stream, p, scale, DROP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same from the product's parts, (parts, M, F or 2F). A program: one tile of h."""
    tile_row, tile_column = tile_at(tl.program_id(0), M, F, BM, BN, 1)
    rows = tile_row * BM + tl.arange(0, BM).to(tl.int64)
    at = tile_column * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (at < F)[None, :]
    width = 2 * F if GATED else F
    value = sum_of_parts(partial, parts, rows, at, M, width, inside)
    up = sum_of_parts(partial + F, parts, rows, at, M, width, inside) if GATED else value
    _write_hidden(
        value, up, b, z, h, 0, 0, rows, at, M, F, seed, stream, p, scale, DROP, ACTIVATION, GATED, False
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def hidden_again_kernel(
    z, h, M, F, seed, stream, p, scale, DROP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: one tile of h."""
    tile_row, tile_column = tile_at(tl.program_id(0), M, F, BM, BN, 1)
    rows = tile_row * BM + tl.arange(0, BM)
    columns = tile_column * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < F)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    z_at = z + long_rows * (2 * F if GATED else F) + columns[None, :]
    value = activate(tl.load(z_at, inside, 0.0).to(tl.float32), ACTIVATION, h.dtype.element_ty)
    if GATED:
        value *= tl.load(z_at + F, inside, 0.0).to(tl.float32)
    value = drop(value, keeps(rows, columns, F, seed, stream, p, DROP), scale, DROP)
    tl.store(h + long_rows * F + columns[None, :], rounded(value, h.dtype.element_ty), inside)


@triton.jit
def _write_backward(
    dh, z, up, dz, h, sums, c, row, column, rows, at, tile_row, M, F, seed, stream, p, scale,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile at ``row``, ``column``, which are ``rows`` (int64), ``at``, from its tile of z, and of
    ``up`` where gated: dz, h and its row of sums, each if it is given."""
    width = 2 * F if GATED else F
    inside = (rows < M)[:, None] & (at < F)[None, :]
    kept = keeps(rows, at, F, seed, stream, p, DROP)
    dh = tl.where(inside, drop(c * dh, kept, scale, DROP), 0.0)
    value, slope = activate_backward(z.to(tl.float32), ACTIVATION, z.dtype)
    if GATED:
        up = up.to(tl.float32)
        d_up = dh * value
        value *= up
        slope *= up
        _write(d_up, dz, sums, row, F + column, rows, F + at, inside, at < F, tile_row, width, STORES)
    d = tl.where(value <= 0.0, 0.0, dh) if ACTIVATION == "relu" else dh * slope
    _write(d, dz, sums, row, column, rows, at, inside, at < F, tile_row, width, STORES)
    if h is not None:
        put(h, drop(value, kept, scale, DROP), row, column, rows, at, F, inside, STORES)


@triton.jit
def _read_z(z, rows, at, M, F, GATED: tl.constexpr):
    """``(z, up)`` of a tile; ``up`` only where gated."""
    inside = (rows < M)[:, None] & (at < F)[None, :]
    z_at = z + rows[:, None] * (2 * F if GATED else F) + at[None, :]
    value = tl.load(z_at, inside, 0.0)
    return value, tl.load(z_at + F, inside, 0.0) if GATED else value


@triton.jit(do_not_specialize=["M"])
def hidden_backward_kernel(
    g, w, z, dz, h, sums, c, M, F, K, g_stride, w_stride, seed, stream, p, scale, DROP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ALIGN: tl.constexpr, STORES: tl.constexpr, PERSISTENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A program: its share of the tiles of dh; dz, h and sums (rows of tiles, F or 2F) are each written if given."""
    F = aligned(F, ALIGN)
    if DROP and PERSISTENT:  # where there is no loop, one read for all slices costs registers
        seed = tl.load(seed)
    first, last, step = turns(M, F, BM, BN, PERSISTENT)
    finished = first - step  # where the epilogue is: nothing of a tile's place is carried through the sum
    for index in tl.range(first, last, step, flatten=PERSISTENT):
        tile_row, tile_column = tile_at(index, M, F, BM, BN, GROUP)
        row, column = tile_row * BM, tile_column * BN
        tile = product(
            g, w, row, column, M, F, 0, K, g_stride, w_stride, True, False, DESCRIPTORS, ALIGN, BM, BN, BK, PRECISION
        )
        finished += step
        tile_row, tile_column = tile_at(finished, M, F, BM, BN, GROUP)
        row, column = tile_row * BM, tile_column * BN
        parts = slices(tile, BM, BN, SLICES)
        rows = row + tl.arange(0, BM).to(tl.int64)
        at = column + tl.arange(0, BN // SLICES)
        value, up = _read_z(z, rows, at, M, F, GATED)
        for i in tl.static_range(SLICES):
            begin = column + i * (BN // SLICES)
            here, up_here, at_here = value, up, at
            if i + 1 < SLICES:  # under way while this slice is computed
                at = begin + BN // SLICES + tl.arange(0, BN // SLICES)
                value, up = _read_z(z, rows, at, M, F, GATED)
            _write_backward(
                parts[i], here, up_here, dz, h, sums, c, row, begin, rows, at_here, tile_row, M, F,
                seed, stream, p, scale, DROP, ACTIVATION, GATED, STORES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "parts"])
def backward_of_parts_kernel(
    partial, z, dz, h, sums, c, M, F, parts, seed, stream, p, scale, DROP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same from the product's parts, (parts, M, F). A program: one tile of dh."""
    tile_row, tile_column = tile_at(tl.program_id(0), M, F, BM, BN, 1)
    rows = tile_row * BM + tl.arange(0, BM).to(tl.int64)
    at = tile_column * BN + tl.arange(0, BN)
    dh = sum_of_parts(partial, parts, rows, at, M, F, (rows < M)[:, None] & (at < F)[None, :])
    value, up = _read_z(z, rows, at, M, F, GATED)
    _write_backward(
        dh, value, up, dz, h, sums, c, 0, 0, rows, at, tile_row, M, F, seed, stream, p, scale,
        DROP, ACTIVATION, GATED, False,
    )  # fmt: skip


@triton.jit
def _write(value, dz, sums, row, column, rows, at, inside, columns_inside, tile_row, width, STORES: tl.constexpr):
    """A tile of dz, and its sum over the rows."""
    if dz is not None:
        put(dz, value, row, column, rows, at, width, inside, STORES)
    if sums is not None:
        tl.store(sums + tl.cast(tile_row, tl.int64) * width + at, tl.sum(value, 0), columns_inside)


def _name(activation: str) -> dict:
    return {"ACTIVATION": ACTIVATION_OF_GATE.get(activation, activation), "GATED": activation in ACTIVATION_OF_GATE}


def _for_words(t: Tile) -> Tile:
    """With slices of 8 elements a thread at most: dropout's words lie beside them."""
    return t._replace(SLICES=max(t.slices, t.slices_of(8)))


def _tiles_of_parts(count: int) -> Tile:
    """Of the kernels that make h from what lies in memory: 16 elements a thread, fewer where there are few rows."""
    return Tile(min(power_of_2(count), 16), 128, 0, 4, 1)


def reads_h(activation: str) -> bool:
    """Whether the backward pass reads h, not z. A positive z that rounds to 0 in the dtype of h then has slope 0."""
    return activation == "relu"


def hidden_forward(
    n: Tensor, w_in: Tensor, b_in: Tensor | None, activation: str, dropout: Dropout, kept: Tensor | None, keep_h: bool
) -> Tensor | None:
    """``h (M, F)`` in the dtype of w_in, None where not wanted; ``kept``, if it is given, gets what the backward pass
    reads: z (M rows of F or 2F), or h itself."""
    gated = activation in ACTIVATION_OF_GATE
    (count, width), device = n.shape, n.device
    hidden = w_in.shape[0] // 2 if gated else w_in.shape[0]
    w = as_matrix(w_in)
    z, h = kept, None
    if reads_h(activation) and kept is not None:
        z, h = None, kept.view(count, hidden)
    elif keep_h:
        h = torch.empty((count, hidden), dtype=w.dtype, device=device)
    plan = cut("few", w.dtype, device, count, w.shape[0], width)
    if plan[1] > 1:
        partial, t = product_parts(n, w, (True, True), plan), _tiles_of_parts(count)
        launch(
            hidden_of_parts_kernel, t.count(count, hidden), device,
            partial, b_in, z, h, count, hidden, plan[1], *dropout, DROP=dropout.drops, **_name(activation),
            BM=t.BM, BN=t.BN, num_warps=t.num_warps,
        )  # fmt: skip
        return h
    t = tile("gated" if gated else "hidden", w.dtype, device, count, hidden, width)
    if dropout.drops and t.MAXNREG:
        t = _for_words(t)
    operands, constants = as_operands(n, w, t, True, True, hidden, pair=gated)
    results, stores = as_results(t, z, h, whole=hidden if gated else 0)
    launch(
        hidden_forward_kernel, t.programs(count, hidden, device), device,
        *operands, b_in, *results, count, hidden, width, n.stride(0), w.stride(0), *dropout, DROP=dropout.drops,
        **_name(activation), PRECISION=precision(w.dtype), **constants, **stores, **t.constants(),
    )  # fmt: skip
    return h


def hidden_again(z: Tensor, activation: str, dropout: Dropout) -> Tensor:
    """``h (M, F)`` from ``z (M, F or 2F)``, or from h."""
    if reads_h(activation):
        return z
    count = z.shape[0]
    hidden = z.shape[1] // 2 if activation in ACTIVATION_OF_GATE else z.shape[1]
    h = torch.empty((count, hidden), dtype=z.dtype, device=z.device)
    t = Tile(32, 128, 0, 4, 1)
    launch(
        hidden_again_kernel, t.count(count, hidden), z.device,
        z, h, count, hidden, *dropout, DROP=dropout.drops, **_name(activation), BM=t.BM, BN=t.BN, num_warps=t.num_warps,
    )  # fmt: skip
    return h


def hidden_backward(
    g: Tensor,
    w_out: Tensor,
    z: Tensor,
    c: float,
    activation: str,
    dropout: Dropout,
    *,
    need_z: bool,
    need_h: bool,
    bias: Sum | None,
    in_place: bool = False,
    later: Later | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dz (M, F or 2F), h (M, F), db_in)``, None where not needed; ``c g`` is the gradient before W_out, and ``z`` is
    h where :func:`reads_h`. With ``in_place`` z is not read again, and dz takes its place unless that is h. ``later``
    ends the sum (``sums_of``)."""
    (count, width), hidden, device = g.shape, w_out.shape[1], g.device
    if reads_h(activation):  # it is 0 where dropped
        c, dropout = c * dropout.scale, Dropout.of(0.0, None, 0)
    w = as_matrix(w_out)
    plan = cut("few", w.dtype, device, count, hidden, width)
    if plan[1] > 1:
        t = _tiles_of_parts(count)
    else:
        gated = activation in ACTIVATION_OF_GATE
        t = tile("hidden_backward", w.dtype, device, count, hidden, width)
        if dropout.drops or gated:  # the words, and a gate's derivative, want more registers than a bound leaves
            t = t._replace(MAXNREG=0)
        if dropout.drops:  # with a gate's words beside no second tile
            t = _for_words(t)._replace(PERSISTENT=t.PERSISTENT and not gated)
    dz = None
    if need_z:
        dz = z if in_place and not reads_h(activation) else torch.empty_like(z)
    h = torch.empty((count, hidden), dtype=z.dtype, device=device) if need_h and not reads_h(activation) else None
    sums = None
    if bias is not None:
        sums = torch.empty((ceil_div(count, t.BM), z.shape[1]), dtype=torch.float32, device=device)
    if plan[1] > 1:
        partial = product_parts(g, w, (True, False), plan)
        launch(
            backward_of_parts_kernel, t.count(count, hidden), device,
            partial, z, dz, h, sums, c, count, hidden, plan[1], *dropout, DROP=dropout.drops, **_name(activation),
            BM=t.BM, BN=t.BN, num_warps=t.num_warps,
        )  # fmt: skip
    else:
        operands, constants = as_operands(g, w, t, True, False, hidden)
        results, stores = as_results(t, dz, h, whole=hidden if activation in ACTIVATION_OF_GATE else 0)
        launch(
            hidden_backward_kernel, t.programs(count, hidden, device), device,
            *operands, z, *results, sums, c, count, hidden, width, g.stride(0), w.stride(0),
            *dropout, DROP=dropout.drops,
            **_name(activation), PRECISION=precision(w.dtype), **constants, **stores, **t.constants(),
        )  # fmt: skip
    return dz, z if need_h and reads_h(activation) else h, *sums_of([sums], [bias], later)
