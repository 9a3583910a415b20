"""The raw operators' arguments on the meta device, for tests that look at launches."""

import torch

from macaron_ops.reference.ffn_step import Options, Tensors

__all__ = ["attend_arguments", "ffn_arguments", "launches_of_attend", "launches_of_ffn"]

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


def attend_arguments(
    tokens,
    width,
    heads,
    dtype=torch.bfloat16,
    *,
    packed=True,
    rotary=False,
    mask=(1, 1),
    hidden=False,
    dropout=0.0,
    **options,
):
    """``(x, tensors, options)`` of four sequences; ``mask`` are the first dimensions of a floating mask, None: none;
    ``hidden``: with the other ways to hide keys."""
    from macaron_ops.reference.attend_step import Options, Tensors

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = (empty(3 * width, width), None, None) if packed else [empty(width, width) for _ in range(3)]
    biases = (empty(3 * width), None, None) if packed else [empty(width) for _ in range(3)]
    angles = [empty(tokens, width // heads // 2) for _ in range(2)] if rotary else (None, None)
    options = {"norm": "layer", "eps": 1e-5, "placement": "pre", "causal": True, **options}
    affine = (None, None) if options["norm"] is None else (empty(width), empty(width))
    bias = None if mask is None else empty(*mask, tokens, tokens)
    padding, borders = (empty(4, tokens, dtype=torch.bool), empty(9, dtype=torch.int32)) if hidden else (None, None)
    constants = (None, bias, padding, borders, *angles, None, empty(dtype=torch.int64))
    tensors = Tensors(*weights, *biases, empty(width, width), empty(width), *affine, *constants)
    given = {"num_heads": heads, "num_kv_heads": heads, "step": 1.0, "residual_scale": 1.0, "scale": 0.1, "stream": 0}
    options = Options(**given, dropout=dropout, attention_dropout=dropout, **options)
    return empty(4, tokens, width), tensors, options


def launches_of_attend(x, tensors, options, architecture="sm90", processors=132, save="fast", needs=None):
    """``(forward's, backward's)`` launches; ``needs`` None: of all but the constants."""
    from macaron_ops.kernels import attend_step
    from macaron_ops.kernels.device import recording

    if needs is None:
        constants = ("cu_seqlens", "cos", "sin", "seed")
        pairs = zip(tensors._fields, tensors, strict=True)
        needs = [True, *(t is not None and t.dtype != torch.bool and name not in constants for name, t in pairs)]
    with recording(architecture, processors) as forward:
        _, saved = attend_step.forward(x, tensors, options, save)
    with recording(architecture, processors) as backward:
        attend_step.backward(torch.empty_like(x), needs, x, tensors, saved, options)
    return forward, backward
