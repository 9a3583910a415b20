"""``ffn_step`` in CUDA C++, in 16 bits: a narrow x in one kernel a pass (:mod:`narrow_ffn`), a wide one on Hopper as
products with their epilogues (:mod:`wide_ffn`)."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import narrow_ffn, wide_ffn
from .library import untimed, why_not_on

__all__ = ["Saved", "backward", "detail", "forward", "saved_shapes", "slower", "why_not"]

CHUNK = 8  # channels that are copied at a time, 16 bytes
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


class Saved(NamedTuple):
    """What the backward pass may find."""

    hidden: Tensor  # fast, wide: the pre-activations (..., F), relu h itself, in the dtype of w_in; else empty


def _kernels(x: Tensor) -> ModuleType:
    return narrow_ffn if x.shape[-1] <= narrow_ffn.WIDEST else wide_ffn


def saved_shapes(x: Tensor, tensors, options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    fast = save == "fast" and _kernels(x) is wide_ffn
    return Saved(((*x.shape[:-1], tensors.w_in.shape[0]) if fast else (0,), tensors.w_in.dtype))


def why_not(request) -> str | None:
    x, t, o = request.x, request.tensors, request.options
    width, hidden = x.shape[-1], t.w_in.shape[0]
    if x.dtype not in (torch.bfloat16, torch.float16) or t.w_in.dtype != x.dtype:
        return f"its ffn_step runs bfloat16 and float16, not x in {x.dtype} with weights in {t.w_in.dtype}"
    if o.activation not in ACTIVATIONS:
        return f"its ffn_step has the activations {', '.join(ACTIVATIONS)}; not {o.activation}"
    if width % CHUNK or hidden % CHUNK:
        return f"its ffn_step takes D and F that are multiples of {CHUNK}; not D = {width}, F = {hidden}"
    if o.placement != "pre":
        return "its ffn_step normalises before, not after"
    if o.dropout or o.activation_dropout:
        return "its ffn_step has no dropout"
    return why_not_on(x.device) or _kernels(x).why_not(request)


def slower(request) -> str | None:
    """Why the next backend is taken where none was asked for."""
    return wide_ffn.slower(request) if _kernels(request.x) is wide_ffn else untimed(request)


def detail(request) -> str:
    """How it would run a request that it can run."""
    return _kernels(request.x).detail(request)


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Saved]:
    """y, shape and dtype of x, and what ``save`` keeps."""
    y, hidden = _kernels(x).forward(x, tensors, options, save)
    return y, Saved(hidden)


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options):
    """The gradients in x and in the tensors, None where not needed."""
    return _kernels(x).backward(grad, needs, x, tensors, saved.hidden, options)
