"""``ffn_step`` where x is wide, on Hopper: products by CUTLASS with their epilogues, ``csrc/cuda/sm90``.

    forward     n = N(x)                                        a row kernel
                z = n W_in^T + b_in, h = act(z)                 one product with its epilogue
                y = a x + c (h W_out^T + b_out)                 another
    backward    dz = c (dy W_out) act'(z), h again, db_in       one product; relu has h and needs no z
                dW_out = c dy^T h,  dW_in = dz^T n,  dn = dz W_in   bare products, cuBLAS's
                dx = dN(dn) + a dy, norm's parameters           a row kernel

n is computed again in the backward pass, z only with ``save="lean"``.
"""

import torch
from torch import Tensor

from .library import TRITON, why_not_wgmma
from .norm_rows import norm_rows, norm_rows_backward
from .rows import why_not_width

__all__ = ["backward", "detail", "forward", "slower", "variant", "why_not"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")  # the order of csrc/cuda/operators.h
_ops = torch.ops.macaron_ops_cuda


def why_not(request) -> str | None:
    x, hidden = request.x, request.tensors.w_in.shape[0]
    if hidden == 0:
        return "its wide ffn_step has at least 8 hidden channels"
    why = why_not_wgmma(x.device)
    if why is not None:
        return f"its ffn_step of more than 256 channels is products by CUTLASS for sm_90a: {why}"
    return None if request.options.norm is None else why_not_width(x.shape[-1], x.dtype)


def slower(request) -> str | None:
    """By bench/results/2026-11-26-nvidia-h200-ops-ffn-cuda.json; F = 2048 is 0.97 and 1.19, a layer with gelu 1.21."""
    if not TRITON:
        return None
    return "with relu, D = 1024 and F = 4096 an H200 takes 1.08 times Triton's time in training, 0.97 forward"


def detail(request) -> str:
    return "products by CUTLASS with their epilogues"


# Which of the tiles of csrc/cuda/sm90/product.h, and how many of them neighbours take in turn: an H200's medians for
# bf16, relu and gelu, 16384 tokens, D of 512, 768 and 1024, and 512 tokens at D = 1024, F = 4096
# (bench/results/2026-11-26-nvidia-h200-ffn-tiles.json, by `python -m macaron_ops.bench.ffn_tiles`). Other activations
# take gelu's.
_FEW = 132  # of fewer tiles of 128 x 128, halves keep more of an H100's processors busy
_DEEP = 1024  # terms from which on the products of a tile hide an epilogue of few instructions
LARGE, WIDE, HALF = (0, 1), (2, 4), (3, 4)


def variant(product: str, rows: int, columns: int, depth: int, activation: str = "relu") -> tuple[int, int]:
    """The tile that a product's out (rows, columns), sums of ``depth`` terms, is made of, and how many neighbours take
    in turn."""
    if -(-rows // 128) * -(-columns // 128) <= _FEW:
        return 3, 1
    hides = depth >= _DEEP or activation == "relu"
    if product == "hidden":
        return LARGE if hides else WIDE
    if product == "backward":
        return LARGE if depth >= _DEEP and activation == "relu" else HALF
    return LARGE


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Tensor]:
    """y, shape and dtype of x, and z, of relu h, if ``save`` keeps it."""
    t, o, keep = tensors, options, save == "fast"
    flat = x.reshape(-1, x.shape[-1])
    h, z = _hidden(_normalized(flat, t, o), t, o, keep and not _reads_h(o))
    y = _ops.ffn_residual(
        h, t.w_out, t.b_out, flat, o.residual_scale, o.step, *variant("residual", *flat.shape, h.shape[1])
    )
    kept = (h if _reads_h(o) else z).view(*x.shape[:-1], h.shape[1]) if keep else x.new_empty(0)
    return y.view(x.shape), kept


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, hidden: Tensor, options):
    """The gradients in x and in the tensors, None where not needed; ``hidden`` is what forward kept."""
    t, o, need_x, need = tensors, options, needs[0], type(tensors)(*needs[1:])
    width, length = x.shape[-1], t.w_in.shape[0]
    flat, dy = x.reshape(-1, width), grad.reshape(-1, width)
    of_norm = (need_x, need.norm_weight, need.norm_bias)
    need_dn = any(of_norm)
    lean = hidden.numel() == 0 and len(flat) > 0
    grads = dict.fromkeys(t._fields)

    n = _normalized(flat, t, o) if need.w_in or lean else None
    z, h = hidden.view(len(flat), length) if not lean else None, None
    if lean:
        h, z = _hidden(n, t, o, not _reads_h(o))
    if _reads_h(o):
        z = h = z if h is None else h
    if need_dn or need.w_in or need.b_in or (need.w_out and h is None):
        dz, again, sums = _ops.ffn_hidden_backward(
            dy, t.w_out, z, ACTIVATIONS.index(o.activation), o.step, need.w_out and h is None, need.b_in,
            *variant("backward", len(flat), length, width, o.activation),
        )  # fmt: skip
        h = again if h is None else h
        grads["b_in"] = sums[:, :length].sum(0) if need.b_in else None
    if need.w_out:
        grads["w_out"] = _scaled(dy.T, h, o.step)
    if need.b_out:
        grads["b_out"] = o.step * dy.sum(0, dtype=torch.float32)
    if need.w_in:
        grads["w_in"] = dz.T @ n
    if not need_dn:
        return None, type(t)(**grads)
    if o.norm is None:
        return torch.addmm(dy, dz, t.w_in, beta=o.residual_scale).view(x.shape), type(t)(**grads)
    grad_x, grads["norm_weight"], grads["norm_bias"] = norm_rows_backward(
        dz @ t.w_in, flat, o.norm, t.norm_weight, o.eps, of_norm, residual=dy, residual_scale=o.residual_scale
    )
    return None if grad_x is None else grad_x.view(x.shape), type(t)(**grads)


def _reads_h(options) -> bool:
    """Whether the backward pass reads h, not z. A positive z that rounds to 0 has slope 0 then."""
    return options.activation == "relu"


def _normalized(flat: Tensor, tensors, options) -> Tensor:
    t, o = tensors, options
    if o.norm is None:
        return flat
    return norm_rows(flat, None, o.norm, t.norm_weight, t.norm_bias, o.eps)[0]


def _hidden(n: Tensor, tensors, options, keep: bool) -> tuple[Tensor, Tensor]:
    """h (M, F), and z if it is to be kept."""
    t = tensors
    chosen = variant("hidden", len(n), *t.w_in.shape, options.activation)
    return _ops.ffn_hidden(n, t.w_in, t.b_in, ACTIVATIONS.index(options.activation), keep, *chosen)


def _scaled(left: Tensor, right: Tensor, c: float) -> Tensor:
    """``c left right``, rounded once."""
    product = left.new_empty((left.shape[0], right.shape[1]))
    return torch.addmm(product, left, right, beta=0, alpha=c, out=product)
