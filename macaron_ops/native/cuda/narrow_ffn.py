"""``ffn_step`` where x is narrow: ``csrc/cuda/ffn_step.cu`` and ``ffn_step_backward.cu``.

Backward, one kernel computes what belongs to a row; the gradients of weights are torch's products over the rows, the
rest of the way to x is :mod:`norm_rows`. Nothing is kept between the passes, whatever ``save`` allows: the hidden
activations of a narrow x are computed again, a third of the kernel's products.
"""

import torch
from torch import Tensor

from .library import why_not_shared
from .norm_rows import NORMS, norm_rows, norm_rows_backward

__all__ = ["WIDEST", "backward", "detail", "forward", "why_not"]

WIDEST = 256  # channels of y that a warp keeps in registers
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
BACKWARD_SHARED = {64: 32 << 10, 128: 64 << 10, 256: 128 << 10}  # bytes; forward takes less than 99 KiB
_ops = torch.ops.macaron_ops_cuda


def why_not(request) -> str | None:
    x = request.x
    needed = next(size for most, size in BACKWARD_SHARED.items() if x.shape[-1] <= most)
    return why_not_shared(x.device, needed) if request.save != "none" else None


def detail(request) -> str:
    return "one kernel a pass"


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Tensor]:
    """y, shape and dtype of x, and nothing."""
    t, o = tensors, options
    parameters = (t.w_in, t.b_in, t.w_out, t.b_out, t.norm_weight, t.norm_bias)
    y = _ops.ffn_step_forward(x, *parameters, *_encoded(o), o.step, o.residual_scale)
    return y, x.new_empty(0)


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, hidden: Tensor, options):
    """The gradients in x and in the tensors, None where not needed."""
    t, o, need_x, need = tensors, options, needs[0], type(tensors)(*needs[1:])
    of_norm = (need_x, need.norm_weight, need.norm_bias)
    parameters = (t.w_in, t.b_in, t.w_out, t.norm_weight, t.norm_bias)
    activated, grad_hidden, grad_n = _ops.ffn_step_backward(
        grad, x, *parameters, *_encoded(o), o.step, need.w_out, need.w_in or need.b_in, any(of_norm)
    )
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    dy, flat = grad.reshape(rows, width), x.reshape(rows, width)
    grads = dict.fromkeys(t._fields)
    if need.w_out:
        grads["w_out"] = dy.T @ activated
    if need.b_out:
        grads["b_out"] = o.step * dy.sum(0, dtype=torch.float32)
    if need.w_in:
        n = flat if o.norm is None else norm_rows(flat, None, o.norm, t.norm_weight, t.norm_bias, o.eps)[0]
        grads["w_in"] = grad_hidden.T @ n
    if need.b_in:
        grads["b_in"] = grad_hidden.sum(0, dtype=torch.float32)
    if not any(of_norm):
        return None, type(t)(**grads)
    if o.norm is None:
        return torch.add(grad_n, dy, alpha=o.residual_scale).view(x.shape), type(t)(**grads)
    grad_x, grads["norm_weight"], grads["norm_bias"] = norm_rows_backward(
        grad_n, flat, o.norm, t.norm_weight, o.eps, of_norm, residual=dy, residual_scale=o.residual_scale
    )
    return None if grad_x is None else grad_x.view(x.shape), type(t)(**grads)


def _encoded(options) -> tuple:
    o = options
    return -1 if o.norm is None else NORMS.index(o.norm), o.eps, ACTIVATIONS.index(o.activation)
