"""The raw operators' arguments on the meta device, for tests that look at launches."""

import torch

from macaron_ops.reference.ffn_step import Options, Tensors

__all__ = ["ffn_arguments", "launches_of_ffn"]

NEEDS = (True,) * 7 + (False,)  # x and every tensor but the seed


def ffn_arguments(tokens, width, hidden, dtype, activation="gelu", *, weights=None, dropout=0.0, **options):
    """``(x, tensors, options)``; ``weights`` is the dtype of the products' operands, if it is another."""
    weights = weights or dtype

    def empty(*shape, dtype=weights):
        return torch.empty(shape, dtype=dtype, device="meta")

    inner = 2 * hidden if activation in ("swiglu", "geglu") else hidden
    options = {"norm": "layer", "eps": 1e-5, "step": 0.5, "residual_scale": 1.0, "placement": "pre", **options}
    affine = (None, None) if options["norm"] is None else (empty(width, dtype=dtype), empty(width, dtype=dtype))
    tensors = Tensors(
        empty(inner, width), empty(inner), empty(width, hidden), empty(width), *affine, empty(dtype=torch.int64)
    )
    options = Options(activation=activation, dropout=dropout, activation_dropout=dropout, stream=0, **options)
    return empty(tokens, width, dtype=dtype), tensors, options


def launches_of_ffn(x, tensors, options, architecture="sm90", processors=132, save="fast", needs=NEEDS):
    """``(forward's, backward's)`` launches."""
    from macaron_ops.kernels import ffn_step
    from macaron_ops.kernels.device import recording

    with recording(architecture, processors) as forward:
        _, saved = ffn_step.forward(x, tensors, options, save)
    with recording(architecture, processors) as backward:
        ffn_step.backward(torch.empty_like(x), needs, x, tensors, saved, options)
    return forward, backward
