"""``attend_step``: the attention step as people call it."""

import functools
import math

import torch
from torch import Tensor

from macaron_ops.reference.attend_step import Options, Tensors

from .checks import Operands, number, positive_int, probability
from .run import Bound, operator

__all__ = ["attend_step"]


@operator
def attend_step(
    x: Tensor,
    w_qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    b_qkv: Tensor | tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    w_out: Tensor,
    b_out: Tensor | None,
    num_heads: int,
    *,
    norm: str | None = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    step: float = 1.0,
    residual_scale: float = 1.0,
    placement: str = "pre",
    context: Tensor | None = None,
    num_kv_heads: int | None = None,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    qk_scale: Tensor | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    seed: int | Tensor | None = None,
    save: str = "fast",
) -> Tensor:
    """A scaled, normalised multi-head attention residual::

        pre    y = a x + c drop(W_o MHA(N(x)) + b_o)
        post   y = N(a x + c drop(W_o MHA(x) + b_o))

    A row of the attention that is masked entirely attends to nothing and gives zeros. A key or value that a query does
    not see (``causal``, ``cu_seqlens``, a boolean mask) must be finite all the same: where it is not, what such a query
    gets is undefined, and so are the gradients. A floating mask hides nothing, it is added, ``-inf`` too. Numbers as in
    :func:`macaron_ops.ffn_step`. Source: Vaswani et al. 2017, arXiv 1706.03762.

    Args:
        x: ``(..., T, D)``, any floating dtype; B is the product of the leading dimensions.
        w_qkv: q, k and v packed, ``((H + 2 Hkv) head_dim, D)``, or a tuple ``(w_q, w_k, w_v)``, so that a model's own
            parameters are used without a copy. ``head_dim`` is ``w_out.shape[1] / num_heads``.
        b_qkv: packed, a tuple (each entry may be None), or None.
        w_out: ``(D, H head_dim)``. b_out: ``(D,)`` or None.
        num_heads: H.
        norm, norm_weight, norm_bias, eps: N, as in ``ffn_step``.
        step: c. residual_scale: a. placement: ``"pre"`` or ``"post"``.
        context: ``(..., S, Dc)``, the source of keys and values (not normalised); None: x itself, S = T.
        num_kv_heads: Hkv, divides H (grouped queries); None: H.
        causal: query i sees the keys j <= i (top left aligned).
        attn_mask: bool (True: may not attend) or floating (added to the scores); ``(T, S)`` or ``(B H, T, S)`` as in
            ``nn.MultiheadAttention``, or 4-D and broadcastable to ``(B, H, T, S)``.
        key_padding_mask: ``(..., S)`` with the leading dimensions of x, bool (True: ignore the key) or floating.
        cu_seqlens: int32 ``(sequences + 1,)`` from 0 to T: x ``(T, D)`` holds sequences one after the other, which
            attend only within themselves. Not with ``context``. On the CPU its values are checked, on a GPU they are
            taken as given.
        scale: of the scores; None: ``head_dim ** -0.5``.
        rotary: ``(cos, sin)``, each ``(T, R / 2)``, R <= head_dim: rotates the first R channels of each head's q
            and k (half-split convention). They are constants. Not with ``context``.
        qk_scale: ``(head_dim,)``, or ``(H, head_dim)`` where Hkv = H: q and k become unit vectors per head, times this.
        dropout, attention_dropout: probabilities of the output's and the attention weights' dropout.
        seed: of both dropouts, an int or an int64 0-d tensor; None draws one from torch's default generator.
        save: what is kept for the backward pass: ``"lean"`` x and the heads' outputs (a kernel its log-sum-exp, too),
            ``"fast"`` also the projections.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run the call.
    """
    t = Operands(x, min_dim=2)
    *batch, tokens, width = t.x.shape
    heads = positive_int("num_heads", num_heads)
    kv_heads = heads if num_kv_heads is None else positive_int("num_kv_heads", num_kv_heads)
    if heads % kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {heads}; got {kv_heads}")
    w_out = t.operand("w_out", w_out, width, "H * head_dim")
    if w_out.shape[1] % heads:
        raise ValueError(f"num_heads: expected a divisor of w_out's {w_out.shape[1]} columns; got {heads}")
    head_dim = w_out.shape[1] // heads
    if head_dim == 0:
        raise ValueError(f"w_out: expected at least one channel for each of {heads} heads; got {tuple(w_out.shape)}")

    if context is not None:
        if not isinstance(context, Tensor) or context.dim() != t.x.dim() or list(context.shape[:-2]) != batch:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"context: expected shape {(*batch, 'S', 'Dc')}; got {got}")
        context = t.operand("context", context, *context.shape)
    keys = tokens if context is None else context.shape[-2]
    weights, biases = _projection(
        t, w_qkv, b_qkv, width if context is None else context.shape[-1], heads, kv_heads, head_dim
    )
    b_out = t.operand("b_out", b_out, width, optional=True)
    norm, norm_weight, norm_bias, eps, placement = t.norm(norm, norm_weight, norm_bias, eps, placement)

    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool; got {causal!r}")
    size = math.prod(batch)
    attn_mask = _attn_mask(t, attn_mask, size, heads, tokens, keys)
    key_padding_mask = _key_padding_mask(t, key_padding_mask, batch, keys)
    _check_cu_seqlens(t, cu_seqlens, context)
    cos, sin = _rotary(t, rotary, tokens, head_dim, context)
    qk_scale = _qk_scale(t, qk_scale, heads, kv_heads, head_dim)
    dropout = probability("dropout", dropout)
    attention_dropout = probability("attention_dropout", attention_dropout)
    dropped = dropout > 0.0 or attention_dropout > 0.0
    seed = t.seed(seed, used=dropped)
    options = Options(
        heads,
        kv_heads,
        norm,
        eps,
        number("step", step),
        number("residual_scale", residual_scale),
        placement,
        causal,
        head_dim**-0.5 if scale is None else number("scale", scale),
        dropout,
        attention_dropout,
        0,
    )
    masks = (attn_mask, key_padding_mask, cu_seqlens)
    tensors = Tensors(
        *weights, *biases, w_out, b_out, norm_weight, norm_bias, context, *masks, cos, sin, qk_scale, seed
    )
    return Bound("attend_step", t.x, tensors, options, save, draws=dropped and seed is None, derived=t.derived)


def _projection(t: Operands, w_qkv, b_qkv, source_width: int, heads: int, kv_heads: int, head_dim: int):
    """``(w_q, w_k, w_v), (b_q, b_k, b_v)``; packed parameters stand first, with None for the others."""
    rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if not isinstance(w_qkv, (tuple, list)):
        if source_width != t.width:
            raise ValueError(
                f"w_qkv: expected a tuple (w_q, w_k, w_v) where context has another width than x; "
                f"got one tensor, widths {source_width} and {t.width}"
            )
        w_qkv = t.operand("w_qkv", w_qkv, sum(rows), t.width)
        if isinstance(b_qkv, (tuple, list)):
            raise TypeError("b_qkv: expected a tensor or None where w_qkv is one tensor; got a tuple")
        return (w_qkv, None, None), (t.operand("b_qkv", b_qkv, sum(rows), optional=True), None, None)
    biases = (None, None, None) if b_qkv is None else b_qkv
    for name, value in (("w_qkv", w_qkv), ("b_qkv", biases)):
        if not isinstance(value, (tuple, list)) or len(value) != 3:
            raise ValueError(f"{name}: expected three entries, for q, k and v; got {type(value).__name__}")
    widths = (t.width, source_width, source_width)
    return (
        tuple(t.operand(f"w_qkv[{i}]", w, rows[i], widths[i]) for i, w in enumerate(w_qkv)),
        tuple(t.operand(f"b_qkv[{i}]", b, rows[i], optional=True) for i, b in enumerate(biases)),
    )


def _mask_like_x(t: Operands, name: str, mask: object) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor or None; got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        t.device(name, mask)
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected dtype bool or {t.x.dtype}; got {mask.dtype}")
    return t.like_x(name, mask)


def _attn_mask(t: Operands, mask: object, batch: int, heads: int, tokens: int, keys: int) -> Tensor | None:
    """4-D, broadcastable to ``(B, H, T, S)``."""
    if mask is None:
        return None
    mask = _mask_like_x(t, "attn_mask", mask)
    full, shape = (batch, heads, tokens, keys), tuple(mask.shape)
    if shape == (tokens, keys):
        return t.derive(mask, lambda m: m[None, None])
    if shape == (batch * heads, tokens, keys):
        return t.derive(mask, lambda m: m.view(full) if m.is_contiguous() else m.unflatten(0, (batch, heads)))
    if len(shape) == 4 and all(have in (1, want) for have, want in zip(shape, full, strict=True)):
        return mask
    raise ValueError(
        f"attn_mask: expected shape {(tokens, keys)}, {(batch * heads, tokens, keys)} or one that broadcasts to "
        f"{full}; got {shape}"
    )


def _key_padding_mask(t: Operands, mask: object, batch: list[int], keys: int) -> Tensor | None:
    """``(B, S)``."""
    if mask is None:
        return None
    mask = _mask_like_x(t, "key_padding_mask", mask)
    t.shape("key_padding_mask", mask, (*batch, keys))
    return t.derive(mask, lambda m: m.reshape(math.prod(batch), keys))


def _is_traced(tensor: Tensor) -> bool:
    """Whether there are no values to read: inside torch.compile, or a fake tensor."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def _check_cu_seqlens(t: Operands, cu_seqlens: object, context: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else cu_seqlens
        raise TypeError(f"cu_seqlens: expected an int32 tensor of shape (sequences + 1,); got {got}")
    t.device("cu_seqlens", cu_seqlens)
    if t.x.dim() != 2:
        raise ValueError(f"cu_seqlens: expected x of shape (T, D), packed; got {tuple(t.x.shape)}")
    if context is not None:
        raise ValueError("cu_seqlens: expected None with a context; packed sequences attend within themselves")
    # On the CPU the borders themselves are checked; reading them from a device would wait for it.
    if cu_seqlens.device.type == "cpu" and not _is_traced(cu_seqlens):
        t.derive(cu_seqlens, functools.partial(_rising, tokens=t.x.shape[0]))


def _rising(cu_seqlens: Tensor, tokens: int) -> Tensor:
    borders = cu_seqlens.tolist()
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != tokens or borders != sorted(borders):
        raise ValueError(f"cu_seqlens: expected borders that rise from 0 to T = {tokens}; got {borders[:8]}")
    return cu_seqlens


def _rotary(t: Operands, rotary: object, tokens: int, head_dim: int, context: Tensor | None):
    if rotary is None:
        return None, None
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary: expected (cos, sin); got {type(rotary).__name__}")
    if context is not None:
        raise ValueError("rotary: expected None with a context, whose tokens have no common positions with x")
    cos = t.tensor("rotary[0]", rotary[0], tokens, "R / 2")
    sin = t.tensor("rotary[1]", rotary[1], *cos.shape)
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"rotary: expected at most head_dim / 2 = {head_dim // 2} columns; got {cos.shape[1]}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: expected constants; got tensors that require a gradient")
    return cos, sin


def _qk_scale(t: Operands, qk_scale: object, heads: int, kv_heads: int, head_dim: int) -> Tensor | None:
    if qk_scale is None:
        return None
    if isinstance(qk_scale, Tensor) and qk_scale.dim() == 2:
        if heads != kv_heads:
            raise ValueError(f"qk_scale: expected shape ({head_dim},) where num_kv_heads differs from num_heads")
        return t.scale("qk_scale", qk_scale, heads, head_dim)
    return t.scale("qk_scale", qk_scale, head_dim)
