"""``sphere_attend_step``: particles on the unit sphere attend to each other, step and return, forward and backward.

    u_i = sum_j w_ij v_j,    w_ij = e_ij / total_i,    e_ij = 2^(t_ij - shift_i),    t_ij = beta log2(e) <q_i, k_j>
    y_i = S(x_i + step v(x_i, u_i))    as normalize_step

softmax: shift_i = max_j t_ij, total_i = sum_j e_ij; unnormalized: shift_i alike, total_i = m 2^-shift_i.

forward     one kernel: the online softmax over blocks of keys, its epilogue the step
backward    dx past the attention, g_i = du_i / total_i, d_i = <g_i, u_i>, dstep     a row kernel
            of points among themselves all the rest                                  one pass over pairs, in bfloat16
            else dq, dbeta, d_i settled                                              a pass with rows of queries
            dk, dv                                                                   a pass with rows of keys

u, shift and total are kept for it: O(n). Forward takes 4 n m D FLOP and n m exponentials; backward 10 n^2 D and n^2 in
one pass, else 14 n m D (18 where q, k or v is given or beta learned) and 2 (3) n m: arithmetic is the limit, and memory
is linear. What is not needed is not computed. With 16-bit operands matrix products run on tensor cores and e_ij and
a_ij are rounded on their way into one, as in flash attention; a few channels of float32 are summed in registers
(``sphere_narrow.py``).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .device import ceil_div, launch, power_of_2, why_not_on
from .product import precision
from .rows import row_tiles
from .sphere_backward import wide_keys_kernel, wide_queries_kernel
from .sphere_forward import wide_forward_kernel
from .sphere_narrow import narrow_forward_kernel, narrow_keys_kernel, narrow_queries_kernel
from .sphere_points import wide_points_kernel
from .sphere_rows import rows_backward_kernel
from .sphere_tiles import channels_of, sphere_tile
from .step import STEP_CHANNELS, step_kind
from .sums import Sum, sums_of

__all__ = ["Saved", "backward", "forward", "saved_shapes", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256
TOGETHER = 128  # channels: beyond, the sums of dk and dv are more than the registers, and each has a pass of its own


class Saved(NamedTuple):
    """What the backward pass forms the weights from, and where they led; empty with ``save="none"``. All float32."""

    u: Tensor  # (..., n, D)
    shift: Tensor  # (..., n)
    total: Tensor  # (..., n)


def why_not(request) -> str | None:
    x, query = request.x, request.tensors.query
    if x.dtype not in DTYPES:
        return f"it runs float32, bfloat16 and float16, not {x.dtype}"
    widest = max(x.shape[-1], 0 if query is None else query.shape[-1])
    if widest > WIDEST:
        return f"its points have at most {WIDEST} channels, not {widest}"
    return why_not_on(x.device)


def saved_shapes(x: Tensor, tensors, options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    keep = save != "none"
    rows = x.shape[:-1] if keep else (0,)
    return Saved((x.shape if keep else (0,), torch.float32), (rows, torch.float32), (rows, torch.float32))


class _Particles(NamedTuple):
    """The points without gaps, and what every pass is told of them."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    batch: int
    queries: int
    keys: int
    width: int
    channels: int
    same: bool  # keys and values are one tensor

    @classmethod
    def of(cls, x: Tensor, tensors) -> "_Particles":
        x = x.contiguous()
        q, k, v = (x if t is None else t.contiguous() for t in (tensors.query, tensors.key, tensors.value))
        *batch, n, width = x.shape
        same = tensors.key is tensors.value
        return cls(x, q, k, v, torch.Size(batch).numel(), n, k.shape[-2], width, q.shape[-1], same)

    def launch(self, name: str, kernels: tuple, owners: int, *arguments, **constants) -> None:
        """A pass over pairs by the wide or the narrow kernel: one program for every block of owners."""
        dtype, device = self.x.dtype, self.x.device
        narrow, channels = channels_of(self.width, self.channels, dtype)
        s = sphere_tile(name, narrow, channels, dtype, device, self.batch, owners)
        if not narrow:
            constants |= {"BE": max(power_of_2(self.channels), 16), "PRECISION": precision(dtype)}
        if not narrow or name == "forward":
            constants["BD"] = max(power_of_2(self.width), 2 if narrow else 16)
        if s.MAXNREG:
            constants["maxnreg"] = s.MAXNREG
        launch(
            kernels[narrow], self.batch * ceil_div(owners, s.BM), device,
            *arguments, self.queries, self.keys, D=self.width, E=self.channels, **constants,
            BM=s.BM, BN=s.BN, num_warps=s.num_warps, num_stages=s.num_stages,
        )  # fmt: skip

    def fixed(self) -> bool:
        """Whether one shift serves scores of any point (``sphere_forward.py``), which in float16 would leave nothing of
        the weights of a row whose scores are low, and of a large total."""
        narrow, _ = channels_of(self.width, self.channels, self.x.dtype)
        return self.q is self.x and self.k is self.x and (narrow or self.x.dtype == torch.bfloat16)


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Saved]:
    """y, shape and dtype of x, and what ``save`` keeps."""
    o = options
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = Saved(*(torch.empty(shape, dtype=d, device=x.device) for shape, d in saved_shapes(x, tensors, o, save)))
    if x.numel() == 0:
        return y, saved
    p = _Particles.of(x, tensors)
    kept = (None, None, None) if save == "none" else saved
    step = None if tensors.step_tensor is None else tensors.step_tensor.contiguous()
    p.launch(
        "forward", (wide_forward_kernel, narrow_forward_kernel), p.queries,
        p.x, p.q, p.k, p.v, y, *kept, tensors.beta_tensor, o.beta, step, o.step, o.eps,
        SAME=p.same, CAUSAL=o.causal, FIXED=p.fixed(), SOFTMAX=o.weighting == "softmax",
        DIRECTION=o.direction, STEP=step_kind(tensors.step_tensor),
    )  # fmt: skip
    return y, saved


class _Wanted(NamedTuple):
    """Which gradients the passes over pairs are for: of query, key and value, whether given or x, and of beta."""

    q: bool
    k: bool
    v: bool
    beta: bool

    @classmethod
    def of(cls, need_x: bool, need, t, softmax: bool, keys: int) -> "_Wanted":
        q, k, v = (need_x if given is None else wanted for given, wanted in zip(t[:3], need[:3], strict=True))
        if softmax and keys == 1:  # its weight is 1 whatever its score
            return cls(False, False, v, False)
        return cls(q, k, v, need.beta_tensor)


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options):
    """The gradients in x and in the tensors, None where not needed."""
    need_x, t, o = needs[0], tensors, options
    need = type(t)(*needs[1:])
    if x.numel() == 0:
        zeros = (torch.zeros_like(v) if n else None for v, n in zip(t, need, strict=True))
        return torch.zeros_like(x) if need_x else None, type(t)(*zeros)
    p, softmax = _Particles.of(x, t), o.weighting == "softmax"
    wanted = _Wanted.of(need_x, need, t, softmax, p.keys)
    grad_x = g = offset = None
    if need_x:  # in float32 while terms are added to it
        attends = any(given is None for given in t[:3])
        grad_x = torch.empty(x.shape, dtype=torch.float32 if attends else x.dtype, device=x.device)
    if any(wanted):
        g = torch.empty_like(p.x)
        offset = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    apart = None
    if _at_one_look(p, t, o, wanted):
        apart = torch.zeros((), dtype=torch.int32, device=x.device)
    by_step = _through_the_move(grad.contiguous(), p, t, saved, o, grad_x, g, offset if softmax else None, apart, need)
    slopes = torch.empty_like(offset) if wanted.beta else None
    if apart is not None:
        _points_pass(p, t, saved, o, g, offset if softmax else None, apart, grad_x, slopes)
    grads = [
        grad_x if given is None else torch.empty_like(own) if n else None
        for given, own, n in zip(t[:3], p[1:4], wanted[:3], strict=True)
    ]
    _queries_pass(p, t, saved, o, g, offset, apart, grads[0], slopes, wanted)
    _keys_pass(p, t, saved, o, g, offset, apart, *grads[1:], wanted)
    by_beta = None if slopes is None else slopes.sum(dtype=torch.float64)  # of numbers that cancel
    of_given = [
        None if not n else torch.zeros_like(given) if found is None else found
        for given, found, n in zip(
            (*t[:3], t.beta_tensor), (*grads, by_beta), (*need[:3], need.beta_tensor), strict=True
        )
    ]
    return grad_x, type(t)(*of_given[:3], by_step, of_given[3])


def _at_one_look(p: _Particles, t, o, wanted: _Wanted) -> bool:
    """Whether ``wide_points_kernel`` does the passes over pairs, if no row is apart."""
    alone = all(given is None for given in t[:3]) and not o.causal
    return alone and wanted.q and p.x.dtype == torch.bfloat16 and p.width <= TOGETHER


def _through_the_move(grad: Tensor, p: _Particles, t, saved: Saved, o, grad_x, g, offset, apart, need) -> Tensor | None:
    """Writes dx past the attention, g, d and apart, each if given; returns dstep if needed."""
    rows, tiles, kind = p.batch * p.queries, row_tiles(p.width), step_kind(t.step_tensor)
    programs = tiles.programs(rows, p.x.device)
    partial = None
    if need.step_tensor:
        shape = (programs, p.width) if kind == STEP_CHANNELS.value else (programs,)
        partial = torch.empty(shape, dtype=torch.float32, device=p.x.device)
    step = None if t.step_tensor is None else t.step_tensor.contiguous()
    launch(
        rows_backward_kernel, programs, p.x.device,
        grad, p.x, saved.u, saved.shift, saved.total, grad_x, g, offset, apart, partial, step, o.step, o.eps,
        rows, p.queries,
        D=p.width, DIRECTION=o.direction, STEP=kind, ROWS=tiles.ROWS, BLOCK=tiles.BLOCK, num_warps=tiles.num_warps,
    )  # fmt: skip
    return sums_of([partial], [Sum(torch.float32) if need.step_tensor else None])[0]


def _points_pass(p: _Particles, t, saved: Saved, o, g, offset, apart, grad_x, slopes) -> None:
    """dx and dbeta in one pass, unless some rows are apart."""
    s = sphere_tile("points", False, p.width, p.x.dtype, p.x.device, p.batch, p.queries)
    launch(
        wide_points_kernel, p.batch * ceil_div(p.queries, s.BM), p.x.device,
        p.x, g, saved.shift, offset, apart, grad_x, slopes, t.beta_tensor, o.beta, p.queries,
        D=p.width, PRECISION=precision(p.x.dtype), BM=s.BM, BN=s.BN, BD=max(power_of_2(p.width), 16),
        num_warps=s.num_warps, num_stages=s.num_stages, **({"maxnreg": s.MAXNREG} if s.MAXNREG else {}),
    )  # fmt: skip


def _queries_pass(p: _Particles, t, saved: Saved, o, g, offset, apart, grad_q, slopes, wanted: _Wanted) -> None:
    """dq, settled d; the terms of dbeta if wanted."""
    softmax = o.weighting == "softmax"
    if not (wanted.q or wanted.beta or (wanted.k and softmax)):
        return
    itself = p.same and t.query is None and t.key is None
    settle = "none" if not softmax else "after" if itself and wanted.q and not wanted.beta else "before"
    p.launch(
        "queries", (wide_queries_kernel, narrow_queries_kernel), p.queries,
        p.q, p.k, p.v, g, *saved, offset, apart, grad_q if wanted.q else None, slopes, t.beta_tensor, o.beta,
        SAME=p.same, CAUSAL=o.causal, SETTLE=settle, NEED_Q=wanted.q or wanted.beta, ADD=t.query is None,
    )  # fmt: skip


def _keys_pass(p: _Particles, t, saved: Saved, o, g, offset, apart, grad_k, grad_v, wanted: _Wanted) -> None:
    """dk and dv, in one pass or two."""
    each = max(p.width, p.channels) > TOGETHER
    for k, v in ((wanted.k, False), (False, wanted.v)) if each else ((wanted.k, wanted.v),):
        if k or v:
            p.launch(
                "keys", (wide_keys_kernel, narrow_keys_kernel), p.keys,
                p.q, p.k, p.v, g, saved.shift, offset, apart, grad_k, grad_v, t.beta_tensor, o.beta,
                CAUSAL=o.causal, NEED_K=k, NEED_V=v, ADD_K=t.key is None, ADD_V=t.value is None,
            )  # fmt: skip
