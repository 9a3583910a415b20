"""``ffn_step`` in CUDA C++ where x is narrow, in 16 bits, forward alone: ``csrc/cuda/ffn_step.cu``."""

import torch
from torch import Tensor

from macaron_ops.reference.ffn_step import Saved, saved_shapes

from .library import untimed as slower
from .library import why_not_on
from .norm_rows import NORMS

__all__ = ["Saved", "backward", "forward", "saved_shapes", "slower", "why_not"]

WIDEST = 256  # channels of y that a warp keeps in registers
CHUNK = 8  # channels that are copied at a time, 16 bytes
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_ops = torch.ops.macaron_ops_cuda


def why_not(request) -> str | None:
    x, t, o = request.x, request.tensors, request.options
    width, hidden = x.shape[-1], t.w_in.shape[0]
    if request.save != "none":
        return "its ffn_step has no backward pass: it runs where no gradient is to come"
    if x.dtype not in (torch.bfloat16, torch.float16) or t.w_in.dtype != x.dtype:
        return f"its ffn_step runs bfloat16 and float16, not x in {x.dtype} with weights in {t.w_in.dtype}"
    if width > WIDEST or width % CHUNK or hidden % CHUNK:
        return f"its ffn_step takes D <= {WIDEST}, D and F multiples of {CHUNK}; not D = {width}, F = {hidden}"
    if o.activation not in ACTIVATIONS:
        return f"its ffn_step has the activations {', '.join(ACTIVATIONS)}; not {o.activation}"
    if o.placement != "pre":
        return "its ffn_step normalises before, not after"
    if o.dropout or o.activation_dropout:
        return "its ffn_step has no dropout"
    return why_not_on(x.device)


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Saved]:
    """y, shape and dtype of x, and nothing that is saved."""
    t, o = tensors, options
    norm = -1 if o.norm is None else NORMS.index(o.norm)
    activation = ACTIVATIONS.index(o.activation)
    parameters = (t.w_in, t.b_in, t.w_out, t.b_out, t.norm_weight, t.norm_bias)
    y = _ops.ffn_step_forward(x, *parameters, norm, o.eps, activation, o.step, o.residual_scale)
    return y, Saved(t.w_in.new_empty(0), x.new_empty(0))


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options):
    raise NotImplementedError("ffn_step: the backend cuda has no backward pass")
