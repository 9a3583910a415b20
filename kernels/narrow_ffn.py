"""The FFN step in ONE kernel where x is narrow (D <= 128, float32: 64): the hidden activations never leave the chip.

    y = a x + c drop(W_out drop_h(act(W_in N(x) + b_in)) + b_out),    or N(...) of that sum (post placement), or both
                                                                      with the N of the next substep (``border``)

A program keeps BM rows: x, N(x) and the (BM, D) accumulator stay in registers and shared memory while W_in and W_out
pass by in blocks of BN hidden channels, from L2: they are read M / BM times, x and y move once. 4 M D F FLOP (6 where
gated). Two kernels would write and read h: 2 M F numbers, at D = 64 more time than the products take. For a backward
pass with ``save="fast"`` the pre-activations, with relu h, are written from here.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATION_OF_GATE, activate
from .device import ceil_div, launch, power_of_2
from .dropout import Dropout, drop, keeps
from .emulation import dot, rounded
from .linear_residual import NO_NORM, Norm
from .norm import affine, standardize
from .product import as_matrix, precision
from .rows import Rows, aligned, alignment, offsets
from .slices import drop_by_slices, slices
from .tiles import tile

__all__ = ["NARROW", "narrow_ffn"]

# Channels, by the bytes of an operand: beside (BM, D) accumulators and a block of hidden activations registers must be
# left; float32 without tensor cores holds its operands in registers too.
NARROW = {2: 128, 4: 64}


@triton.jit
def _keep(value, z, rows, columns, M, F, z_stride):
    """Writes a block for the backward pass, if there will be one."""
    if z is not None:
        z_at = z + rows.to(tl.int64)[:, None] * z_stride + columns[None, :]
        tl.store(z_at, rounded(value, z.dtype.element_ty), (rows < M)[:, None] & (columns < F)[None, :])


@triton.jit
def _hidden_block(n, w, b, rows, columns, inside, at, M, F, z, z_stride, PRECISION: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The pre-activations (BM, BN) of one block of W_in's rows, written to z if it is given; ``at`` points into w."""
    value = dot(n, tl.load(at, inside, 0.0), tl.zeros((BM, BN), tl.float32), PRECISION)
    if b is not None:
        value += tl.load(b + columns, columns < F, 0.0).to(tl.float32)[None, :]
    _keep(value, z, rows, columns, M, F, z_stride)
    return value


@triton.jit(do_not_specialize=["M"])
def narrow_ffn_kernel(
    x, weight, bias, w_in, b_in, w_out, b_out, y, z, total, after_weight, after_bias, a, c, eps, after_eps, M, F,
    x_inner, x_outer, x_stride,
    in_stride, out_stride,
    h_seed, h_stream, h_p, h_scale, seed, stream, p, scale, H_DROP: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr, OF_TOTAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: BM rows of y; BK is D rounded up to a power of 2. y, z and total are contiguous."""
    x_outer, x_stride, F = aligned(x_outer, ALIGN), aligned(x_stride, ALIGN), aligned(F, ALIGN)
    in_stride, out_stride = aligned(in_stride, ALIGN), aligned(out_stride, ALIGN)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    channels = tl.arange(0, BK)
    inside = (rows < M)[:, None] & (channels < D)[None, :]
    x_at = offsets(rows.to(tl.int64), x_inner, x_outer, x_stride, 1)[:, None] + channels[None, :]
    n = tl.load(x + x_at, inside, 0.0).to(tl.float32)
    if NORM != "none":
        n, _, _ = standardize(n, inside, eps, D, NORM)
        n = affine(n, weight, bias, channels, D)
    n = rounded(n, w_in.dtype.element_ty)
    if H_DROP:
        h_seed = tl.load(h_seed)
    u = tl.zeros((BM, BK), tl.float32)
    z_width = 2 * F if GATED else F
    for start in range(0, tl.maximum(F, 1), BN):  # once at least: see product.py
        columns = start + tl.arange(0, BN)
        w_inside = (channels < D)[:, None] & (columns < F)[None, :]
        at = w_in + (channels[:, None] + columns.to(tl.int64)[None, :] * in_stride)
        first_z = None if ACTIVATION == "relu" else z
        h = _hidden_block(n, w_in, b_in, rows, columns, w_inside, at, M, F, first_z, z_width, PRECISION, BM, BN)
        h = activate(h, ACTIVATION, w_in.dtype.element_ty)
        if GATED:
            up_b = None if b_in is None else b_in + F
            up_z = None if z is None else z + F
            at += tl.cast(F, tl.int64) * in_stride
            h *= _hidden_block(n, w_in, up_b, rows, columns, w_inside, at, M, F, up_z, z_width, PRECISION, BM, BN)
        h = drop_by_slices(h, rows, start, F, h_seed, h_stream, h_p, h_scale, H_DROP, BM, BN)
        if ACTIVATION == "relu":
            _keep(h, z, rows, columns, M, F, F)
        out_at = w_out + (columns[:, None] + channels.to(tl.int64)[None, :] * out_stride)
        w = tl.load(out_at, (columns < F)[:, None] & (channels < D)[None, :], 0.0)
        u = dot(rounded(h, w.dtype), w, u, PRECISION)
    if AFTER != "none":
        _write_whole_rows(
            u, x, x_inner, x_outer, x_stride, b_out, after_weight, after_bias, y, total, a, c, after_eps, rows, M,
            seed, stream, p, scale, DROP, D, AFTER, OF_TOTAL, BM, BK,
        )  # fmt: skip
    else:
        parts = slices(u, BM, BK, SLICES)
        for i in tl.static_range(SLICES):
            at = i * (BK // SLICES) + tl.arange(0, BK // SLICES)
            part = c * drop(_biased(parts[i], b_out, at, D), keeps(rows, at, D, seed, stream, p, DROP), scale, DROP)
            _add_and_write(part, x, x_inner, x_outer, x_stride, y, a, rows, at, M, D)


@triton.jit
def _biased(u, b, columns, N):
    if b is not None:
        u += tl.load(b + columns, columns < N, 0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def _plus_residual(u, x, x_inner, x_outer, x_stride, a, rows, columns, inside):
    """``u + a x``: x is read again, because it would have taken a register an element through the whole loop."""
    at = offsets(rows.to(tl.int64), x_inner, x_outer, x_stride, 1)[:, None] + columns[None, :]
    return u + a * tl.load(x + at, inside, 0.0).to(tl.float32)


@triton.jit
def _add_and_write(u, x, x_inner, x_outer, x_stride, y, a, rows, columns, M, D: tl.constexpr):
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    u = _plus_residual(u, x, x_inner, x_outer, x_stride, a, rows, columns, inside)
    tl.store(y + rows.to(tl.int64)[:, None] * D + columns[None, :], rounded(u, y.dtype.element_ty), inside)


@triton.jit
def _write_whole_rows(
    u, x, x_inner, x_outer, x_stride, b_out, weight, bias, y, total, a, c, eps, rows, M,
    seed, stream, p, scale, DROP: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, OF_TOTAL: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The sum, written to total if it is given, and its normalisation, written to y."""
    columns = tl.arange(0, BK)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    u = c * drop_by_slices(_biased(u, b_out, columns, D), rows, 0, D, seed, stream, p, scale, DROP, BM, BK)
    u = _plus_residual(u, x, x_inner, x_outer, x_stride, a, rows, columns, inside)
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    if total is not None:
        as_written = rounded(u, total.dtype.element_ty)
        tl.store(total + at, as_written, inside)
        if OF_TOTAL:
            u = as_written.to(tl.float32)
    u, _, _ = standardize(tl.where(inside, u, 0.0), inside, eps, D, NORM)
    tl.store(y + at, rounded(affine(u, weight, bias, columns, D), y.dtype.element_ty), inside)


def narrow_ffn(
    x: Rows,
    tensors,
    options,
    hidden_dropout: Dropout,
    dropout: Dropout,
    y: Tensor,
    z: Tensor | None,
    norm: Norm | None,
) -> None:
    """Writes ``y (..., D)``, the sum or its ``norm``, and for the backward pass ``z (..., F or 2F)``, if given."""
    t, o, after = tensors, options, norm or NO_NORM
    before = ("none", None, None) if o.placement == "post" or o.norm is None else (o.norm, t.norm_weight, t.norm_bias)
    width, hidden = x.tensor.shape[-1], t.w_out.shape[1]
    w_in, w_out = as_matrix(t.w_in), as_matrix(t.w_out)
    block = max(power_of_2(width), 16)
    drops = hidden_dropout.drops or dropout.drops
    s = tile("narrow_dropout" if drops else "narrow", w_in.dtype, y.device, x.count, block, hidden)
    launch(
        narrow_ffn_kernel, ceil_div(x.count, s.BM), y.device,
        x.tensor, *before[1:], w_in, t.b_in, w_out, t.b_out, y, z, after.total, after.weight, after.bias,
        o.residual_scale, o.step, o.eps, after.eps, x.count, hidden, *x[2:], w_in.stride(0), w_out.stride(0),
        *hidden_dropout, *dropout, H_DROP=hidden_dropout.drops, DROP=dropout.drops,
        D=width, NORM=before[0], AFTER=after.name, OF_TOTAL=after.of_total,
        ACTIVATION=ACTIVATION_OF_GATE.get(o.activation, o.activation), GATED=o.activation in ACTIVATION_OF_GATE,
        PRECISION=precision(w_in.dtype), BM=s.BM, BN=s.BN, BK=block, SLICES=min(block // 16, 8),
        ALIGN=alignment(*x[3:], w_in.stride(0), w_out.stride(0), hidden),
        num_warps=s.num_warps, num_stages=s.num_stages,
    )  # fmt: skip
